"""From items to batches, in the loader's worker processes.

Every random draw comes from a generator that is keyed by the run's seed, the epoch, and the item or the batch that the
draw is for. So nothing depends on the number of workers or on what was drawn before, and an epoch can be entered at any
batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastm3ae.data.balance import Work
from fastm3ae.data.batch import ImageBatch
from fastm3ae.data.datasets import Images
from fastm3ae.errors import BadSample

__all__ = ["OF_BATCH", "OF_EPOCH", "OF_PAIR", "AnySample", "BatchRequest", "Batches", "keyed_rng", "stack"]

OF_PAIR, OF_BATCH, OF_EPOCH = 0, 1, 2  # what a random generator is for

AnySample = TypeVar("AnySample")


@dataclass(frozen=True)
class BatchRequest:
    """A part of batch number ``batch`` of an epoch; what is drawn for a batch does not depend on its division.

    Args:
        epoch: Number of the epoch.
        batch: Number of the batch in the epoch.
        pairs: The pairs of the whole batch.
        part: Which of them are requested, by their places in ``pairs``, rising; None: all.
    """

    epoch: int
    batch: int
    pairs: Sequence[int]
    part: Sequence[int] | None = None


class Batches(ABC):
    """A data set whose keys are requests and whose values are batches of one kind, which a subclass makes.

    Args:
        dataset: The items.
        transform: Makes a (3, S, S) uint8 tensor of an image; may draw from torch's default generator.
        seed: Seed of every draw.
    """

    def __init__(self, dataset: Images, transform: Callable[..., Any], *, seed: int = 0) -> None:
        self.dataset: Images = dataset
        self.transform, self.seed = transform, seed

    @abstractmethod
    def __getitem__(self, request: BatchRequest) -> ImageBatch:
        """Returns the requested batch; items with an image that cannot be used are in its ``bad_samples`` instead."""

    def work(self, request: BatchRequest) -> Work | None:
        """Returns in what the pairs of a whole batch of training are unlike; None: in nothing that matters."""
        return None

    def _collect(
        self, request: BatchRequest, make_sample: Callable[[int, np.random.Generator], AnySample]
    ) -> tuple[list[AnySample], list[BadSample]]:
        """Returns a sample of each item that can be used, and an error for each other one."""
        samples, bad_samples = [], []
        places = range(len(request.pairs)) if request.part is None else request.part
        for pair in (request.pairs[place] for place in places):
            try:
                samples.append(make_sample(pair, keyed_rng(self.seed, request.epoch, OF_PAIR, pair)))
            except BadSample as error:
                bad_samples.append(error)
        return samples, bad_samples

    def _image(self, pair: int, rng: np.random.Generator) -> Tensor:
        return self._transformed(rng, self.dataset.image(pair))

    def _transformed(self, rng: np.random.Generator, *images: Image.Image) -> Any:
        """Returns what the transform makes, whose draws depend on ``rng`` alone."""
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which seeds the GPUs as well: without workers, this is the training process.
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            return self.transform(*images)


def keyed_rng(seed: int, epoch: int, purpose: int, index: int) -> np.random.Generator:
    """Returns the random generator of one pair, one batch or one epoch, as ``purpose`` says."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, purpose, index))))


def stack(images: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Returns the images one after the other; if there are none, an empty tensor of images of the given shape."""
    return torch.stack(list(images)) if images else torch.empty((0, *shape), dtype=torch.uint8)
