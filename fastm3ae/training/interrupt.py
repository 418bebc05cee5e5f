"""Ctrl-C and SIGTERM: finish the step, save, then end."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from tqdm import tqdm

__all__ = ["StopRequest"]


class StopRequest:
    """While entered, notes the first SIGINT or SIGTERM instead of dying from it; the second one acts as usual.

    Attributes:
        signal: The signal that asked to stop, or None.

    Args:
        is_quiet: Whether nothing is printed then.
    """

    def __init__(self, is_quiet: bool = False) -> None:
        self.is_quiet = is_quiet
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a shell script
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()
        if not self.is_quiet:
            tqdm.write(f"{self.signal.name}: finishing the step and saving; a second one stops at once")

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
