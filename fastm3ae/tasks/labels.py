"""Tasks with labels: what these stand for, as the data files say, and that all files agree."""

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastm3ae.config import EvaluateConfig, FinetuneConfig
from fastm3ae.data.arrow import dataset_files
from fastm3ae.data.datasets import ClassificationDataset, ImageDataset, VqaDataset
from fastm3ae.device import batch_mover
from fastm3ae.errors import UserError
from fastm3ae.tasks.evaluation import Evaluation
from fastm3ae.tasks.task import NUM_HARDEST, Item, Loaded, Progress, Task, left_out, with_notes

__all__ = ["ChoiceTask", "Chosen", "LabelledTask", "check_labels", "read_labels"]

NUM_EXAMPLES = 3

Labelled = VqaDataset | ClassificationDataset | ImageDataset


class Chosen(NamedTuple):
    """The best labels of each item, the best first.

    Args:
        labels: (B, number of labels) int64.
        probabilities: (B, number of labels) float32.
    """

    labels: Tensor
    probabilities: Tensor


class LabelledTask(Task):
    """A task whose data have labels.

    Raises:
        UserError: A data file cannot be used, has other labels than another one, or none has any.
    """

    def __init__(self, config: FinetuneConfig, about: Mapping[str, Any] | None = None) -> None:
        super().__init__(config, about)
        if about is not None:
            self.labels = tuple(about["labels"])
            return
        files = dataset_files(config.data.root, config.data.datasets, "train")
        files += [path for split in ("val", "test") for path in self.files(split) if path.exists()]
        self.labels = read_labels([self._open([path]) for path in files])
        if not self.labels:
            raise UserError(f"Not one item has a label in {', '.join(map(str, files))}.")

    def dataset(self, split: str) -> Labelled:
        """Returns a split's items, whose labels are the task's."""
        dataset = super().dataset(split)
        check_labels(dataset, self.labels, "the model")
        return dataset

    @torch.inference_mode()
    def evaluate(self, loaded: Loaded, asked: EvaluateConfig, progress: Progress) -> tuple[Evaluation, Labelled]:
        """Returns how well a model does the task on a split, and the split's items."""
        config, tokenizer, model = loaded
        num_workers = min(asked.num_workers, os.cpu_count() or 1)
        loader = self.loader(config, tokenizer, asked.split, num_workers=num_workers, is_training=False)
        to_device, items, num_done = batch_mover(config.data, loaded.device), [], 0
        for pieces in loader.epoch(0):
            for batch in pieces:
                with loaded.autocast():
                    outputs = model(to_device(batch))
                items += self.items(outputs[self.objective], batch)
            num_done = min(num_done + asked.batch_size, loader.num_pairs)
            progress(num_done, loader.num_pairs)
        evaluation = self.evaluation(items, self.squares(config, loader.dataset), num_resamples=asked.num_resamples)
        return with_notes(evaluation, left_out(loader.bad_samples)), loader.dataset

    @abstractmethod
    def evaluation(self, items: Sequence[Item], square: Callable[[int], Tensor], **resampling: Any) -> Evaluation:
        """Returns the metrics and what else an evaluation leaves behind.

        Args:
            items: All items.
            square: Gives the image of a pair as the model sees it, (3, S, S) in [0, 1].
            **resampling: What ``bootstrap`` takes.
        """


class ChoiceTask(LabelledTask):
    """A task that chooses one of its labels for each item."""

    def choices(self, output: Tensor, num: int = 1) -> Chosen:
        """Returns the labels with the largest logits, and their probabilities.

        Args:
            output: The logits, (B, number of labels).
            num: How many labels, at most.
        """
        logits_BA = output.float()
        # Of the logits: probabilities of 1 may be equal where these are not.
        best = logits_BA.sort(dim=-1, descending=True, stable=True).indices[:, :num]
        return Chosen(best, self.probabilities(logits_BA).gather(1, best))

    @abstractmethod
    def probabilities(self, logits_BA: Tensor) -> Tensor:
        """Returns the probability of each label: (B, number of labels)."""

    @abstractmethod
    def row(self, item: Item) -> dict[str, Any]:
        """Returns an item's row of the predictions, with at least expected, predicted, probability and score."""

    def evaluation(self, items: Sequence[Item], square: Callable[[int], Tensor], **resampling: Any) -> Evaluation:
        """Returns the metrics, the choices, which label was taken for which, and the most confident mistakes."""
        rows = [self.row(item) for item in items]
        wrong = [number for number, row in enumerate(rows) if row["score"] < 1]
        wrong.sort(key=lambda number: (rows[number]["score"], -rows[number]["probability"]))
        return Evaluation(
            metrics=self.metrics(items, **resampling),
            predictions=rows,
            confusion=([row["expected"] for row in rows], [row["predicted"] for row in rows]),
            hardest=[(square(items[number]["pair"]), _lines(rows[number])) for number in wrong[:NUM_HARDEST]],
            notes=self.notes(items),
        )

    def notes(self, items: Sequence[Item]) -> list[str]:
        """Returns what a reader of the metrics must know."""
        return []


def _lines(row: Mapping[str, Any]) -> list[str]:
    """Returns an item in words: what was asked or said, what was expected and what predicted."""
    predicted = f"predicted: {row['predicted']} ({row['probability']:.2f})"
    return [row["text"], f"expected: {row['expected']}", predicted]


def read_labels(datasets: Sequence[Labelled]) -> tuple[str, ...]:
    """Returns what the labels 0, 1, ... stand for.

    Files of ``fastm3ae prepare`` say it in their header. Of others, such as the original's, a label's name is the word
    that stands beside it, or its number.

    Args:
        datasets: The splits.

    Raises:
        UserError: Two files say different things.
    """
    said = [(path, names) for dataset in datasets for path, names in dataset.label_names().items()]
    if said:
        (first, names), *others = said
        for path, other in others:
            _check_equal(path, other, names, first)
        return tuple(names)
    found = [pair for dataset in datasets for pair in dataset.label_words()]
    words = {**dict.fromkeys(label for label, _ in found), **{label: word for label, word in found if word is not None}}
    return tuple(words.get(label) or f"label {label}" for label in range(1 + max(words, default=-1)))


def check_labels(dataset: Labelled, names: Sequence[str], origin: str) -> None:
    """Checks that a data set's labels are those of another place.

    Args:
        dataset: The data set.
        names: The other place's labels.
        origin: That place, in words.

    Raises:
        UserError: They differ; it says in what.
    """
    said = dataset.label_names()
    for path, found in said.items():
        _check_equal(path, found, names, origin)
    files = ", ".join(path.name for path in dataset.table.paths)
    if len(said) == len(dataset.table.paths):
        return
    for label, word in dataset.label_words():
        if not 0 <= label < len(names):
            raise UserError(f"{files} has the label {label}, but {origin} has only {len(names)} labels.")
        if word not in (None, names[label]):
            raise UserError(f"{files} has other labels than {origin}: {label} is {word!r}, there {names[label]!r}.")


def _check_equal(path: str, found: Sequence[str], expected: Sequence[str], origin: str) -> None:
    if list(found) == list(expected):
        return
    differing = [
        f"{number} is {here!r}, there {there!r}"
        for number, (here, there) in enumerate(zip(found, expected, strict=False))
        if here != there
    ]
    where = f": {'; '.join(differing[:NUM_EXAMPLES])}" if differing else ""
    raise UserError(f"{path} has other labels than {origin}, {len(found)} and {len(expected)}{where}.")
