"""What every downstream task is, to fine-tuning and to evaluation."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import EvaluateConfig, FinetuneConfig, ModelConfig
from fastm3ae.data.arrow import dataset_files
from fastm3ae.data.batch import ImageBatch
from fastm3ae.data.collate import OF_EPOCH, Batches, keyed_rng
from fastm3ae.data.datasets import RowsOfImages
from fastm3ae.data.images import FIXED_TRANSFORMS
from fastm3ae.data.loader import WHOLE, Loader, Place, make_loader, transform_of
from fastm3ae.device import autocast_context
from fastm3ae.errors import BadSample
from fastm3ae.model.build import Model
from fastm3ae.tasks.evaluation import Evaluation
from fastm3ae.tasks.metrics import Interval

__all__ = ["NUM_HARDEST", "Item", "Loaded", "Progress", "Task", "left_out", "with_notes"]

NUM_HARDEST = 16
"""So many of the items that went wrong most are drawn."""

Item = dict[str, Any]
"""What a model made of one item and what was expected, of which metrics and reports are made; "pair" is its number in
the data set."""


Progress = Callable[[int, int], None]
"""Is told how much is done, and how much there is."""


def left_out(bad_samples: Sequence[BadSample]) -> list[str]:
    """Returns a note on items whose images cannot be used, if there are any."""
    first = f"{len(bad_samples)} items were left out because of their images; the first: "
    return [f"{first}{bad_samples[0]}"] if bad_samples else []


def with_notes(evaluation: Evaluation, notes: Sequence[str]) -> Evaluation:
    """Returns an evaluation with further notes."""
    return dataclasses.replace(evaluation, notes=[*evaluation.notes, *notes])


class Loaded(NamedTuple):
    """A model that can do a task, with what makes its inputs.

    Args:
        config: The training that made it, resolved.
        tokenizer: Splits the texts; None if the model reads none.
        model: The model, on its device, in evaluation mode.
    """

    config: FinetuneConfig
    tokenizer: PreTrainedTokenizerFast | None
    model: Model

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    @property
    def autocast(self) -> Callable[[], AbstractContextManager]:
        """Gives the context in which it computes."""
        return autocast_context(self.config.train, self.device)


class Task(ABC):
    """A downstream task on the data of a run.

    Attributes:
        objective: Name of the model's objective.
        score: Name of the metric that chooses the best checkpoint.
        labels: What the labels stand for; none for a task without.
        item_name: What is counted while it is evaluated.

    Args:
        config: The run.
        about: What a checkpoint that was trained for this task says of it; None: it is to be trained.
    """

    objective: ClassVar[str]
    score: ClassVar[str]
    labels: tuple[str, ...] = ()
    item_name: ClassVar[str] = "item"

    def __init__(self, config: FinetuneConfig, about: Mapping[str, Any] | None = None) -> None:
        self.config = config

    @property
    def name(self) -> str:
        """What the task is called in results."""
        return self.config.task.kind

    def about(self) -> dict[str, Any]:
        """Returns what a checkpoint has to say so that the task can be made again."""
        return {"labels": list(self.labels)}

    def files(self, split: str) -> list[Path]:
        """Returns a split's files, which may not exist."""
        return [Path(self.config.data.root, f"{name}_{split}.arrow") for name in self.config.data.datasets]

    def dataset(self, split: str) -> RowsOfImages:
        """Returns a split's items.

        Raises:
            UserError: A file is missing, cannot be read, or does not fit the task.
        """
        return self._open(dataset_files(self.config.data.root, self.config.data.datasets, split))

    def loader(
        self,
        config: FinetuneConfig,
        tokenizer: PreTrainedTokenizerFast | None,
        split: str,
        *,
        place: Place = WHOLE,
        num_workers: int = 0,
        is_training: bool | None = None,
    ) -> Loader:
        """Returns the loader of a split.

        Args:
            config: The run, resolved.
            tokenizer: Splits the texts, where there are any.
            split: Which files are read.
            place: Which part of each batch this process works on.
            num_workers: Worker processes of this process.
            is_training: Whether images are augmented and items permuted, and only the run's fraction of them is
                visited; None: if the split is the training split.
        """
        is_training = split == "train" if is_training is None else is_training
        batches = self._batches(config, self.dataset(split), tokenizer, is_training)
        pairs = self._drawn(batches.dataset) if is_training and config.task.train_frac < 1 else None
        return make_loader(config, batches, is_training, place=place, num_workers=num_workers, pairs=pairs)

    def longest_batch(self, config: FinetuneConfig, num_pairs: int) -> ImageBatch:
        """Returns a batch of so many pairs that needs as much memory as any."""
        size, num_tokens = config.model.image_size_px, config.data.max_text_tokens
        fields = {
            "image_BCHW": torch.zeros(num_pairs, 3, size, size),
            "item_ids": [""] * num_pairs,
            "bad_samples": [],
        }
        if config.model.has_texts:
            fields |= {
                "text_ids_BT": torch.full((num_pairs, num_tokens), (config.model.text.pad_token_id or 0) + 1),
                "is_padding_BT": torch.zeros(num_pairs, num_tokens, dtype=torch.bool),
                "texts": [""] * num_pairs,
            }
        return self._longest(fields)

    @abstractmethod
    def with_head(self, model: ModelConfig) -> ModelConfig:
        """Returns the model's configuration with this task's head in the place of all others."""

    @abstractmethod
    def items(self, output: Tensor, batch: ImageBatch) -> list[Item]:
        """Returns an item for each pair of a batch.

        Args:
            output: What the model's objective gave.
            batch: What it was given.
        """

    @abstractmethod
    def metrics(self, items: Sequence[Item], **resampling: Any) -> dict[str, Interval]:
        """Returns the metrics of all items; ``resampling`` is what ``fastm3ae.tasks.metrics.bootstrap`` takes."""

    @abstractmethod
    def evaluate(self, loaded: Loaded, asked: EvaluateConfig, progress: Progress) -> tuple[Evaluation, RowsOfImages]:
        """Returns how well a model does the task on a split, and the split's items.

        Args:
            loaded: The model.
            asked: Which split, and how.
            progress: Is told how many items are done, and how many there are.
        """

    def validation(
        self, config: FinetuneConfig, model: Model, autocast: Callable[[], AbstractContextManager]
    ) -> dict[str, float]:
        """Returns metrics of the validation split that are not made of a batch's items."""
        return {}

    def squares(self, config: FinetuneConfig, dataset: RowsOfImages) -> Callable[[int], Tensor]:
        """Returns what gives the image of an item as the model sees it, (3, S, S) in [0, 1]."""
        transform = transform_of(config, is_training=False)
        return lambda pair: transform(dataset.image(pair)).float() / 255

    def unit(self, dataset: RowsOfImages) -> str:
        """Returns what the groups of items are that metrics are resampled by."""
        return "image"

    @abstractmethod
    def _open(self, files: Sequence[Path]) -> RowsOfImages:
        """Returns the items of these files."""

    @abstractmethod
    def _batches(
        self,
        config: FinetuneConfig,
        dataset: RowsOfImages,
        tokenizer: PreTrainedTokenizerFast | None,
        is_training: bool,
    ) -> Batches:
        """Returns what makes the batches."""

    @abstractmethod
    def _longest(self, fields: Mapping[str, Any]) -> ImageBatch:
        """Returns the batch of these common fields that has the most of everything else."""

    def _batch_options(self, config: FinetuneConfig, is_training: bool) -> dict[str, Any]:
        """Returns how images and texts become batches."""
        draws = is_training and (
            config.data.train_transform not in FIXED_TRANSFORMS or config.model.vision.kind == "swin"
        )
        return {
            "transform": transform_of(config, is_training),
            "max_text_tokens": config.data.max_text_tokens,
            "seed": config.seed,
            "shares_images": not draws,
        }

    def _drawn(self, dataset: RowsOfImages) -> np.ndarray:
        """Returns the pairs of a fraction of the images, at least one, drawn by the seed."""
        num_images = len(dataset.table)
        num_drawn = max(1, round(num_images * self.config.task.train_frac))
        order = keyed_rng(self.config.seed, 0, OF_EPOCH, 1).permutation(num_images)
        return np.flatnonzero(np.isin(dataset.row, order[:num_drawn]))
