"""How many pairs a device holds at once: try, and halve until it fits."""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from fastm3ae import objectives
from fastm3ae.config import RunConfig
from fastm3ae.data.batch import ImageBatch
from fastm3ae.errors import UserError
from fastm3ae.model.build import Model

__all__ = ["explain_full_memory", "fit_micro_batch", "largest_that_fits"]

CPU_MICRO_BATCH = 32
ADAM_STATES = 2  # running means of the gradients and of their squares, each as large as the parameters


def fit_micro_batch(
    model: Model,
    config: RunConfig,
    most: int,
    autocast: Callable[[], AbstractContextManager],
    longest_batch: Callable[[int], ImageBatch],
) -> int:
    """Returns how many pairs the model's device can train on at once, at most ``most``.

    On a GPU, two passes over texts of the greatest length are tried beside memory for the optimiser's state. A CPU
    gives no error that could be caught when its memory ends, so that there 32 are taken.

    Args:
        model: The model, on its device. Its gradients are removed; random states are left as they were.
        config: The run, resolved.
        most: Pairs of this process in a step.
        autocast: Gives the context in which the model computes.
        longest_batch: Makes a batch of so many pairs that needs as much memory as any.

    Raises:
        UserError: Not even one pair fits.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return min(most, CPU_MICRO_BATCH)
    num_values = sum(parameter.numel() for parameter in model.parameters())

    def attempt(num_pairs: int) -> None:
        reserved = torch.empty(ADAM_STATES * num_values, dtype=torch.float32, device=device)
        batch = longest_batch(num_pairs).to(device)
        for _ in range(2):  # the second beside the gradients of the first
            with autocast():
                results = objectives.losses(model(batch, **config.step_options()), batch, model.config)
            objectives.total(results).backward()
        del reserved

    try:
        with torch.random.fork_rng(devices=[device]):
            return largest_that_fits(most, attempt)
    finally:
        model.zero_grad()
        torch.cuda.empty_cache()


def largest_that_fits(most: int, attempt: Callable[[int], None]) -> int:
    """Returns the first of most, most / 2, most / 4, ..., 1 (rounded up) at which ``attempt`` finds enough memory.

    Raises:
        UserError: Not even 1 fits.
    """
    size = most
    while True:
        try:
            attempt(size)
            return size
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise UserError(
                    "Not even one pair fits into the device's memory: take a smaller model.vision.image_size_px, a "
                    f"shorter data.max_text_tokens or a smaller model ({error})"
                ) from error
        gc.collect()  # the failed attempt's tensors, which its traceback held
        torch.cuda.empty_cache()
        size = -(-size // 2)


@contextmanager
def explain_full_memory(device: torch.device, step: int, micro_batch: int) -> Iterator[None]:
    """Within it, a step that finds no memory is a user's mistake.

    Args:
        device: Where the step is made.
        step: Its number.
        micro_batch: Pairs of a pass.

    Raises:
        UserError: The device's memory was full.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"The memory of {device} was full in step {step}, with passes of {micro_batch} pairs: "
            f"give a smaller --train.micro-batch, or auto ({error})"
        ) from error
