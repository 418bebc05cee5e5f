"""A watchdog: ends a process that makes no progress any more, and says where it stands.

The main thread says what it begins and that something moved; a thread beside it looks from time to time. It counts its
looks, not a clock: while a machine sleeps or a process is stopped, no time passes. A process that waits for others
moves as long as one of them does, and has a little more patience, so that the culprit is the first to speak.
"""

import contextlib
import datetime
import faulthandler
import json
import multiprocessing
import os
import platform
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from fastm3ae.training.distributed import Processes

__all__ = ["EXIT_STATUS", "PATIENCE", "Watchdog"]

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
PATIENCE = 1.25  # a process that waits for others takes so many times as long to be ended
LOOKS, MAX_LOOK_S = 20, 10.0  # so many looks in the time after which a process is ended, at most so far apart
BLOCKED_S = 5.0  # what may block for the very reason of the stall is waited for so long
MAX_CULPRITS = 4  # so many are named
DEBUGGERS = ('bdb.py"', "pydevd")  # in the stacks of a process that is being debugged
PROCESS_STATES = {"R": "running", "S": "sleeping", "D": "waiting for a disk", "T": "stopped", "Z": "dead"}


class Watchdog:
    """While entered, ends this process where nothing moves for too long.

    Args:
        timeout_s: After so many seconds; None: never.
        processes: Those that train together.
        folder: The run folder, where the stacks are written.
        step: Returns how many steps were made.
    """

    def __init__(self, timeout_s: float | None, processes: Processes, folder: Path, step: Callable[[], int]) -> None:
        self.timeout_s, self.processes, self.folder, self.step = timeout_s, processes, folder, step
        self._phase, self._waits, self._moves, self._moves_of_all = "starting", False, 0, 0
        self._board = None
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def begin(self, phase: str, waits: bool = False) -> None:
        """Says what comes now.

        Args:
            phase: In words, to follow "stands still:".
            waits: Whether it ends only when other processes have come as far.
        """
        self._phase, self._waits = phase, waits and self.processes.number > 1
        self._moves += 1

    def progress(self) -> None:
        """Says that what was begun goes on."""
        self._moves += 1

    def watching(self, autocast: Callable[[], AbstractContextManager]) -> Callable[[], AbstractContextManager]:
        """Returns the same, of which every call is progress: passes of the model enter an autocast."""

        def make() -> AbstractContextManager:
            self.progress()
            return autocast()

        return make

    def __enter__(self) -> "Watchdog":
        if self.timeout_s is not None:
            self._look_s = min(self.timeout_s / LOOKS, MAX_LOOK_S)
            self._board = self.processes.board()
            for watch in (self._watch, *([self._tell] if self._board is not None else [])):
                self._threads.append(threading.Thread(target=watch, name=f"watchdog {watch.__name__}", daemon=True))
                self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(BLOCKED_S)

    def _watch(self) -> None:
        still_s, seen = 0.0, None
        while not self._ended.wait(self._look_s):
            waits = self._waits
            moves = (self._moves, self._moves_of_all if waits else None)
            still_s, seen = (still_s + self._look_s if moves == seen else 0.0), moves
            if still_s < self.timeout_s * (PATIENCE if waits else 1):
                continue
            stacks = _stacks()
            if any(name in stacks for name in DEBUGGERS):
                still_s = 0.0
            else:
                self._end(still_s, stacks)

    def _tell(self) -> None:
        """Tells the others where this process stands, and hears whether they move."""
        told = None
        with contextlib.suppress(RuntimeError):  # whoever keeps the board has ended: nobody moves any more
            while not self._ended.is_set():
                has_moved, told = self._moves != told, self._moves
                if has_moved:
                    place = [platform.node(), self._phase, self._waits, self.step()]
                    self._board.set(str(self.processes.rank), json.dumps(place))
                self._moves_of_all = self._board.add("moves", int(has_moved))
                self._ended.wait(self._look_s)

    def _end(self, still_s: float, stacks: str) -> None:
        """Says where this process stands, and ends it."""
        rank, number = self.processes.rank, self.processes.number
        path = self.folder / f"stall_process_{rank}.txt"
        loaders = multiprocessing.active_children()
        if self._waits:
            found: list[str] = []
            _try(lambda: found.append(self._culprits()))
            why = (
                "; ".join(found)
                or "another one is the culprit, perhaps on the machine of process 0, which does not answer"
            )
        else:
            states = ", ".join(f"{loader.pid} ({_state(loader.pid)})" for loader in loaders)
            why = f"its loader processes: {states}" if loaders else "it has no loader processes"
        sentence = (
            f"error: process {rank} of {number} on {platform.node()} stands still: {self._phase}, after step "
            f"{self.step()}, for {still_s:.0f} s; {why}; the stacks of its threads go to {path}; exit status "
            f"{EXIT_STATUS}, so that it may be started again"
        )

        def write() -> None:
            try:
                with path.open("a") as file:
                    file.write(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {sentence}\n\n{stacks}\n")
            except OSError:  # the folder is on another machine
                os.write(2, stacks.encode())

        # Not by sys.stderr, which the main thread may hold.
        _try(lambda: os.write(2, f"\n{sentence}\n".encode()))
        _try(write)
        for loader in loaders:
            loader.kill()
        os._exit(EXIT_STATUS)

    def _culprits(self) -> str:
        """Returns which other processes do not wait here."""
        others = [str(rank) for rank in range(self.processes.number) if rank != self.processes.rank]
        places = dict(zip(others, map(json.loads, self._board.multi_get(others)), strict=True))
        culprits = [
            f"process {rank} on {host} (last seen {phase}, after step {step})"
            for rank, (host, phase, waits, step) in places.items()
            if not waits or step < self.step()
        ]
        if not culprits:
            return "all others wait as well"
        return f"it waits for {', '.join(culprits[:MAX_CULPRITS])}, whose own line says more"


def _stacks() -> str:
    """Returns where every thread stands."""
    try:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            return file.read()
    except OSError as error:
        return f"They cannot be written: {error}."


def _state(pid: int) -> str:
    """Returns what a process is doing, as far as the system tells."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # not on Linux
        return "alive"
    return PROCESS_STATES.get(letter, letter)


def _try(action: Callable[[], object]) -> None:
    """Does something that may block: as a frozen process, a pipe that nobody reads, or a disk that hangs."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(BLOCKED_S)
