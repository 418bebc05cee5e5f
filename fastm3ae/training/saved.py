"""Reading checkpoints: which there are, whether they are whole, and what they hold."""

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fastm3ae.errors import UserError, first_line

__all__ = [
    "MANIFEST_FILE",
    "PARTS",
    "STATE_FILE",
    "causes_of",
    "checkpoints",
    "damage",
    "size_and_hash",
    "load_training_state",
    "newest_whole",
    "part_sizes",
    "read_own",
    "read_parts",
]

STATE_FILE, MANIFEST_FILE, PARTS = "training_state.json", "checkpoint.json", "parts"

# A process that trains alone wants just that.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Returns the steps and folders of a run's checkpoints, oldest first."""
    found = ((path.name.removeprefix("step_"), path) for path in folder.glob("step_*"))
    return sorted((int(step), path) for step, path in found if step.isdigit())


def damage(checkpoint: Path) -> str | None:
    """Returns what is wrong with a checkpoint's files, None if they are as they were written."""
    name = MANIFEST_FILE
    try:
        files = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
        for name, written in files.items():
            size = (checkpoint / name).stat().st_size
            if size != written["bytes"]:
                return f"{name} has {size} of {written['bytes']} bytes"
            if size_and_hash(checkpoint / name) != written:
                return f"{name} has another content than was written"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST_FILE} is damaged"
    return None


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """Returns a run's newest checkpoint that is whole, and a note on each damaged one that is newer.

    Raises:
        UserError: There are checkpoints, but none is whole.
    """
    for old in folder.glob(".step_*.old"):  # a process was killed just when it put another in its place
        final = folder / old.stem.removeprefix(".")
        if not final.exists():
            os.replace(old, final)
    notes = []
    for _, path in reversed(checkpoints(folder)):
        fault = damage(path)
        if fault is None:
            return path, notes
        notes.append(f"{path} is damaged and passed over: {fault}.")
    if notes:
        raise UserError(f"No checkpoint in {folder} is whole: {' '.join(notes)}")
    return None, notes


def load_training_state(checkpoint: Path) -> dict[str, Any]:
    """Returns what was saved beside weights and parts; ``damage`` must have found nothing.

    Raises:
        UserError: The file says something else than a run's state.
    """
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{checkpoint / STATE_FILE} cannot be read: {error}.") from error
    if not isinstance(state, dict) or "step" not in state:
        raise UserError(f"{checkpoint / STATE_FILE} is not the state of a training run.")
    return state


def part_sizes(checkpoint: Path) -> dict[str, torch.Size]:
    """Returns the sizes of the tensors that the processes saved as parts, by name.

    Raises:
        UserError: The parts cannot be read, or are not whole.
    """
    return {name: tensor.size for name, tensor in _saved(checkpoint).items()}


def read_parts(checkpoint: Path, into: Mapping[str, Tensor]) -> None:
    """Reads saved tensors into those of the same names and sizes; of divided ones, the part that is here.

    Raises:
        UserError: The parts cannot be read.
    """
    with _explained(checkpoint):
        dcp.load(dict(into), storage_reader=_reader(checkpoint), no_dist=True)


def read_own(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """Returns the saved tensors whose names begin with a prefix, by the rest of the name, on the CPU.

    Raises:
        UserError: The parts cannot be read, or are not whole.
    """
    saved = _saved(checkpoint).items()
    own = {name: torch.empty(of.size, dtype=of.properties.dtype) for name, of in saved if name.startswith(prefix)}
    read_parts(checkpoint, own)
    return {name.removeprefix(prefix): tensor for name, tensor in own.items()}


def _saved(checkpoint: Path) -> Mapping[str, TensorStorageMetadata]:
    with _explained(checkpoint):
        saved = _reader(checkpoint).read_metadata().state_dict_metadata
        for name, tensor in saved.items():  # so that no tensor claims more memory than there is a file for
            if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
                raise ValueError(f"{name} is not whole")
    return saved


def _reader(checkpoint: Path) -> HuggingFaceStorageReader:
    return HuggingFaceStorageReader(str(checkpoint / PARTS))


@contextlib.contextmanager
def _explained(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except (Exception, CheckpointException) as error:  # many types, of damaged files and of such as nobody wrote
        raise UserError(f"{checkpoint / PARTS} cannot be read: {first_line(causes_of(error)[0])}") from error


def causes_of(error: BaseException) -> list[BaseException]:
    """Returns what went wrong in each process."""
    return [failure[0] for failure in error.failures.values()] if isinstance(error, CheckpointException) else [error]


def size_and_hash(path: Path) -> dict[str, Any]:
    """Returns the size and the SHA-256 of a file, as the manifest has them."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in _blocks(file):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _blocks(file: Any, size: int = 2**20) -> Iterator[bytes]:
    return iter(lambda: file.read(size), b"")
