"""The table of several evaluations, as a paper could take it: one row for each configuration, over its seeds."""

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastm3ae.config.files import differences
from fastm3ae.errors import UserError
from fastm3ae.tasks.evaluation import (
    METRICS_FILE,
    About,
    digest,
    markdown_table,
    options_text,
    percent,
    resampling_text,
)
from fastm3ae.tasks.metrics import Interval

__all__ = ["ResultsTable", "Run", "read_results", "results_table"]

NOT_COMPARED = ("seed", "output", "resume", "force_resume")
"""What of a configuration does not make another row."""
NUM_DIGITS = 12  # of a hash in Markdown
MAX_NAMED = 5  # labels in an error


@dataclass(frozen=True)
class Run:
    """One evaluation.

    Args:
        file: Its metrics.json.
        about: What was evaluated.
        metrics: Its metrics.
    """

    file: Path
    about: About
    metrics: dict[str, Interval]

    def row_key(self) -> str:
        """Returns what all runs of a row have in common, as text."""
        about = self.about
        configuration = {key: value for key, value in about["configuration"].items() if key not in NOT_COMPARED}
        same = ("task", "datasets", "split", "options", "weights_were_random")
        parts = [*(about[name] for name in same), configuration]
        return json.dumps(parts, sort_keys=True)


class ResultsTable(NamedTuple):
    """Results as text and as data.

    Args:
        markdown: A table for each task, with what its rows stand for below.
        data: The same and everything that the table shortens or leaves out, of types that JSON knows.
    """

    markdown: str
    data: dict[str, Any]


def read_results(paths: Sequence[Path | str]) -> list[Run]:
    """Returns the evaluations in folders and in the folders below them.

    Args:
        paths: Folders, or files metrics.json.

    Raises:
        UserError: A path does not exist or holds no evaluation, or a file is none's.
    """
    files: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path} does not exist; expected the folder of an evaluation.")
        found = [path] if path.is_file() else sorted(path.rglob(METRICS_FILE))
        if not found:
            raise UserError(f"There is no {METRICS_FILE} in {path} or below it; `fastm3ae evaluate` writes one.")
        files |= {file.resolve(): file for file in found}
    return [_read(file) for file in files.values()]


def results_table(runs: Sequence[Run]) -> ResultsTable:
    """Returns a table with a row for each configuration: all of the evaluation, and all of the training but its seed.

    A row of several seeds has the mean and the sample standard deviation (divided by the number of seeds minus one), a
    row of one seed the value with its interval. Rows are in the order in which the runs are given.

    Args:
        runs: At least one.

    Raises:
        UserError: Two runs of a row have the same seed, or are not about the same items, labels and metrics.
    """
    rows: dict[str, list[Run]] = {}
    for run in runs:
        rows.setdefault(run.row_key(), []).append(run)
    for row in rows.values():
        _check_row(row)
    data = [_row_data(row) for row in rows.values()]
    return ResultsTable(_markdown(list(rows.values()), data), {"rows": data})


def _read(file: Path) -> Run:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}.") from None
    about = _section(file, content, "about", About.__required_keys__)
    _section(file, about, "environment", {"fastm3ae", "commit"})
    try:
        metrics = {name: Interval(**values) for name, values in _section(file, content, "metrics").items()}
    except TypeError as error:
        raise UserError(f"{file} holds a metric that is none of this version: {error}.") from None
    return Run(file, about, metrics)


def _section(file: Path, content: Any, name: str, keys: Collection[str] = ()) -> dict[str, Any]:
    """Returns a section of what a file holds, after a look at its keys."""
    values = content.get(name) if isinstance(content, dict) else None
    if not isinstance(values, dict):
        raise UserError(f"{file} is no evaluation's: it has no section {name!r}.")
    if missing := sorted(set(keys) - values.keys()):
        raise UserError(f"{file} lacks {', '.join(missing)} in {name!r}; evaluate again with this version.")
    return values


def _check_row(row: Sequence[Run]) -> None:
    """Raises a UserError that names the first two runs that do not belong into one row, and why."""
    first = row[0]
    for number, run in enumerate(row):
        for other in row[:number]:
            if run.about["seed"] == other.about["seed"]:
                raise UserError(
                    f"{other.file} and {run.file} are of one configuration and one seed, {run.about['seed']} "
                    f"(checkpoints {other.about['checkpoint']} and {run.about['checkpoint']}); give one of them."
                )
        if run.about["labels"] != first.about["labels"]:
            raise UserError(f"{first.file} and {run.file} have other labels: {_unlike_labels(first, run)}.")
        for what, values in {
            "data": (first.about["fingerprints"], run.about["fingerprints"]),
            "resampling units": (first.about["resampling_unit"], run.about["resampling_unit"]),
            "metrics": (list(first.metrics), list(run.metrics)),
            "numbers of items": (_num_items(first.metrics), _num_items(run.metrics)),
        }.items():
            if values[0] != values[1]:
                raise UserError(
                    f"{first.file} and {run.file} are of one configuration but have other {what}: {values[0]} and "
                    f"{values[1]}; expected the same for every seed."
                )


def _unlike_labels(first: Run, second: Run) -> str:
    names, others = first.about["labels"], second.about["labels"]
    texts = [f"{len(names)} (sha256 {digest(names)}) and {len(others)} (sha256 {digest(others)})"]
    for run, only in ((first, [n for n in names if n not in others]), (second, [n for n in others if n not in names])):
        if only:
            dots = ", ..." if len(only) > MAX_NAMED else ""
            texts.append(f"only {run.file} has {', '.join(map(repr, only[:MAX_NAMED]))}{dots}")
    return "; ".join(texts if len(texts) > 1 else [*texts, "the same names in another order"])


def _num_items(metrics: Mapping[str, Interval]) -> dict[str, int]:
    return {name: found.num_items for name, found in metrics.items()}


def _row_data(row: Sequence[Run]) -> dict[str, Any]:
    """Returns a row with all that is known of it."""
    about = row[0].about
    same = ("task", "datasets", "split", "options", "weights_were_random", "fingerprints", "labels", "resampling_unit")
    return {
        **{name: about[name] for name in same},
        "labels_sha256": digest(about["labels"]),
        "configuration": {key: value for key, value in about["configuration"].items() if key not in NOT_COMPARED},
        "metrics": {name: _over_seeds([run.metrics[name].value for run in row]) for name in row[0].metrics},
        "runs": [
            {
                "file": str(run.file),
                **{name: run.about[name] for name in ("seed", "checkpoint", "preparation", "environment")},
                "metrics": {name: found._asdict() for name, found in run.metrics.items()},
            }
            for run in row
        ],
    }


def _over_seeds(values: Sequence[float | None]) -> dict[str, float | None]:
    """Returns mean and sample standard deviation; None where they are not defined."""
    if None in values:
        return {"mean": None, "standard_deviation": None}
    return {
        "mean": statistics.fmean(values),
        "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
    }


def _markdown(rows: Sequence[Sequence[Run]], data: Sequence[Mapping[str, Any]]) -> str:
    lines: list[str] = []
    for task in dict.fromkeys(values["task"] for values in data):
        numbers = [number for number, values in enumerate(data) if values["task"] == task]
        metrics = list(dict.fromkeys(name for number in numbers for name in data[number]["metrics"]))
        table = [["", "data", "split", "configuration", *(name.replace("_", " ") for name in metrics)]]
        below = []
        for number in numbers:
            values, runs = data[number], rows[number]
            cells = [_cell(name, values, runs) for name in metrics]
            others = [data[other]["configuration"] for other in numbers if _is_beside(data[other], values)]
            name = _configuration_text(values, others)
            table.append([f"[{number + 1}]", ", ".join(values["datasets"]), values["split"], name, *cells])
            below.append(f"- [{number + 1}]: {_provenance(values, runs)}")
        lines += [f"## {task}", "", *markdown_table(table, num_text_columns=4), "", *below, ""]
    several = "In percent; mean ± sample standard deviation over seeds, or of one seed the value and its interval."
    return "\n".join(["# Results", "", several, "", *lines])


def _cell(name: str, values: Mapping[str, Any], runs: Sequence[Run]) -> str:
    if name not in values["metrics"]:
        return ""
    if len(runs) == 1:
        return percent(runs[0].metrics[name])
    over = values["metrics"][name]
    return "-" if over["mean"] is None else f"{100 * over['mean']:.1f} ± {100 * over['standard_deviation']:.1f}"


def _is_beside(other: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Returns whether two rows are to be compared with each other."""
    return all(other[name] == values[name] for name in ("task", "datasets", "split"))


def _configuration_text(values: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """Returns in what a configuration differs from those beside it, and in what its evaluation from its training."""
    own = values["configuration"]
    unlike = {key: pair[0] for other in others for key, pair in differences(own, other).items()}
    texts = [f"{key}={value}" for key, value in unlike.items()]
    texts += [f"evaluated with {options_text(values['options'])}"] if values["options"] else []
    return ", ".join(texts + ["from random weights"] * values["weights_were_random"])


def _provenance(values: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """Returns what a reader must know to compare a row with others."""
    names_of: dict[int, list[str]] = {}
    for name, num in _num_items(runs[0].metrics).items():
        names_of.setdefault(num, []).append(name.replace("_", " "))
    items = [f"{num} items" + f" ({', '.join(names)})" * (len(names_of) > 1) for num, names in names_of.items()]
    labels = f"{len(values['labels'])} labels, sha256 {values['labels_sha256'][:NUM_DIGITS]}"
    prepared = {options_text(options) for run in runs for options in run.about["preparation"].values()}
    versions = {f"fastm3ae {env['fastm3ae']}, commit {env['commit']}" for env in (r.about["environment"] for r in runs)}
    seeds = sorted(run.about["seed"] for run in runs)
    parts = [
        f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}",
        *items,
        *(f"{file}, sha256 {found[:NUM_DIGITS]}" for file, found in values["fingerprints"].items()),
        *([labels] if values["labels"] else []),
        *(f"prepared with {options}" for options in sorted(filter(None, prepared))),
        resampling_text((found for run in runs for found in run.metrics.values()), values["resampling_unit"]),
        *sorted(versions),
    ]
    return "; ".join(parts)
