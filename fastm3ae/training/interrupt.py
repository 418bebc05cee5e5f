"""Ctrl-C and SIGTERM: finish the step, save, then end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from tqdm import tqdm

__all__ = ["StopRequest"]


class StopRequest:
    """While entered, notes the first SIGINT or SIGTERM instead of dying from it; the second one acts as usual.

    Args:
        is_quiet: Whether nothing is printed then.
    """

    def __init__(self, is_quiet: bool = False) -> None:
        self.is_quiet = is_quiet
        self._noted: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    @property
    def signal(self) -> signal.Signals | None:
        """The signal that asked to stop, or None."""
        if self._noted is not None:
            # From here on a second one acts even while the process is in a call that does not return. Not before, in
            # ``_note``: both may have come before either is handled, and Python handles none by what is no function.
            self._restore()
        return self._noted

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # as in the background of a shell script; as set by C code
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """While entered, holds signals back; they act after it.

        For what ends in a ``__del__``, where Python prints and forgets the exception that Ctrl-C is.
        """
        came: list[int] = []
        before = {number: signal.getsignal(number) for number in self._before}
        try:
            for number in before:
                signal.signal(number, lambda number, frame: came.append(number))
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for number in came:
                signal.raise_signal(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted is not None:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
            return
        self._noted = signal.Signals(number)
        if not self.is_quiet:
            tqdm.write(f"{self._noted.name}: finishing the step and saving; a second one stops at once")

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
