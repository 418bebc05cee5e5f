"""What a run is for: all in which pre-training and the downstream tasks differ."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from PIL import Image
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import RunConfig
from fastm3ae.data.batch import ImageBatch
from fastm3ae.data.loader import Loader, Place
from fastm3ae.model.build import Model
from fastm3ae.training.distributed import Processes

__all__ = ["Job", "MakeLoader"]


class MakeLoader(Protocol):
    """Makes the loader of a split, for this process."""

    def __call__(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerFast | None,
        split: Literal["train", "val"],
        *,
        place: Place,
        num_workers: int,
    ) -> Loader:
        """Returns it."""


@dataclass(frozen=True)
class Job:
    """What a run is for, to the code that all runs share.

    Args:
        name: Of the progress bar.
        loader: Makes the loaders.
        score: Name of the metric that chooses the best checkpoint.
        longest_batch: Makes a batch of so many pairs that needs as much memory as any.
        validate: Returns the metrics of the validation split, that metric as "score", too, unless it is not defined;
            of the model, this process's batches, what gives the context in which the model computes, and the processes.
        draw: Draws pictures, by name, of the model and the first batch of a validation; None: none.
        freeze: Parts of the model that keep the weights they start with.
        about: What the checkpoints say of the run beside the model.
    """

    name: str
    score: str
    loader: MakeLoader
    longest_batch: Callable[[RunConfig, int], ImageBatch]
    validate: Callable[[Model, Iterator[ImageBatch], Callable[[], AbstractContextManager], Processes], dict[str, float]]
    draw: Callable[..., Mapping[str, Image.Image]] | None = None
    freeze: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
