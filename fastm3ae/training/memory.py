"""How many pairs a device holds at once: try, for as few passes as possible."""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import torch

from fastm3ae import objectives
from fastm3ae.config import RunConfig
from fastm3ae.data.batch import ImageBatch
from fastm3ae.errors import UserError
from fastm3ae.model.build import Model
from fastm3ae.training.remembered import forget

__all__ = ["explain_full_memory", "fit_micro_batch", "largest_that_fits"]

CPU_MICRO_BATCH = 32
ADAM_STATES = 2  # running means of the gradients and of their squares, each as large as the parameters


def fit_micro_batch(
    model: Model,
    config: RunConfig,
    most: int,
    autocast: Callable[[], AbstractContextManager],
    longest_batch: Callable[[int], ImageBatch],
    state_frac: float = 1.0,
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
        state_frac: The fraction of the optimiser's state that this process holds, where several divide it.

    Raises:
        UserError: Not even one pair fits.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return min(most, CPU_MICRO_BATCH)
    num_values = sum(parameter.numel() for parameter in model.parameters())

    def attempt(num_pairs: int) -> None:
        reserved = torch.empty(round(ADAM_STATES * num_values * state_frac), dtype=torch.float32, device=device)
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
    """Returns the largest of most, most / 2, most / 3, ..., 1 (rounded up) at which ``attempt`` finds enough memory.

    These are the sizes of the largest pass if ``most`` pairs are divided among 1, 2, 3, ... passes: a size between two
    of them would save none.

    Raises:
        UserError: Not even 1 fits.
    """

    @cache
    def fits(size: int) -> bool:
        try:
            attempt(size)
            return True
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise UserError(
                    "Not even one pair fits into the device's memory: take a smaller model.vision.image_size_px, a "
                    f"shorter data.max_text_tokens or a smaller model ({error})"
                ) from error
        gc.collect()  # the failed attempt's tensors, which its traceback held
        torch.cuda.empty_cache()
        return False

    too_few, enough = 0, 1  # passes
    while not fits(-(-most // enough)):
        too_few, enough = enough, min(2 * enough, most)
    while enough - too_few > 1:
        between = (too_few + enough) // 2
        if fits(-(-most // between)):
            enough = between
        else:
            too_few = between
    return -(-most // enough)


@contextmanager
def explain_full_memory(device: torch.device, step: int, micro_batch: int) -> Iterator[None]:
    """Within it, a step that finds no memory is a user's mistake, and its passes are not remembered as ones that fit.

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
        advice = "give a smaller --train.micro-batch, or auto"
        if forget(device, micro_batch):
            advice += ", which will search anew: what it had found is forgotten"
        raise UserError(
            f"The memory of {device} was full in step {step}, with passes of {micro_batch} pairs: {advice} ({error})"
        ) from error
