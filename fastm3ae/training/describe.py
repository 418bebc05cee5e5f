"""What a run folder or a checkpoint holds, as text."""

import json
from pathlib import Path
from typing import Any

import yaml

from fastm3ae.config.files import to_dict
from fastm3ae.training.checkpoint import BEST
from fastm3ae.training.run_folder import read_metrics
from fastm3ae.training.saved import MANIFEST_FILE, STATE_FILE, checkpoints, damage, load_training_state
from fastm3ae.weights.pretrained import read_about, read_weights

__all__ = ["describe_checkpoint", "describe_run", "size_text"]

NUM_LABELS = 20
"""So many labels of a task are named."""


def describe_run(folder: Path) -> str:
    """Returns a run's progress, last metrics, checkpoints, data, environment and configuration.

    Raises:
        UserError: The folder is no run's, or one of its files is damaged.
    """
    last = {line.pop("split"): line for line in read_metrics(folder)}
    sections = {name: folder / name for name in ("summary.json", "data.json", "environment.json", "config.yaml")}
    lines = [f"{folder}: a run, {'complete' if sections['summary.json'].is_file() else 'not complete'}"]
    lines += [f"last {split}: {_values(values)}" for split, values in last.items()]
    lines += ["", "== checkpoints"]
    for _, path in checkpoints(folder / "checkpoints"):
        lines.append(f"{path.name:<16} {size_text(path):>11}  {damage(path) or 'whole'}")
    if (best := folder / "checkpoints" / BEST).is_dir():
        lines.append(f"{BEST:<16} {size_text(best):>11}  weights alone")
        lines += ["", *task] if (task := _describe_task(best)) else []
    for name, path in sections.items():
        if path.is_file():
            lines += ["", f"== {name}", path.read_text().rstrip()]
    return "\n".join(lines)


def describe_checkpoint(path: Path) -> str:
    """Returns a checkpoint's task and labels, sizes and configuration; of one of a run also where the run stood.

    Raises:
        UserError: There is no such checkpoint, or it can't be read.
    """
    if not (path / STATE_FILE).is_file():
        return "\n".join([*_describe_task(path), *_describe_weights(path)])
    fault = damage(path)
    lines = [f"{path}: {size_text(path)}, {fault or 'whole'}"]
    if fault is None:
        for name, written in json.loads((path / MANIFEST_FILE).read_text())["files"].items():
            lines.append(f"  {name}: {written['bytes']:,} bytes, sha256 {written['sha256']}")
        state = load_training_state(path)
        epoch, batch = state["position"]
        lines.append(
            f"{state['step']} steps were made, by {state['num_processes']} processes of {state['micro_batch']} pairs a "
            f"pass; the next batch is number {batch} of epoch {epoch}"
        )
        lines += [f"{what}: sha256 {fingerprint}" for what, fingerprint in state["fingerprints"].items()]
        lines.append(f"last validation: {_values(state['validation']) or 'none'}")
    return "\n".join([*lines, "", *_describe_task(path), *_describe_weights(path)])


def _describe_task(checkpoint: Path) -> list[str]:
    """Returns, if a checkpoint was fine-tuned, for what, on which data, and what its labels are."""
    about = read_about(checkpoint)[1]
    run = about.get("config", {})
    if "task" not in run:
        return []
    labels, num = about["labels"], len(about["labels"])
    named = ", ".join(labels[:NUM_LABELS]) + f", and {num - NUM_LABELS} more" * (num > NUM_LABELS)
    lines = [f"fine-tuned for {run['task']['kind']} on {', '.join(run['data']['datasets'])}"]
    return lines + [f"{num} labels: {named}"] * bool(labels)


def _describe_weights(path: Path) -> list[str]:
    """Returns what a checkpoint holds: the size of each part, and its configuration."""
    state, config = read_weights(path)
    sizes: dict[str, int] = {}
    for name, tensor in state.items():
        part = name.split(".")[0]
        sizes[part] = sizes.get(part, 0) + tensor.numel()
    lines = [f"{part:<28} {size:>13,} values" for part, size in sizes.items()]
    lines.append(f"{'total':<28} {sum(sizes.values()):>13,} values in {len(state)} tensors")
    if config is None:
        return [*lines, "", "The file does not hold its configuration."]
    return [*lines, "", yaml.safe_dump(to_dict(config), sort_keys=False).rstrip()]


def _values(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def size_text(folder: Path) -> str:
    """Returns how large the files of a folder are."""
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 2**20:,.1f} MiB"
