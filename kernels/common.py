"""What the ops of this folder share: words for tensors in a message, a check, and the way to the Triton launchers."""

import functools
import importlib
from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["FLOAT_DTYPES", "check_one_device", "describe", "dtype_name", "triton_kernels"]

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """Returns float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def describe(x: Tensor | None) -> str:
    """Returns a tensor's shape and dtype as the messages of ValueErrors say them."""
    return "None" if x is None else f"{tuple(x.shape)} {dtype_name(x.dtype)}"


def check_one_device(**tensors: Tensor | None) -> None:
    """Checks that all tensors that are given, by the names that the message shall say, are on one device.

    Raises:
        ValueError: They are not.
    """
    devices = {name: str(x.device) for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{_join(devices)} must be on one device, got {_join(devices.values())}")


def _join(words: Iterable[str]) -> str:
    *rest, last = words
    return f"{', '.join(rest)} and {last}"


@functools.cache
def triton_kernels(op: str) -> ModuleType:
    """Imports kernels/<op>_triton.py, and Triton with it, on the first call with a CUDA tensor.

    Raises:
        RuntimeError: Triton is not installed.
    """
    try:
        return importlib.import_module(f"fastm3ae.kernels.{op}_triton")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError(
            f"{op} of CUDA tensors runs in Triton, which is not installed: pip install 'triton>=3.6', "
            "or move the tensors to the CPU"
        ) from error
