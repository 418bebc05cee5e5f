"""Questions about images: what VQA-RAD, SLAKE and MedVQA-2019 have in common once their questions are read."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastm3ae.config.files import parse_json
from fastm3ae.data.answers import normalize_answer
from fastm3ae.data.arrow import VQA_COLUMNS
from fastm3ae.data.prepare.common import (
    SPLITS,
    OnBadImage,
    PrepareReport,
    Progress,
    read_lines,
    require_images,
    write_rows,
)
from fastm3ae.errors import UserError

__all__ = ["AnswerSplits", "OnEmptyAnswer", "Question", "VqaOptions", "read_questions", "write_questions"]

AnswerSplits = Literal["all", "train"]
"""Whose answers are labels: those of all splits, as the original's, or those of the training split alone."""
OnEmptyAnswer = Literal["keep", "drop", "stop"]
"""What to do about an answer of no word: a label of its own, as the original's, leave the question out, or stop."""
ANSWER_TYPES = {"closed": 0, "open": 1}


class Question(NamedTuple):
    """A question about an image, its answer as the release has it, and where it stands, from the release's folder."""

    split: str
    image: str
    id: int
    text: str
    answer: str
    answer_type: int
    where: str


@dataclass(frozen=True, kw_only=True)
class VqaOptions:
    """What can be chosen for every data set of questions."""

    answers: AnswerSplits
    on_empty_answer: OnEmptyAnswer
    allow_missing: bool
    on_bad_image: OnBadImage


def read_questions(
    root: Path, file: str, split: str, images: str, image_key: str, further_keys: Sequence[str] = ()
) -> Iterator[tuple[Question, dict[str, Any]]]:
    """Yields each question of a JSON list, and the object it stands in.

    Args:
        root: Folder of the release.
        file: Name of the file in it.
        split: Split of its questions.
        images: Name of the folder of images in it.
        image_key: Key of an image's path in that folder.
        further_keys: Keys of strings that the objects must have, too.

    Raises:
        UserError: The file is no list of objects, or an object lacks a key or has a value of another type.
    """
    path = root / file
    try:
        records = parse_json("".join(line for _, line in read_lines(path)))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(records, list):
        raise UserError(f"{path} must be a JSON list of questions, got {type(records).__name__}.")
    for number, record in enumerate(records, 1):
        place = f"{file}, record {number}"
        where = root / place
        if not isinstance(record, dict):
            raise UserError(f"{where} must be a JSON object, got {record!r}.")
        missing = [key for key in ("qid", image_key, "question", "answer", "answer_type") if key not in record]
        missing += [key for key in further_keys if key not in record]
        if missing:
            raise UserError(f"{where} lacks {', '.join(missing)}; its keys are {', '.join(record)}.")
        if type(record["qid"]) is not int:
            raise UserError(f"{where}: 'qid' must be an integer, got {record['qid']!r}.")
        place = f"{place} (qid {record['qid']})"
        where = root / place
        for key in (image_key, "question", *further_keys):
            if not isinstance(record[key], str) or not record[key].strip():
                raise UserError(f"{where}: {key!r} must be a text, got {record[key]!r}.")
        answer = record["answer"]
        if not isinstance(answer, str | int) and not (isinstance(answer, float) and math.isfinite(answer)):
            raise UserError(f"{where}: 'answer' must be a text or a number, got {answer!r}.")
        answer_type = str(record["answer_type"]).strip().lower()
        if answer_type not in ANSWER_TYPES:
            raise UserError(f"{where}: 'answer_type' must be CLOSED or OPEN, got {record['answer_type']!r}.")
        image = (Path(images) / record[image_key]).as_posix()
        kind = ANSWER_TYPES[answer_type]
        yield Question(split, image, record["qid"], record["question"], str(answer), kind, place), record


def write_questions(
    questions: Sequence[Question],
    root: Path,
    output: Path,
    report: PrepareReport,
    options: VqaOptions,
    *,
    facts: Mapping[str, Any] | None = None,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes ``{report.name}_{split}.arrow`` with one row for each image of a split, and completes the report.

    Labels are answers in the order in which they first appear in train, val and test, each of them by
    ``normalize_answer``; those about missing images are labels, too, so that a part of a release has the labels of the
    whole. An answer that is no label, of which there are some if only train's are, stays with no label: its question
    counts as answered wrongly.

    Args:
        questions: Questions, the splits one after the other.
        root: Folder from which the questions' image paths start.
        output: Folder of the arrow files.
        report: Names the data set.
        options: What was chosen.
        facts: Further options, which the files will name.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.

    Raises:
        UserError: Images are missing, an image has two questions of one id, or an answer is empty, unless allowed.

    Source: prepro/make_arrow.py, ``make_arrow_vqa``.
    Deviation: There, of two questions of one id about an image, the last is asked and the first one's answer expected.
    """
    _check_ids(questions, root, report)
    answer_of = {question: normalize_answer(question.answer) for question in questions}
    questions = _treat_empty_answers(questions, answer_of, root, options.on_empty_answer, report)
    label_splits = SPLITS if options.answers == "all" else ("train",)
    labelled = (question for split in label_splits for question in questions if question.split == split)
    label_of = {answer: label for label, answer in enumerate(dict.fromkeys(answer_of[q] for q in labelled))}
    images = [question.image for question in questions]
    present = require_images(root, images, options.allow_missing, report, "the questions")
    num_lost = Counter(question.split for question in questions if question.image not in present)
    if num_lost:
        counts = ", ".join(f"{count} of {split}" for split, count in num_lost.items())
        report.notes.append(f"Questions about missing images, which are left out: {counts}.")
    questions = [question for question in questions if question.image in present]

    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for question in questions:
        answer = answer_of[question]
        labels = [label_of[answer]] if answer in label_of else []
        row = rows.setdefault(
            (question.split, question.image),
            {name: [] for name, kind in VQA_COLUMNS.items() if kind.startswith("list")}
            | {"image_id": question.image, "split": question.split},
        )
        row["questions"].append(question.text)
        row["answers"].append([answer])
        row["answer_labels"].append(labels)
        row["answer_scores"].append([1.0] * len(labels))
        row["question_id"].append(question.id)
        row["answer_type"].append(question.answer_type)

    _note_labels(questions, answer_of, label_of, label_splits, report)
    chosen = {**asdict(options), **(facts or {})}
    return write_rows(
        list(rows.values()),
        root,
        output,
        report,
        columns=VQA_COLUMNS,
        on_bad_image=options.on_bad_image,
        num_workers=num_workers,
        progress=progress,
        facts={"options": chosen, "classes": {"answer_labels": list(label_of)}},
        kinds_of=lambda row: {"closed": row["answer_type"].count(0), "open": row["answer_type"].count(1)},
    )


def _check_ids(questions: Sequence[Question], root: Path, report: PrepareReport) -> None:
    """Raises a UserError where two questions of one id are about one image, and reports other ids that repeat."""
    first_of: dict[tuple[str, int], Question] = {}
    repeated = []
    about: dict[tuple[str, str, int], Question] = {}
    for question in questions:
        same = about.setdefault((question.split, question.image, question.id), question)
        if same is not question:
            raise UserError(
                f"{root / question.where}: its id {question.id} is that of another question about the image "
                f"{question.image}, too ({same.where}); expected ids that differ."
            )
        first = first_of.setdefault((question.split, question.id), question)
        if first is not question:
            repeated.append(f"{question.where} as {first.where}")
    if repeated:
        report.notes.append(
            f"Questions about different images have the same id, {len(repeated)} times ({repeated[0]}); all are kept."
        )


def _treat_empty_answers(
    questions: Sequence[Question],
    answer_of: Mapping[Question, str],
    root: Path,
    on_empty_answer: OnEmptyAnswer,
    report: PrepareReport,
) -> list[Question]:
    """Returns the questions without those whose empty answer leaves them out."""
    empty = [question for question in questions if not answer_of[question]]
    if empty and on_empty_answer == "stop":
        raise UserError(f"{root / empty[0].where}: the answer {empty[0].answer!r} has no word; expected an answer.")
    if on_empty_answer == "drop":
        for question in empty:
            report.drop("question whose answer has no word", question.where)
        return [question for question in questions if answer_of[question]]
    if empty:
        report.notes.append(
            f"Answers without a word are a label, as in the original: {len(empty)} ({empty[0].where}); "
            "--on-empty-answer drop leaves them out."
        )
    return list(questions)


def _note_labels(
    questions: Sequence[Question],
    answer_of: Mapping[Question, str],
    label_of: Mapping[str, int],
    label_splits: Sequence[str],
    report: PrepareReport,
) -> None:
    """Notes how many labels there are, whose, which questions have none, and what the test split shares with train."""
    whose = "train alone" if label_splits == ("train",) else "train, val and test, as in the original"
    report.notes.append(f"The labels are the {len(label_of)} different answers of {whose}.")
    unknown = Counter(question.split for question in questions if answer_of[question] not in label_of)
    if unknown:
        counts = ", ".join(f"{count} of {split}" for split, count in unknown.items())
        example = next(question for question in questions if answer_of[question] not in label_of)
        report.notes.append(
            f"Questions whose answer is no label, which count as answered wrongly: {counts} "
            f"(such as {answer_of[example]!r}, {example.where})."
        )
    asked = {split: {(q.image, q.text.strip().lower()) for q in questions if q.split == split} for split in SPLITS}
    images = {split: {image for image, _ in pairs} for split, pairs in asked.items()}
    both = images["train"] & images["test"]
    if both:
        report.notes.append(
            f"Of the {len(images['test'])} images of test, train has {len(both)}, too, and "
            f"{len(asked['train'] & asked['test'])} of the same questions about them."
        )
