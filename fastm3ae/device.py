"""Where and how precisely a model computes: devices, autocast, and the way of a batch to its device."""

import dataclasses
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from fastm3ae.config import DataConfig, TrainConfig
from fastm3ae.data.batch import ImageBatch
from fastm3ae.data.images import normalization, normalize
from fastm3ae.errors import UserError

__all__ = ["autocast_context", "batch_mover", "compute_dtype", "pick_device"]


def pick_device(name: str, local_rank: int = 0, number_here: int = 1) -> torch.device:
    """Returns this process's device of those on its machine: one GPU each, or the CPU for all.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".
        local_rank: Number of this process among those on its machine.
        number_here: How many these are.

    Raises:
        UserError: The device is unknown or not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    named = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if named is None:
        raise UserError(f"The device must be auto, cpu, cuda or cuda:N, got {name!r}.")
    if name == "cpu":
        return torch.device(name)
    num_gpus = torch.cuda.device_count()
    if not torch.cuda.is_available():
        raise UserError(f"The device is to be {name!r}, but torch {torch.__version__} sees no GPU here.")
    if number_here > num_gpus:
        raise UserError(f"{number_here} processes were started here, one for each GPU, but torch sees {num_gpus}.")
    index = int(named[1]) if named[1] is not None and number_here == 1 else local_rank
    if index >= num_gpus:
        raise UserError(f"The device is to be {name!r}, but torch sees {num_gpus} GPUs here, from cuda:0 on.")
    return torch.device("cuda", index)


def compute_dtype(train: TrainConfig, device: torch.device) -> torch.dtype:
    """Returns in which type the model multiplies: the configured one on a GPU, float32 on a CPU."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return dtypes[train.precision] if device.type == "cuda" else torch.float32


def autocast_context(train: TrainConfig, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Returns what makes the context in which the model computes: autocast on a GPU, nothing in float32."""
    dtype = compute_dtype(train, device)
    return nullcontext if dtype == torch.float32 else partial(torch.autocast, device.type, dtype=dtype)


def batch_mover(data: DataConfig, device: torch.device) -> Callable[[ImageBatch], ImageBatch]:
    """Returns what copies a batch to the device and normalises its images there."""
    mean, std = (statistic.to(device) for statistic in normalization(data.val_transform))

    def move(batch: ImageBatch) -> ImageBatch:
        batch = batch.to(device, non_blocking=True)
        names = [name for name in ("image_BCHW", "false_image_FCHW") if hasattr(batch, name)]
        images: dict[str, Any] = {name: normalize(getattr(batch, name), mean, std) for name in names}
        return dataclasses.replace(batch, **images)

    return move
