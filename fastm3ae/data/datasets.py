"""What an arrow file's rows mean: items are images, or pairs of an image and one of its texts, in the files' order."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from fastm3ae.data.arrow import ArrowTable
from fastm3ae.data.decode import decode_image, open_image
from fastm3ae.errors import BadSample, UserError, listed, shown

__all__ = ["ClassificationDataset", "ImageDataset", "Images", "PairDataset", "RowsOfImages", "VqaDataset"]


MOST_UNNAMED_LABELS = 100_000
"""A file that does not name its labels may have so many: a model gets an output for each up to the largest."""


class Images(Protocol):
    """What batches are made of: images with ids, from anywhere."""

    def __len__(self) -> int: ...

    def image_id(self, index: int) -> str:
        """Returns the id of an item's image."""

    def image(self, index: int) -> Image.Image:
        """Returns an item's image, decoded."""


class RowsOfImages:
    """Rows of several files joined, each with an image and its id, of which a subclass makes items.

    Attributes:
        row: (num_items,) int64, the row of each item; here each row is one.
        notes: Remarks for the user's log, such as a file without an item.

    Args:
        files: Arrow files, one per data set.
        columns: Kinds of the columns that will be read beside the image and its id, by name.
        alpha: What happens to transparent images (``DataConfig.alpha``).
    """

    notes: list[str]

    def __init__(
        self, files: Sequence[Path], columns: Mapping[str, str], alpha: Literal["composite", "official"]
    ) -> None:
        columns = {"image": "binary", "image_id": "string", **columns}
        self.table = ArrowTable.open(files, columns)
        self.columns, self.alpha = tuple(columns), alpha
        self.row = np.arange(len(self.table))
        self._first_row_of_file = np.cumsum([0] + [len(ArrowTable([file])) for file in files])

    def __len__(self) -> int:
        return len(self.row)

    def image_id(self, index: int) -> str:
        """Returns the id of an item's image."""
        return self.table.row(self.row[index], "image_id")

    def image(self, index: int) -> Image.Image:
        """Returns an item's image, decoded.

        Raises:
            BadSample: The bytes are no image that can be decoded.
        """
        return self._image(int(self.row[index]))

    def fingerprints(self) -> dict[str, str]:
        """Returns for each file, by name, the SHA-256 of texts, ids, labels and image sizes; no image is read."""
        return {path.name: ArrowTable([path]).fingerprint(self.columns) for path in self.table.paths}

    def _image(self, row: int, column: str = "image") -> Image.Image:
        """Returns a row's image (or what else is an image), decoded; raises a BadSample if it cannot be."""
        try:
            return decode_image(self.table.image_bytes(row, column), self.alpha)
        except ValueError as error:
            raise self._bad_sample(row, f"the {column} cannot be used: {error}") from error

    def _bad_sample(self, row: int, reason: str) -> BadSample:
        return BadSample(*self.table.locate(row), self.table.row(row, "image_id"), reason)

    def _notes(self, num_items_of_files: np.ndarray, item: str) -> list[str]:
        """Returns a remark on each file without an item; raises a UserError if no file has one."""
        files = zip(self.table.paths, num_items_of_files, strict=True)
        empty = [str(file) for file, num_items in files if not num_items]
        if len(empty) == len(self.table.paths):
            raise UserError(f"There is no {item} in {', '.join(empty)}; expected at least one.")
        return [f"{file} holds no {item}." for file in empty]


class ImageDataset(RowsOfImages):
    """Images with labels and, for segmentation, masks; without texts.

    Attributes:
        labels: (num_images, num_classes) int8, 0 or 1 for each class.
        class_names: The classes, in the order of the labels.
        has_masks: Whether each image has a mask.
        unit: What images are grouped by: "patient", or "image" where the files do not say whose an image is.
        groups: The group of each image.
        notes: Remarks for the user's log, such as a file without an image.

    Args:
        files: Arrow files, one per data set, with the same classes.
        alpha: What happens to transparent images (``DataConfig.alpha``).

    Raises:
        UserError: A file cannot be read, lacks a column, does not name its classes or names others than the first, a
            row has not one 0 or 1 for each class, or none of the files holds an image.
    """

    def __init__(self, files: Sequence[Path], alpha: Literal["composite", "official"] = "composite") -> None:
        names = ArrowTable(files).batches[0].schema.names
        optional = {name: kind for name, kind in {"mask": "binary", "patient": "string"}.items() if name in names}
        super().__init__(files, {"labels": "list<int>", **optional}, alpha)
        self.has_masks = "mask" in optional
        self.unit = "patient" if "patient" in optional else "image"
        self.groups: list[str] = self.table.column("patient" if "patient" in optional else "image_id")
        self.class_names = self._class_names()
        labels = self.table.column("labels")
        for row, values in enumerate(labels):
            if len(values) != len(self.class_names) or not set(values) <= {0, 1}:
                file, row_in_file = self.table.locate(row)
                raise UserError(
                    f"{file}, row {row_in_file}: the labels are {shown(values)}, expected a 0 or 1 for each of the "
                    f"{len(self.class_names)} classes ({listed(self.class_names)})."
                )
        self.labels = np.array(labels, dtype=np.int8).reshape(-1, len(self.class_names))
        self.notes = self._notes(np.diff(self._first_row_of_file), "image")

    def mask(self, index: int) -> Image.Image:
        """Returns an image's mask: ``L``, of the image's size, 255 where the finding is and 0 elsewhere.

        Raises:
            BadSample: There is no such mask, or it is not of the image's size.
        """
        mask = self._image(index, "mask")
        levels = mask.getcolors(2) if mask.mode == "L" else None
        if levels is None or not {level for _, level in levels} <= {0, 255}:
            raise self._bad_sample(index, f"the mask has other levels than 0 and 255, or colours (mode {mask.mode})")
        try:
            with open_image(self.table.image_bytes(index)) as image:
                size = image.size
        except (OSError, ValueError) as error:
            raise self._bad_sample(index, f"the image cannot be used: {error}") from error
        if mask.size != size:
            sizes = f"{mask.width} x {mask.height}, not {size[0]} x {size[1]}"
            raise self._bad_sample(index, f"the mask is not of the image's size: {sizes}")
        return mask

    def label_names(self) -> dict[str, list[str]]:
        """Returns for each file, by name, its classes."""
        classes = {name: facts.get("classes", {}).get("labels") for name, facts in self.table.facts().items()}
        for file, found in classes.items():
            if not found:
                raise UserError(f"{file} does not name the classes of its labels, as `fastm3ae prepare` does.")
        return classes

    def _class_names(self) -> list[str]:
        """Returns the classes that all files name."""
        (first, names), *others = self.label_names().items()
        for file, found in others:
            if found != names:
                raise UserError(f"{file} has the classes {listed(found)}, but {first} has {listed(names)}.")
        return names


class PairDataset(RowsOfImages):
    """Pairs (image i, text j of image i), i and then j rising, of several files joined: for pre-training and retrieval.

    Attributes:
        row: (num_pairs,) int64, i for each pair.
        position: (num_pairs,) int64, j for each pair.
        notes: Remarks for the user's log, such as a file without a pair.

    Args:
        files: Arrow files, one per data set.
        text_column: The list of texts of each image.
        extra_columns: Kinds of further columns that will be read, by name.
        alpha: What happens to transparent images (``DataConfig.alpha``).

    Raises:
        UserError: A file cannot be read, lacks a column, or none of the files holds a pair.

    Source: ``index_mapper`` in the original's datasets/base_dataset.py.
    """

    def __init__(
        self,
        files: Sequence[Path],
        text_column: str = "caption",
        extra_columns: Mapping[str, str] | None = None,
        alpha: Literal["composite", "official"] = "composite",
    ) -> None:
        super().__init__(files, {text_column: "list<string>", **(extra_columns or {})}, alpha)
        self.text_column = text_column
        num_texts = np.array([len(texts) for texts in self.table.column(text_column)], dtype=np.int64)
        first_pair = np.concatenate([[0], np.cumsum(num_texts)])
        self.row = np.repeat(np.arange(len(num_texts)), num_texts)
        self.position = np.arange(first_pair[-1]) - np.repeat(first_pair[:-1], num_texts)

        self._first_pair_of_file = first_pair[self._first_row_of_file]
        self.notes = self._notes(np.diff(self._first_pair_of_file), "pair of an image and a text")

    def text(self, pair: int) -> str:
        """Returns the pair's text as it stands in the file."""
        return self.table.row(self.row[pair], self.text_column)[self.position[pair]]

    @cached_property
    def text_bytes(self) -> np.ndarray:
        """How long each pair's text is, (num_pairs,) int64, without reading one."""
        return self.table.text_bytes(self.text_column)

    def same_dataset(self, pair: int) -> range:
        """Returns all pairs of the pair's own file, itself included: what false images and texts are drawn from.

        Source: The original joins data sets that each draw from themselves (datamodules/multitask_datamodule.py).
        """
        file = np.searchsorted(self._first_pair_of_file, pair, side="right") - 1
        return range(self._first_pair_of_file[file], self._first_pair_of_file[file + 1])

    def _names_of(self, column: str) -> dict[str, list[str]]:
        classes = {name: facts.get("classes", {}) for name, facts in self.table.facts().items()}
        return {name: of_file[column] for name, of_file in classes.items() if column in of_file}

    def _per_pair(self, column: str) -> list[Any]:
        """Returns the values of a column that has a list of one value per text for each image, joined.

        Raises:
            UserError: A row has more or fewer values than texts.
        """
        rows = self.table.column(column)
        num_texts = np.bincount(self.row, minlength=len(rows))
        for row, (values, expected) in enumerate(zip(rows, num_texts, strict=True)):
            if len(values) != expected:
                file, row_in_file = self.table.locate(row)
                raise UserError(
                    f"{file}, row {row_in_file}: column {column!r} has {len(values)} values, expected one for each of "
                    f"the {expected} values of {self.text_column!r}."
                )
        return [value for values in rows for value in values]

    def _check_labels(self, column: str, labels_of_pairs: Sequence[Sequence[int]]) -> None:
        """Raises a UserError that names the first label that is negative, too large, or none that its file names."""
        names, bounds = self._names_of(column), self._first_pair_of_file
        for path, first, last in zip(self.table.paths, bounds, bounds[1:], strict=False):
            num = len(names[path.name]) if path.name in names else MOST_UNNAMED_LABELS
            for pair in range(first, last):
                for label in labels_of_pairs[pair]:
                    if not 0 <= label < num:
                        raise UserError(
                            f"{self._place(pair)} has the label {label} in column {column!r}, expected one from 0 to "
                            f"{num - 1}."
                        )

    def _place(self, pair: int) -> str:
        """Returns where a pair stands, as the start of a sentence."""
        file, row = self.table.locate(int(self.row[pair]))
        return f"{file}, row {row}: number {self.position[pair]} of {self.text_column!r}"


class VqaDataset(PairDataset):
    """Questions about images, with their answers.

    Attributes:
        question_ids: Id of each question. Ids may repeat: answers are found by position, never by id.
        answers: The answers to each question, in words.
        answer_ids: Their indices in the vocabulary of answers.
        answer_scores: Their scores.
        is_open: Whether each question is open; a closed one is answered by yes or no.

    Args:
        files: Arrow files, one per data set.
        alpha: As of ``PairDataset``.

    Raises:
        UserError: As ``PairDataset``, or a question has not one finite score for each answer, a label that its file
            does not name, or an answer_type that is neither 0 nor 1.

    Source: The original's datasets/vqa_vqa_rad_dataset.py.
    """

    def __init__(self, files: Sequence[Path], alpha: Literal["composite", "official"] = "composite") -> None:
        columns = {
            "question_id": "list<int>",
            "answers": "list<list<string>>",
            "answer_labels": "list<list<int>>",
            "answer_scores": "list<list<float>>",
            "answer_type": "list<int>",
        }
        super().__init__(files, "questions", columns, alpha)
        self.question_ids: list[int] = self._per_pair("question_id")
        self.answers: list[list[str]] = self._per_pair("answers")
        self.answer_ids: list[list[int]] = self._per_pair("answer_labels")
        self.answer_scores: list[list[float]] = self._per_pair("answer_scores")
        for pair, (ids, scores) in enumerate(zip(self.answer_ids, self.answer_scores, strict=True)):
            if len(ids) != len(scores):
                raise UserError(
                    f"{self._place(pair)} has {len(ids)} answer_labels and {len(scores)} answer_scores, expected one "
                    "score for each label."
                )
            if not np.isfinite(scores).all():
                raise UserError(f"{self._place(pair)} has the answer_scores {shown(scores)}, expected finite numbers.")
        self._check_labels("answer_labels", self.answer_ids)
        answer_types = self._per_pair("answer_type")
        for pair, answer_type in enumerate(answer_types):
            if answer_type not in (0, 1):
                raise UserError(
                    f"{self._place(pair)} has the answer_type {answer_type}, expected 0 (closed) or 1 (open)."
                )
        self.is_open = [answer_type == 1 for answer_type in answer_types]

    def label_names(self) -> dict[str, list[str]]:
        """Returns for each file that says it, by name, which answers the labels 0, 1, ... stand for."""
        return self._names_of("answer_labels")

    def label_words(self) -> Iterator[tuple[int, str | None]]:
        """Yields labels with the answers that stand beside them; None where there are more or fewer answers."""
        for ids, answers in zip(self.answer_ids, self.answers, strict=True):
            yield from zip(ids, answers if len(ids) == len(answers) else [None] * len(ids), strict=True)


class ClassificationDataset(PairDataset):
    """Pairs with a class each.

    Attributes:
        labels: The class of each pair.

    Args:
        files: Arrow files, one per data set.
        label_column: The classes of an image's texts, for example "i_meth_label".
        alpha: As of ``PairDataset``.

    Raises:
        UserError: As ``PairDataset``, or a pair has a label that its file does not name.

    Source: The original's datasets/cls_melinda_dataset.py.
    """

    def __init__(
        self, files: Sequence[Path], label_column: str, alpha: Literal["composite", "official"] = "composite"
    ) -> None:
        super().__init__(files, extra_columns={label_column: "list<int>"}, alpha=alpha)
        self.label_column = label_column
        self.labels: list[int] = self._per_pair(label_column)
        self._check_labels(label_column, [[label] for label in self.labels])

    def label_names(self) -> dict[str, list[str]]:
        """Returns for each file that says it, by name, what the labels 0, 1, ... stand for."""
        return self._names_of(self.label_column)

    def label_words(self) -> Iterator[tuple[int, None]]:
        """Yields the labels; no word stands beside them."""
        yield from ((label, None) for label in self.labels)
