"""What an arrow file's rows mean: items are pairs of an image and one of its texts, in the files' order."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from fastm3ae.data.arrow import ArrowTable
from fastm3ae.data.images import decode_image
from fastm3ae.errors import BadSample, UserError

__all__ = ["ClassificationDataset", "PairDataset", "VqaDataset"]


class PairDataset:
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
        columns = {"image": "binary", text_column: "list<string>", "image_id": "string", **(extra_columns or {})}
        self.table = ArrowTable.open(files, columns)
        self.columns, self.text_column, self.alpha = tuple(columns), text_column, alpha
        num_texts = np.array([len(texts) for texts in self.table.column(text_column)], dtype=np.int64)
        first_pair = np.concatenate([[0], np.cumsum(num_texts)])
        self.row = np.repeat(np.arange(len(num_texts)), num_texts)
        self.position = np.arange(first_pair[-1]) - np.repeat(first_pair[:-1], num_texts)

        first_row_of_file = np.cumsum([0] + [len(ArrowTable([file])) for file in files])
        self._first_pair_of_file = first_pair[first_row_of_file]
        empty = [str(file) for file, size in zip(files, np.diff(self._first_pair_of_file), strict=True) if not size]
        if len(empty) == len(files):
            raise UserError(f"There is no pair of an image and a text in {', '.join(empty)}; expected at least one.")
        self.notes = [f"{file} holds no pair of an image and a text." for file in empty]

    def __len__(self) -> int:
        return len(self.row)

    def fingerprints(self) -> dict[str, str]:
        """Returns for each file, by name, the SHA-256 of texts, ids, labels and image sizes; no image is read."""
        return {path.name: ArrowTable([path]).fingerprint(self.columns) for path in self.table.paths}

    def text(self, pair: int) -> str:
        """Returns the pair's text as it stands in the file."""
        return self.table.row(self.row[pair], self.text_column)[self.position[pair]]

    def image_id(self, pair: int) -> str:
        """Returns the id of the pair's image."""
        return self.table.row(self.row[pair], "image_id")

    def image(self, pair: int) -> Image.Image:
        """Returns the pair's image, decoded.

        Raises:
            BadSample: The bytes are no image that can be decoded.
        """
        row = int(self.row[pair])
        try:
            return decode_image(self.table.image_bytes(row), self.alpha)
        except ValueError as error:
            file, row_in_file = self.table.locate(row)
            raise BadSample(file, row_in_file, self.image_id(pair), f"the image cannot be used: {error}") from error

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
        UserError: As ``PairDataset``, or a question has not one score for each answer.

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
                file, row = self.table.locate(int(self.row[pair]))
                raise UserError(
                    f"{file}, row {row}: question {self.position[pair]} has {len(ids)} answer_labels "
                    f"and {len(scores)} answer_scores, expected one score for each label."
                )
        self.is_open = [answer_type == 1 for answer_type in self._per_pair("answer_type")]

    def label_names(self) -> dict[str, list[str]]:
        """Returns for each file that says it, by name, which answers the labels 0, 1, ... stand for."""
        return self._names_of("answer_labels")

    def label_words(self) -> Iterator[tuple[int, str]]:
        """Yields labels with the answers that stand beside them."""
        for ids, answers in zip(self.answer_ids, self.answers, strict=True):
            if len(ids) == len(answers):
                yield from zip(ids, answers, strict=True)


class ClassificationDataset(PairDataset):
    """Pairs with a class each.

    Attributes:
        labels: The class of each pair.

    Args:
        files: Arrow files, one per data set.
        label_column: The classes of an image's texts, for example "i_meth_label".
        alpha: As of ``PairDataset``.

    Source: The original's datasets/cls_melinda_dataset.py.
    """

    def __init__(
        self, files: Sequence[Path], label_column: str, alpha: Literal["composite", "official"] = "composite"
    ) -> None:
        super().__init__(files, extra_columns={label_column: "list<int>"}, alpha=alpha)
        self.label_column = label_column
        self.labels: list[int] = self._per_pair(label_column)

    def label_names(self) -> dict[str, list[str]]:
        """Returns for each file that says it, by name, what the labels 0, 1, ... stand for."""
        return self._names_of(self.label_column)

    def label_words(self) -> Iterator[tuple[int, None]]:
        """Yields the labels; no word stands beside them."""
        yield from ((label, None) for label in self.labels)
