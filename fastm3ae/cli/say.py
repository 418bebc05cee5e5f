"""Sentences on stderr."""

import contextlib
import os
import sys

from fastm3ae.errors import printable

__all__ = ["printable", "say", "warn"]


def warn(message: str) -> None:
    """Prints a warning."""
    say(f"warning: {message}")


def say(message: str, *, each: bool = False) -> None:
    """Prints a sentence on stderr: the first of several processes, or ``each`` that has met the others.

    What goes wrong before they have met goes wrong in all of them.
    """
    message, rank = printable(message), os.environ.get("RANK", "0")
    distributed = sys.modules.get("torch.distributed")  # what was not imported was not initialised either
    with contextlib.suppress(OSError):  # stderr may be a file on a full disk; the exit status still says something
        if each and distributed is not None and distributed.is_initialized():
            print(f"rank {rank}: {message}", file=sys.stderr)
        elif rank == "0":
            print(message, file=sys.stderr)
