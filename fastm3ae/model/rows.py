"""Rows of packed sequences: where each sequence stands, and which rows are meant; from the host to the device."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = ["Index", "Layout", "Rows", "ranges", "rows_of", "send"]


@dataclass
class Index:
    """Numbers that are made on the host and used on the device.

    Attributes:
        array: The numbers.
        tensor: The same as int32 on the device, after ``send``.
    """

    array: np.ndarray
    tensor: Tensor | None = None


def send(indices: Sequence[Index], device: torch.device, into: Tensor | None = None) -> Tensor:
    """Copies all of them to the device at once, and returns them joined.

    Args:
        indices: The numbers.
        device: Where to.
        into: The joined ones of an earlier call with as many numbers, to be overwritten; None: a new tensor.
    """
    sizes = [len(index.array) for index in indices]
    host = torch.from_numpy(np.concatenate([index.array for index in indices]).astype(np.int32))
    if device.type == "cuda":
        host = host.pin_memory()
    joined = host.to(device, non_blocking=True) if into is None else into.copy_(host, non_blocking=True)
    for index, tensor in zip(indices, joined.split(sizes), strict=True):
        index.tensor = tensor
    return joined


@dataclass(frozen=True)
class Layout:
    """Sequences whose tokens stand one after another.

    Args:
        lengths: Tokens of each sequence.

    Attributes:
        ends: Behind which row each of them ends, with a 0 in front.
        num_tokens: Tokens of all sequences.
        max_length: No sequence has more tokens. A multiple of 16, so that it seldom differs from batch to batch.
    """

    lengths: np.ndarray
    ends: Index = field(init=False)
    num_tokens: int = field(init=False)
    max_length: int = field(init=False)

    def __post_init__(self) -> None:
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        object.__setattr__(self, "ends", Index(ends))
        object.__setattr__(self, "num_tokens", int(ends[-1]))
        object.__setattr__(self, "max_length", -(-int(self.lengths.max(initial=0)) // 16) * 16)

    @property
    def offsets(self) -> Tensor:
        """(number of sequences + 1,) int32: where each begins; the last is the number of tokens."""
        return self.ends.tensor

    def rows(self, sequences: np.ndarray) -> np.ndarray:
        """Returns the rows of these sequences, one sequence after another."""
        return ranges(self.ends.array[sequences], self.lengths[sequences])


@dataclass(frozen=True)
class Rows:
    """Some rows of a stream: a range, or single ones.

    Args:
        first: The range's first row.
        last: The row behind it.
        index: Single rows, instead.
    """

    first: int = 0
    last: int = 0
    index: Index | None = None

    def __len__(self) -> int:
        return self.last - self.first if self.index is None else len(self.index.array)

    def of(self, x_SD: Tensor) -> Tensor:
        """Returns these rows."""
        if self.index is not None:
            return x_SD.index_select(0, self.index.tensor)
        return x_SD if (self.first, self.last) == (0, len(x_SD)) else x_SD[self.first : self.last]


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns start, start + 1, ... of each range, one range after another."""
    skipped = np.cumsum(lengths) - lengths
    return np.repeat(starts - skipped, lengths) + np.arange(lengths.sum())


def rows_of(rows: np.ndarray) -> Rows:
    """These rows: a range, if they are one."""
    if len(rows) == 0:
        return Rows()
    first, last = int(rows[0]), int(rows[0]) + len(rows)
    return Rows(first, last) if np.array_equal(rows, np.arange(first, last)) else Rows(index=Index(rows))
