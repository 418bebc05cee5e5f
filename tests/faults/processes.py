"""The command as real processes that start at once: forked from one that has imported all and computed nothing."""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import time
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

from fastm3ae.cli import main

TESTS = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = ["faults.processes", "fastm3ae.config.presets", "fastm3ae.training.pretrain", "torch.utils.tensorboard"]
# One thread each, so that sums are rounded alike and processes don't wait for each other; every step is printed.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_MININTERVAL": "0", "PYTHONUNBUFFERED": "1",
               "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}  # fmt: skip
POLL_S = 0.002
STARTED = "the command starts"


def prepare() -> None:
    """Starts the process that all others are forked from, if it is not there."""
    CONTEXT.set_forkserver_preload(PRELOAD)
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    forkserver.ensure_running()
    for name, value in before.items():
        os.environ.pop(name)
        os.environ.update({} if value is None else {name: value})


class Process:
    """The command in a process that leads a group of its own; what the group prints is kept.

    Args:
        arguments: Those of the command.
        plant: Name of a function of ``faults.planted`` that is called first.
        log: Where its output goes instead.
    """

    def __init__(self, arguments: list[str], plant: str | None = None, log: Path | None = None) -> None:
        self._read, write = CONTEXT.Pipe(duplex=False)
        self._printed, self._log = b"", log
        self._process = CONTEXT.Process(target=_run, args=(arguments, write, plant, log))
        self._process.start()
        write.close()
        os.set_blocking(self._read.fileno(), False)
        self.pid = self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status, less than 0 after a signal; None: it is running."""
        return self._process.exitcode

    @property
    def output(self) -> str:
        """All that was printed so far."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._read.fileno(), 2**16):
                self._printed += piece
        logged = self._log.read_bytes() if self._log is not None and self._log.exists() else b""
        return (self._printed + logged).decode(errors="replace")

    @property
    def outputs(self) -> list[str]:
        """The same, at each attempt: there is one."""
        return [self.output]

    def signal(self, number: int, to_group: bool = False) -> None:
        """Sends a signal; to a process that has ended: nothing."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number) if to_group else os.kill(self.pid, number)

    def workers(self) -> list[int]:
        """Returns the other processes of the group."""
        return [pid for pid in group(self.pid) if pid != self.pid]


def _run(arguments: list[str], write: Connection, plant: str | None, log: Path | None) -> None:
    os.setsid()
    # A child of this start method would start its own ones by it, too, instead of by the platform's.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    target = write.fileno() if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(target, descriptor)
    if plant is not None:
        from faults import planted

        getattr(planted, plant)()
    os.write(write.fileno(), f"{STARTED}\n".encode())
    write.close()
    status = main(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what Python does about it while it ends is not the command's
    sys.exit(status)


def group(leader: int) -> list[int]:
    """Returns the living processes of a group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended
            state, _, group = re.sub(r".*\)", "", path.read_text(), flags=re.DOTALL).split()[:3]
            if int(group) == leader and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def wait_until(condition, seconds: float) -> bool:
    """Returns whether a condition came true in time."""
    end = time.monotonic() + seconds
    while not (is_true := condition()) and time.monotonic() < end:
        time.sleep(POLL_S)
    return bool(is_true)
