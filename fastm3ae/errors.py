"""What ends a command early: a user's mistake, said in one sentence (what, expected what, where), or a signal."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["BadSample", "Interrupted", "UserError", "nearest"]


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


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the known word that is most like ``word``, or "" when none is."""
    matches = get_close_matches(word, list(known), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""
