"""What ends a command early: a user's mistake, said in one sentence (what, expected what, where), or a signal."""

import reprlib
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

__all__ = ["BadSample", "Interrupted", "UserError", "first_line", "is_text", "listed", "nearest", "printable", "shown"]

LONGEST_VALUE, LONGEST_LIST = 300, 1000
"""Characters of a value and of a list of names in a message."""
TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # make what follows read backwards


class UserError(Exception):
    """A mistake in what the user gave: the command prints its message without a traceback and exits with 2.

    It is no ValueError, because argument parsers turn those into messages of their own.
    """


class BadSample(UserError):
    """One row of a data file cannot be used, for example because its image bytes are corrupt.

    Args:
        file: Path of the file that holds the row.
        row: Zero-based row in that file.
        image_id: The row's image id.
        reason: What is wrong with it, as a part of a sentence ("the image cannot be decoded: ...").
    """

    def __init__(self, file: str, row: int, image_id: str, reason: str) -> None:
        # All arguments reach Exception.__init__, so that the error survives pickling between loader processes.
        super().__init__(file, row, image_id, reason)
        self.file, self.row, self.image_id, self.reason = file, row, image_id, reason

    def __str__(self) -> str:
        return f"{self.file}, row {self.row} (image_id {self.image_id!r}): {self.reason}"


class Interrupted(Exception):
    """A signal ended a run early, after what it had was saved: the command exits with 128 + the signal's number.

    Args:
        message: What was saved and how to go on.
        signal_number: The signal, 2 (SIGINT) or 15 (SIGTERM).
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)
        self.signal_number = signal_number

    def __str__(self) -> str:
        return self.args[0]


def nearest(word: Any, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the known word that is most like ``word``, or "" when none is."""
    matches = get_close_matches(word[:LONGEST_VALUE] if isinstance(word, str) else shown(word), map(str, known), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def is_text(value: str) -> bool:
    """Returns whether a string can be written: JSON and YAML may hold halves of characters, which no file takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """Returns the first line of what a library says of an error, or the error's name where it says nothing."""
    lines = str(error).splitlines() or [""]
    return lines[0].strip() or type(error).__name__


def shown(value: Any) -> str:
    """Returns the ``repr`` of a value that came with a file, cut short where it is long, deep or a huge number."""
    text = _Short().repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def listed(names: Iterable[str]) -> str:
    """Returns names that came with a file with commas between them, cut short where they are many or long."""
    text = ", ".join(names)
    return text if len(text) <= LONGEST_LIST else f"{text[: LONGEST_LIST - 3]}..."


def printable(text: str) -> str:
    """Returns a text in which a terminal finds no commands, wherever its words came from."""
    commands = {c for c in text if unicodedata.category(c) in ("Cc", "Cs") or unicodedata.bidirectional(c) in TURNS}
    return text.translate({ord(c): repr(c)[1:-1] for c in commands - {"\n", "\t"}})


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 200, 200
        self.maxlist = self.maxtuple = self.maxdict = 20

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write out a number of thousands of digits."""
        return str(x) if x.bit_length() <= 256 else f"a number of {x.bit_length()} bits"
