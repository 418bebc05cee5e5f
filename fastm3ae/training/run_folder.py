"""The run folder: everything that a run leaves behind.

config.yaml         the resolved configuration
data.json           the data files and the fingerprints of what they hold
environment.json    versions, device, code version; environment_NNNNNN.json from where the run was resumed
metrics.jsonl       a line per logged training step and per validation
nonfinite.jsonl     a line per process and step that was left out, if there was any: see nonfinite.py
stall_process_R.txt where process R stood when it was ended for making no progress: see watchdog.py
summary.json        the last validation, throughput and counts, written at the end
pictures/           what the model makes of the first held-out pairs, at each validation: see pictures.py
checkpoints/        step_NNNNNN folders and the best weights: see checkpoint.py
tensorboard/        event files
wandb.json, wandb/  which run of Weights & Biases this is, and its files, if it is one
"""

import contextlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from PIL import Image
from tqdm import tqdm

import fastm3ae
from fastm3ae.config import RunConfig
from fastm3ae.config.files import parse_json, to_dict
from fastm3ae.errors import UserError, first_line
from fastm3ae.training.boards import Board, open_boards
from fastm3ae.training.nonfinite import NONFINITE_FILE

__all__ = ["RunFolder", "check_run", "environment", "processor", "read_metrics"]

LIBRARIES = ("torch", "torchvision", "transformers", "timm", "triton", "numpy", "pillow", "pyarrow", "safetensors",
             "scikit-learn")  # fmt: skip


class RunFolder:
    """Writes a run's files.

    Args:
        config: The resolved configuration.
        data: What the run reads, for data.json.
        device: Where the run computes.
        step: Steps that were made before; metrics of later ones are cut off, because they will be made again.
        is_validated: Whether the validation after these steps was made before, too.

    Raises:
        UserError: The folder can't be written, or is not empty although the run does not resume.
    """

    def __init__(
        self,
        config: RunConfig,
        data: Mapping[str, Any],
        device: torch.device,
        step: int = 0,
        is_validated: bool = False,
    ) -> None:
        self.path = path = Path(config.output)
        self._boards: list[Board] = []
        self._files = contextlib.ExitStack()
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
            is_a_run = (path / "config.yaml").is_file()
            if any(path.iterdir()) and not (is_a_run and config.resume):
                hint = "--resume auto goes on with its run, or " if is_a_run else ""
                raise UserError(f"The run folder {path} is not empty: {hint}choose another --output, or remove it.")
            for board in open_boards(config, step):
                self._boards.append(self._files.enter_context(contextlib.closing(board)))
            (path / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
            self._write_json("data.json", data)
            self._write_json(f"environment_{step:06d}.json" if step else "environment.json", environment(device))
            (path / "pictures").mkdir(exist_ok=True)
            self._metrics = self._files.enter_context(_open_metrics(path / "metrics.jsonl", step, is_validated))
            if (path / NONFINITE_FILE).exists():
                _keep_lines(path / NONFINITE_FILE, lambda line: line["step"] <= step)

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl, and shows the values on the boards.

        Args:
            step: Optimiser steps made so far.
            split: "train" or "val".
            values: Metrics by name.

        Raises:
            UserError: The folder can't be written any more, as on a full disk; so do all methods.
        """
        with _writing(self.path):
            self._metrics.write(json.dumps({"step": step, "split": split, **values}) + "\n")
            for board in self._boards:
                board.scalars({f"{split}/{name}": value for name, value in values.items()}, step)

    def log_nonfinite(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends what is known of steps that were left out to nonfinite.jsonl, and says so."""
        path = self.path / NONFINITE_FILE
        with _writing(self.path), path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        steps = sorted({line["step"] for line in lines})
        tqdm.write(
            f"warning: {len(steps)} of the last steps changed nothing, the first of them step {steps[0]}: losses or "
            f"gradients were not finite; {path} names the items"
        )

    def picture(self, step: int, name: str, image: Image.Image) -> Path:
        """Writes a picture as PNG, and shows it on the boards; returns its path."""
        path = self.path / "pictures" / f"{name}_{step:06d}.png"
        with _writing(self.path):
            image.save(path)
            for board in self._boards:
                board.picture(name, path, step)
        return path

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json."""
        with _writing(self.path):
            self._write_json("summary.json", summary)

    def close(self) -> None:
        """Closes the files."""
        with _writing(self.path):
            self._files.close()

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        _replace(self.path / name, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Says in a sentence why a run folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"The run folder {path} cannot be written: {error.strerror or error}.") from error


def _replace(path: Path, text: str) -> None:
    """Writes a file that nobody sees half written."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    partial.replace(path)


def _open_metrics(path: Path, step: int, is_validated: bool) -> TextIO:
    """Returns metrics.jsonl, open for appending, without what will be made again."""

    def is_kept(line: Mapping[str, Any]) -> bool:
        return line["step"] < step or (line["step"] == step and (line["split"] == "train" or is_validated))

    _keep_lines(path, is_kept)
    return path.open("a", buffering=1)


def _keep_lines(path: Path, is_kept: Callable[[Mapping[str, Any]], bool]) -> None:
    """Removes the other lines of a file, and a last one in which a process was killed."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    _replace(path, "".join(line for line in lines if line.endswith("}\n") and is_kept(json.loads(line))))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a run's metrics.jsonl: step, split and metrics; none where it has not begun.

    Raises:
        UserError: The folder is no run's, or a line is none of a run.
    """
    check_run(folder)
    path = folder / "metrics.jsonl"
    lines = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True) if path.is_file() else [], 1):
        if not line.endswith("}\n"):  # a process was killed in it, or is writing it
            continue
        try:
            lines.append(parse_json(line))
            if not {"step", "split"} <= lines[-1].keys():
                raise ValueError("it has no step and split")
        except ValueError as error:
            raise UserError(f"{path} is damaged in line {number}: {first_line(error)}.") from None
    return lines


def check_run(folder: Path) -> None:
    """Raises a UserError if a folder is no run's."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml.")


def environment(device: torch.device) -> dict[str, Any]:
    """Returns the versions and the hardware that a run's numbers depend on."""
    versions = {}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # triton exists on Linux only
            versions[library] = importlib.metadata.version(library)
    return {
        "fastm3ae": fastm3ae.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "num_threads": torch.get_num_threads(),
    }


def processor() -> str:
    """Returns the CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux's; other systems know it by themselves
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "cpu"


def _commit() -> str | None:
    """Returns the checkout's commit, marked where files differ from it; None outside a checkout."""
    root = Path(fastm3ae.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:  # git is not installed
        return None
    return described.stdout.strip() or None
