"""What an evaluation leaves behind.

metrics.json         each metric with its interval, the notes, and what was evaluated: see About
results.md           the same to read
predictions.csv      a row for each item
predictions.jsonl    the same rows, a line of JSON each; unlike the CSV file it tells "" from nothing and "1" from 1
confusion.png        which classes are predicted for which, where the task has classes
hardest.png          the items that went wrong most, where the task draws some
"""

import csv
import errno
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from fastm3ae.errors import UserError
from fastm3ae.tasks.confusion import confusion_png
from fastm3ae.tasks.metrics import Interval
from fastm3ae.visualize import case_sheet

__all__ = [
    "METRICS_FILE",
    "About",
    "Evaluation",
    "digest",
    "make_folder",
    "markdown_table",
    "options_text",
    "percent",
    "resampling_text",
    "write_evaluation",
]

METRICS_FILE = "metrics.json"
# In the order in which they appear: who finds metrics.json finds the rest.
FILES = ("predictions.csv", "predictions.jsonl", "confusion.png", "hardest.png", "results.md", METRICS_FILE)


class About(TypedDict):
    """What was evaluated, of types that JSON knows: everything that says whether two results may be compared."""

    task: str
    """Name of the task: "vqa"."""
    datasets: list[str]
    """Names of the data sets."""
    split: str
    """Which split: "test"."""
    configuration: dict[str, Any]
    """The whole configuration of the training (``config.files.to_dict``)."""
    seed: int
    """Seed of the training."""
    options: dict[str, Any]
    """In what the evaluation differs from the training: another size of images, fewer candidates."""
    checkpoint: str
    """Where the weights were read from."""
    weights_were_random: bool
    """Whether all that came before this repository's own training was random weights, none of them published ones."""
    fingerprints: dict[str, str]
    """SHA-256 of what each data file holds (``PairDataset.fingerprints``)."""
    preparation: dict[str, dict[str, Any]]
    """With which options each data file was prepared (``ArrowTable.facts``): which splits, whose answers are labels."""
    labels: list[str]
    """Names of the classes, in their order; empty for a task without classes."""
    resampling_unit: str
    """What a group of the bootstrap is: "image"."""
    environment: dict[str, Any]
    """Versions, with at least "fastm3ae" and "commit" (``run_folder.environment``)."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a model does on a split, item by item.

    Args:
        metrics: Numbers by name, all of them shares (or differences of shares), which are shown in percent.
        predictions: A row for each item: its ids, texts, what was expected and predicted, probability, score; plain
            values of Python.
        confusion: The names of the expected and of the predicted classes, an entry for each item.
        hardest: Images (3, H, W) in [0, 1], all of one size, with lines of text, the worst first.
        notes: What a reader must know, a sentence each: what was left out, for example.
    """

    metrics: Mapping[str, Interval]
    predictions: Sequence[Mapping[str, str | int | float | bool | None]]
    confusion: tuple[Sequence[str], Sequence[str]] | None = None
    hardest: Sequence[tuple[Tensor, Sequence[str]]] = ()
    notes: Sequence[str] = ()


def write_evaluation(evaluation: Evaluation, folder: Path | str, about: About) -> None:
    """Writes an evaluation's files into a folder, each of them at once, in place of those of an earlier one.

    Other files of the folder stay. A file that only the earlier evaluation had is removed.

    Args:
        evaluation: What was found.
        folder: Where to; it need not exist.
        about: What was evaluated.

    Raises:
        UserError: A prediction is not finite, or the folder cannot be written.
        ValueError: ``about`` lacks a key.
    """
    folder = Path(folder)
    if missing := About.__required_keys__ - about.keys():
        raise ValueError(f"about must have every key of About, it lacks {', '.join(sorted(missing))}.")
    _check_finite(evaluation.predictions)
    contents = {
        "predictions.csv": _csv(evaluation.predictions).encode(),
        "predictions.jsonl": "".join(
            json.dumps(dict(row), ensure_ascii=False) + "\n" for row in evaluation.predictions
        ).encode(),
        METRICS_FILE: (json.dumps(_summary(evaluation, about), ensure_ascii=False, indent=2) + "\n").encode(),
        "results.md": _report(evaluation, about).encode(),
    }
    if evaluation.confusion is not None:
        contents["confusion.png"] = confusion_png(*evaluation.confusion)
    if evaluation.hardest:
        png = io.BytesIO()
        case_sheet(evaluation.hardest).save(png, "PNG")
        contents["hardest.png"] = png.getvalue()
    make_folder(folder)
    try:
        for name in FILES:
            if name in contents:
                _replace(folder / name, contents[name])
            else:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written: {error.strerror}.") from error


def make_folder(folder: Path) -> None:
    """Makes the folder of an evaluation, unless it is there.

    Raises:
        UserError: It cannot be made or written into.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written: {error.strerror}.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"The folder {folder} cannot be written: {os.strerror(errno.EACCES)}.")


def percent(interval: Interval) -> str:
    """Returns the value in percent with its bounds: "71.2 (67.0 to 75.1)"; "-" where it is not defined."""
    if interval.value is None:
        return "-"
    bounds = "" if interval.low is None else f" ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
    return f"{100 * interval.value:.1f}{bounds}"


def markdown_table(rows: Sequence[Sequence[str]], num_text_columns: int = 1) -> list[str]:
    """Returns the lines of a Markdown table; its first row holds the columns' names, its first columns text."""
    lines = [f"| {' | '.join(' '.join(cell.split()).replace('|', '&#124;') for cell in row)} |" for row in rows]
    sides = ["---"] * num_text_columns + ["---:"] * (len(rows[0]) - num_text_columns)
    return [lines[0], f"| {' | '.join(sides)} |", *lines[1:]]


def options_text(options: Mapping[str, Any]) -> str:
    """Returns options as "answers=train, val=patients"."""
    return ", ".join(f"{name}={value}" for name, value in options.items())


def resampling_text(metrics: Iterable[Interval], unit: str) -> str:
    """Returns how the bounds were found: "95 % intervals by 1,000 resamples of whole images"."""
    ways = dict.fromkeys((found.confidence, found.num_resamples) for found in metrics if found.low is not None)
    texts = [f"{100 * confidence:g} % intervals by {num:,} resamples of whole {unit}s" for confidence, num in ways]
    return "; ".join(texts) or "no intervals"


def digest(labels: Sequence[str]) -> str:
    """Returns a SHA-256 of the classes' names in their order."""
    return hashlib.sha256(json.dumps(list(labels)).encode()).hexdigest()


def _summary(evaluation: Evaluation, about: About) -> dict[str, Any]:
    """Returns the content of metrics.json."""
    return {
        "metrics": {name: interval._asdict() for name, interval in evaluation.metrics.items()},
        "notes": list(evaluation.notes),
        "about": about,
    }


def _report(evaluation: Evaluation, about: About) -> str:
    """Returns the content of results.md."""
    unit = about["resampling_unit"]
    rows = [["metric", "%", "interval", "items", f"groups ({unit})", "resamples", "left out"]]
    for name, found in evaluation.metrics.items():
        bounds = "-" if found.low is None else f"{100 * found.low:.1f} to {100 * found.high:.1f}"
        value = "not defined" if found.value is None else f"{100 * found.value:.1f}"
        counts = (found.num_items, found.num_groups, found.num_resamples, found.num_left_out)
        rows.append([name, value, bounds, *map(str, counts)])
    pictures = {"confusion": evaluation.confusion is not None, "hardest": bool(evaluation.hardest)}
    environment, labels = about["environment"], about["labels"]
    facts = {
        "checkpoint": about["checkpoint"] + ", from random weights" * about["weights_were_random"],
        "seed": about["seed"],
        "version": f"{environment['fastm3ae']}, commit {environment['commit']}",
        **({"options": options_text(about["options"])} if about["options"] else {}),
        **({"labels": f"{len(labels)}, sha256 {digest(labels)}"} if labels else {}),
        **{f"data {file}": f"sha256 {found}" for file, found in about["fingerprints"].items()},
        **{f"preparation of {file}": options_text(options) for file, options in about["preparation"].items()},
    }
    lines = [
        f"# {about['task']} on {', '.join(about['datasets'])}, {about['split']}",
        "",
        *markdown_table(rows),
        "",
        f"{resampling_text(evaluation.metrics.values(), unit)}; left out: those in which the metric is not defined.",
        "",
        *(f"- {note}" for note in evaluation.notes),
        *([""] if evaluation.notes else []),
        *(f"![{name}]({name}.png)\n" for name, is_drawn in pictures.items() if is_drawn),
        *(f"- {name}: {value}" for name, value in facts.items()),
    ]
    return "\n".join([*lines, ""])


def _check_finite(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises a UserError that names the first number that is none."""
    for number, row in enumerate(rows):
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                item = ", ".join(f"{name} {row[name]!r}" for name in list(row)[:2])
                raise UserError(
                    f"Prediction {number} ({item}) has the {key} {value}, expected a finite number: the model's "
                    "weights or outputs are not finite."
                )


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as CSV (RFC 4180); a row that lacks a column has nothing there."""
    text = io.StringIO(newline="")
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
