"""Files of ``torch.save``, which are pickles: read without running what stands in them, and no larger than they are."""

import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastm3ae.errors import UserError, first_line, listed

__all__ = ["check_state", "load_torch"]

MOST_SHARED = 4
"""Tensors may share what is stored; together they may claim so many times a file's size."""
FREE_BYTES = 2**20
"""What they may claim beside that."""


class _Inert:
    """Stands for an object in a file that is of no use here; whatever was pickled about it is dropped."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_torch(path: Path, inert: tuple[str, ...] = ()) -> Any:
    """Returns what a file holds: tensors on the CPU, and Python's plain types.

    Args:
        path: The file.
        inert: Classes of packages whose names begin so are read as objects without content.

    Raises:
        UserError: The file cannot be read, unpacks to more than its size, or holds an object of another class or
            anything that would be called.
    """
    try:
        foreign: list[str] = []
        if zipfile.is_zipfile(path):  # the others are torch's old format, in which weights_only finds them
            _check_unpacked(path)
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        refused = sorted(name for name in foreign if not name.startswith(inert))
        if refused:
            raise UserError(f"{path} is refused: it holds objects that a checkpoint has no use for: {listed(refused)}.")
        with torch.serialization.safe_globals([(_Inert, name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises many types for a broken file; its first line says what was wrong
        raise UserError(f"{path} is not a readable checkpoint: {first_line(error)}") from error


def check_state(state: Any, path: Path) -> None:
    """Raises a UserError unless a state dict is one of plain tensors that the file really holds.

    Args:
        state: What should be a state dict.
        path: The file that it is from.
    """
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path} holds no state dict: expected a dictionary of tensors.")
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            raise UserError(f"{path} holds no state dict: {listed([name])} is no tensor of numbers.")
    claimed = sum(math.prod(tensor.shape) * tensor.element_size() for tensor in state.values())
    if claimed > MOST_SHARED * path.stat().st_size + FREE_BYTES:
        raise UserError(f"{path} is damaged: its tensors claim {claimed} bytes, but it has {path.stat().st_size}.")


def _check_unpacked(path: Path) -> None:
    """Raises a ValueError if an archive unpacks to more than its size: torch's own are not compressed."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > path.stat().st_size:
        raise ValueError(f"it has {path.stat().st_size} bytes and unpacks to {unpacked}")
