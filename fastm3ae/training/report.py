"""A run as one page of HTML that needs nothing else: no other file, no network, no script.

Whatever stands in a run's files is shown as text. The page's own policy forbids scripts and addresses besides.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import fastm3ae
from fastm3ae.config.files import parse_json, read_yaml
from fastm3ae.errors import UserError
from fastm3ae.tasks.evaluation import METRICS_FILE, percent, resampling_text
from fastm3ae.tasks.results import Run, read_results, results_table
from fastm3ae.training.checkpoint import BEST
from fastm3ae.training.describe import size_text
from fastm3ae.training.nonfinite import NONFINITE_FILE
from fastm3ae.training.run_folder import check_run, read_metrics
from fastm3ae.training.saved import checkpoints, damage
from fastm3ae.visualize.curves import COLOURS, NOT_METRICS, control_of, panel_svg, panels, run_names

__all__ = ["write_report"]

MAX_NONFINITE = 50
"""So many steps that were left out are listed; the file has the others."""
CONTROLS = {
    "_shuffled_image": "with another pair's image",
    "_patch_mean": "each patch as its mean",
    "_majority_": "always the most frequent answer",
}
"""What a control is, by a part of its name."""

Table = list[list[str]]
"""Rows of cells; the first row has the columns' names."""


def write_report(folder: Path, output: Path | None = None, evaluations: Sequence[Path] = ()) -> Path:
    """Writes the page, and returns its file.

    Args:
        folder: A run folder; or that of a fine-tuning with several seeds, whose runs are in seed_N below it.
        output: The file; None: report.html in the folder.
        evaluations: Folders of evaluations that do not lie below it.

    Raises:
        UserError: The folder is no run's, one of its files is damaged, or the page cannot be written.
    """
    seeds = [path.parent for path in folder.glob("seed_*/config.yaml")]
    seeds.sort(key=lambda path: (len(path.name), path.name))
    if not seeds or (folder / "config.yaml").is_file():
        check_run(folder)
    runs = [folder] if (folder / "config.yaml").is_file() else seeds
    lines = {name: read_metrics(run) for name, run in zip(run_names(runs), runs, strict=True)}
    tested = [*(run for run in runs if any(run.rglob(METRICS_FILE))), *evaluations]
    found = read_results(tested) if tested else []
    context = {
        "title": folder.resolve().name,
        "folder": str(folder),
        "curves": [Markup(panel_svg(panel, list(lines))) for panel in panels(lines)] if any(lines.values()) else [],
        "curve_runs": list(lines),
        "colours": COLOURS,
        "seeds": _seeds_table([run for run in found if run.file.parent.parent in runs]) if len(runs) > 1 else None,
        "runs": [_run(run, name, of_run) for run, (name, of_run) in zip(runs, lines.items(), strict=True)],
        "evaluations": [_evaluation(run, folder) for run in found],
        "version": fastm3ae.__version__,
        "written": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    output = folder / "report.html" if output is None else output
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Names of files may hold halves of characters, which no file takes as they are.
        output.write_bytes(_render(context).encode(errors="xmlcharrefreplace"))
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}.") from error
    return output


def _render(context: Mapping[str, Any]) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = files("fastm3ae.training").joinpath("report.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(context)


class Picture(NamedTuple):
    """A picture within the page.

    Args:
        title: What stands below it.
        uri: All of it.
    """

    title: str
    uri: str


def _run(folder: Path, name: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what the page says of one run."""
    config = read_yaml(folder / "config.yaml")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.yaml'} is no configuration.")
    summary = _read_json(folder / "summary.json")
    validations = [line for line in lines if line["split"] == "val"]
    last_step = max((line["step"] for line in lines), default=0)
    num_steps = summary.get("steps", _value(config, "train", "num_steps"))
    return {
        "name": name,
        "what": _what(config),
        "state": "complete" if summary else "not complete",
        "progress": f"{summary.get('steps', last_step)} of {num_steps or '?'} steps",
        "facts": [*_facts(folder, config, summary), *_environments(folder)],
        "data": _data(folder),
        "validation": _validation(validations),
        "validations": _all_validations(validations),
        "pictures": _pictures(folder / "pictures"),
        "nonfinite": _nonfinite(folder / NONFINITE_FILE),
        "stalls": [
            (path.name, path.read_text(errors="replace")) for path in sorted(folder.glob("stall_process_*.txt"))
        ],
        "checkpoints": _checkpoints(folder / "checkpoints"),
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
    }


def _what(config: Mapping[str, Any]) -> str:
    """Returns what a run is for, in words."""
    kind = {"m3ae": "M3AE", "mpma": "MPMA", "image": "a vision tower"}.get(_value(config, "model", "kind"), "a model")
    if "task" in config:
        return f"Fine-tuning of {kind} for {str(_value(config, 'task', 'kind')).replace('_', ' ')}"
    return f"Pre-training of {kind}"


def _facts(folder: Path, config: Mapping[str, Any], summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns what one asks first of a run."""
    facts = {
        "objectives": ", ".join(_value(config, "model", "objectives") or []),
        "data sets": ", ".join(_value(config, "data", "datasets") or []),
        "pairs for training, validation": _joined(summary.get("train_pairs"), summary.get("val_pairs")),
        "started from": config.get("init_from"),
        "seed": config.get("seed"),
        "batch size": _value(config, "train", "batch_size"),
        "learning rate": _value(config, "optim", "learning_rate"),
        "processes, items per pass": _joined(summary.get("num_processes"), summary.get("micro_batch")),
        "parameters": summary.get("num_parameters"),
        "samples per second": summary.get("samples_per_s"),
        "time": None if "wall_s" not in summary else f"{summary['wall_s'] / 60:.1f} minutes",
        "steps left out, not finite": summary.get("nonfinite_steps"),
        "items skipped": ", ".join(f"{split} {num}" for split, num in (summary.get("skipped_samples") or {}).items()),
        "folder": str(folder.resolve()),
    }
    return [(name, _number(value)) for name, value in facts.items() if value not in (None, "")]


def _environments(folder: Path) -> list[tuple[str, str]]:
    """Returns where the run was made, each time that it was begun or resumed."""
    facts = []
    for path in sorted(folder.glob("environment*.json"), key=lambda path: (len(path.name), path.name)):
        found, step = _read_json(path), path.stem.removeprefix("environment").strip("_")
        libraries = ", ".join(f"{name} {version}" for name, version in (found.get("libraries") or {}).items())
        code = f"fastm3ae {found.get('fastm3ae')}, commit {found.get('commit') or 'unknown'}"
        where = f"{found.get('device')}, {found.get('platform')}, {found.get('num_threads')} threads"
        since = f" from step {int(step)}" if step.isdigit() else ""
        facts += [(f"code{since}", code), (f"hardware{since}", where)]
        facts.append((f"versions{since}", f"Python {found.get('python')}, {libraries}"))
    return facts


def _data(folder: Path) -> Table:
    """Returns the data files, and what the fingerprints are of."""
    data = _read_json(folder / "data.json")
    fingerprints = dict(data.get("fingerprints") or {})
    rows = [["file", "bytes", "sha256 of what it holds"]]
    for file in data.get("files") or []:
        rows.append([str(file["path"]), f"{file['bytes']:,}", str(fingerprints.pop(Path(file["path"]).name, ""))])
    return rows + [[str(name), "", str(found)] for name, found in fingerprints.items()]


def _validation(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the last validation and the one of the highest score, each metric beside its control."""
    if not lines:
        return []
    last = lines[-1]
    best = max(lines, key=lambda line: line.get("score", float("-inf")))
    names = [name for name in last if name not in NOT_METRICS]
    rows = [["metric", f"last, step {last['step']}", f"best score, step {best['step']}", "control, last", "which is"]]
    for name in names:
        if control_of(name, names) in names:
            continue
        controls = [other for other in names if control_of(other, names) == name]
        means = (next((text for part, text in CONTROLS.items() if part in other), other) for other in controls)
        values = ", ".join(_number(last[other]) for other in controls)
        rows.append([_words(name), _number(last[name]), _number(best.get(name)), values, ", ".join(means)])
    return rows


def _all_validations(lines: Sequence[Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for line in lines for name in line if name != "split"))
    return [[_words(name) for name in names], *([_number(line.get(name)) for name in names] for line in lines)]


def _pictures(folder: Path) -> list[Picture]:
    """Returns the last picture of each name; the others stay in the folder."""
    last: dict[str, Path] = {}
    for path in sorted(folder.glob("*_*.png")):
        last[path.stem.rsplit("_", 1)[0]] = path
    return [
        _picture(path, f"{_words(name)}, step {path.stem.rsplit('_', 1)[1].lstrip('0') or 0}")
        for name, path in last.items()
    ]


def _picture(path: Path, title: str) -> Picture:
    return Picture(title, f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}")


def _nonfinite(path: Path) -> dict[str, Any] | None:
    """Returns the first steps that were left out, and how many there are; None: none was."""
    lines = [parse_json(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if not lines:
        return None
    rows = [["step", "process", "losses", "items"]]
    for line in lines[:MAX_NONFINITE]:
        losses = "; ".join(json.dumps(piece["losses"]) for piece in line["pieces"])
        items = ", ".join(str(item) for piece in line["pieces"] for item in piece["item_ids"])
        rows.append([str(line["step"]), str(line["process"]), losses, items])
    return {"table": rows, "num": len({line["step"] for line in lines}), "num_more": max(0, len(lines) - MAX_NONFINITE)}


def _checkpoints(folder: Path) -> Table:
    rows = [["checkpoint", "size", "state"]]
    rows += [[path.name, size_text(path), damage(path) or "whole"] for _, path in checkpoints(folder)]
    if (folder / BEST).is_dir():
        rows.append([BEST, size_text(folder / BEST), "weights alone, of the highest score"])
    return rows


def _evaluation(run: Run, folder: Path) -> dict[str, Any]:
    """Returns what the page says of an evaluation."""
    about, place = run.about, run.file.parent
    rows = [["metric", "%, with its interval", "items"]]
    rows += [[_words(name), percent(found), f"{found.num_items:,}"] for name, found in run.metrics.items()]
    titles = {"confusion": "expected and predicted classes", "hardest": "the items that went wrong most"}
    pictures = [(title, place / f"{name}.png") for name, title in titles.items()]
    return {
        "title": f"{_words(about['task'])} on {', '.join(about['datasets'])}, {about['split']}",
        "folder": str(place.relative_to(folder) if place.is_relative_to(folder) else place),
        "checkpoint": about["checkpoint"],
        "table": rows,
        "intervals": resampling_text(run.metrics.values(), about["resampling_unit"]),
        "notes": _read_json(run.file).get("notes") or [],
        "pictures": [_picture(path, title) for title, path in pictures if path.is_file()],
    }


def _seeds_table(evaluations: Sequence[Run]) -> Table | None:
    """Returns mean and standard deviation of each metric over the seeds; None: nothing was tested yet."""
    if not evaluations:
        return None
    rows = results_table(evaluations).data["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    seeds = [str(run["seed"]) for row in rows for run in row["runs"]]
    table = [["metric", "mean ± standard deviation, %", *(f"seed {seed}, %" for seed in seeds)]]
    for name in names:
        for row in rows:
            over = row["metrics"].get(name, {"mean": None})
            cell = "-" if over["mean"] is None else f"{100 * over['mean']:.1f}"
            if over.get("standard_deviation") is not None:
                cell += f" ± {100 * over['standard_deviation']:.1f}"
            values = [run["metrics"][name]["value"] for run in row["runs"]]
            table.append([_words(name), cell, *("-" if value is None else f"{100 * value:.1f}" for value in values)])
    return table


def _read_json(path: Path) -> dict[str, Any]:
    """Returns what a file of a run holds; nothing where it is not there yet."""
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no dictionary.")
    return content


def _value(config: Mapping[str, Any], section: str, key: str) -> Any:
    return (config.get(section) or {}).get(key)


def _joined(*values: Any) -> str | None:
    return None if None in values else ", ".join(f"{value:,}" for value in values)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
