"""The run folder: everything that a run leaves behind.

config.yaml         the resolved configuration
data.json           the data files and the fingerprints of what they hold
environment.json    versions, device, code version; environment_NNNNNN.json from where the run was resumed
metrics.jsonl       a line per logged training step and per validation
summary.json        the last validation, throughput and counts, written at the end
pictures/           what the model makes of the first held-out pairs, at each validation: see pictures.py
checkpoints/        step_NNNNNN folders and the best weights: see checkpoint.py
tensorboard/        event files
"""

import contextlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from PIL import Image

import fastm3ae
from fastm3ae.config import RunConfig
from fastm3ae.configfile import to_dict
from fastm3ae.errors import UserError

__all__ = ["RunFolder", "environment", "processor"]

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
        try:
            path.mkdir(parents=True, exist_ok=True)
            is_a_run = (path / "config.yaml").is_file()
            if any(path.iterdir()) and not (is_a_run and config.resume):
                hint = "--resume auto goes on with its run, or " if is_a_run else ""
                raise UserError(f"The run folder {path} is not empty: {hint}choose another --output, or remove it.")
            (path / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
            self._write_json("data.json", data)
            self._write_json(f"environment_{step:06d}.json" if step else "environment.json", environment(device))
            (path / "pictures").mkdir(exist_ok=True)
            self._metrics = _open_metrics(path / "metrics.jsonl", step, is_validated)
        except OSError as error:
            raise UserError(f"The run folder {path} cannot be written: {error.strerror}.") from error
        self._board = None
        if config.train.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not always wanted

            self._board = SummaryWriter(str(path / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl, and the values to TensorBoard.

        Args:
            step: Optimiser steps made so far.
            split: "train" or "val".
            values: Metrics by name.
        """
        self._metrics.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{split}/{name}", value, step)

    def picture(self, step: int, name: str, image: Image.Image) -> Path:
        """Writes a picture as PNG, and to TensorBoard; returns its path."""
        path = self.path / "pictures" / f"{name}_{step:06d}.png"
        image.save(path)
        if self._board is not None:
            from torchvision.transforms.functional import pil_to_tensor

            self._board.add_image(name, pil_to_tensor(image), step)
        return path

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json."""
        self._write_json("summary.json", summary)

    def close(self) -> None:
        """Closes the files."""
        self._metrics.close()
        if self._board is not None:
            self._board.close()

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        (self.path / name).write_text(json.dumps(content, indent=2) + "\n")


def _open_metrics(path: Path, step: int, is_validated: bool) -> TextIO:
    """Returns metrics.jsonl, open for appending, without what will be made again."""

    def is_kept(line: str) -> bool:
        values = json.loads(line) if line.endswith("}\n") else {"step": step + 1}  # a process was killed in this line
        return values["step"] < step or (values["step"] == step and (values["split"] == "train" or is_validated))

    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    partial = path.with_name(f".{path.name}")
    partial.write_text("".join(filter(is_kept, lines)))
    partial.replace(path)
    return path.open("a", buffering=1)


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
