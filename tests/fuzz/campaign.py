"""A campaign: many inputs to one reader, in worker processes that may crash, hang or eat memory without ending it."""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, Protocol

__all__ = ["Failure", "Report", "Target", "render", "replay", "run_campaign"]

POLL_S = 0.02
START_S = 60  # what a worker may need before its first input, beside the time for that
LONGEST_MESSAGE = 4000


class Target(Protocol):
    """A reader of untrusted bytes.

    Attributes:
        name: Without an underscore.
        documented: What it may raise; all else is a failure.
        limit_s: An input that takes longer hangs.
        limit_mib: By how much one input may raise the worker's resident memory.
    """

    name: str
    documented: tuple[type[BaseException], ...]
    limit_s: float
    limit_mib: float

    def begin(self) -> None:
        """Prepares the process that will read the inputs, and does nothing else from then on."""

    def make(self, rng: random.Random) -> bytes:
        """Returns an input; equal states of ``rng`` give equal inputs."""

    def read(self, data: bytes, folder: Path) -> str:
        """Reads an input, and returns what became of it: "accepted", or in what way it was refused.

        Args:
            data: The input.
            folder: A folder for files; what is left there is removed.
        """


class Failure(NamedTuple):
    """An input that broke its reader."""

    what: str
    file: Path


@dataclass
class Report:
    """What became of a target's inputs."""

    target: str
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_ms: float = 0.0
    peak_mib: float = 0.0
    failures: list[Failure] = field(default_factory=list)


class _Result(NamedTuple):
    outcome: str
    fault: str | None
    seconds: float
    mib: float


def run_campaign(target: Target, num: int, seed: int, failures: Path) -> Report:
    """Gives a target so many inputs, and keeps those that broke it.

    Args:
        target: What reads them.
        num: How many inputs.
        seed: Seed of the inputs; each is made by itself from the seed and its number.
        failures: Folder of the inputs that broke it, made when there is one.
    """
    report = Report(target.name)
    number = 0
    while number < num:
        for result in _watch(target, range(number, num), seed):
            report.outcomes[result.outcome] += 1
            report.slowest_ms = max(report.slowest_ms, result.seconds * 1000)
            report.peak_mib = max(report.peak_mib, result.mib)
            if result.fault is not None:
                failures.mkdir(parents=True, exist_ok=True)
                file = failures / f"{target.name}_{seed}_{number}.bin"
                file.write_bytes(target.make(_rng(target, seed, number)))
                report.failures.append(Failure(result.fault, file))
            number += 1
    return report


def _rng(target: Target, seed: int, number: int) -> random.Random:
    return random.Random(f"{target.name}/{seed}/{number}")


def _watch(target: Target, numbers: range, seed: int):
    """Yields the results of a worker, to its end: at the last number, or with the input that ended it."""
    context = multiprocessing.get_context("fork")  # the libraries are imported once, and the seeds made once
    here, there = context.Pipe(duplex=False)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    worker = context.Process(target=_work, args=(target, numbers, seed, there, folder))
    worker.start()
    there.close()
    deadline = time.monotonic() + START_S + target.limit_s
    before = peak = None
    ended = 0
    try:
        while ended < len(numbers):
            if here.poll(POLL_S):
                try:
                    result = here.recv()
                except EOFError:
                    worker.join()
                    code = worker.exitcode or 0
                    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                    yield _Result("failed", f"the process ended: {how}", 0.0, 0.0)
                    return
                if isinstance(result, str):
                    raise RuntimeError(f"{target.name}: an input could not be made:\n{result}")
                yield result
                ended += 1
                before = peak = None
                deadline = time.monotonic() + target.limit_s
                continue
            resident = _resident_mib(worker.pid)
            before = resident if before is None else min(before, resident)
            peak = resident - before
            if peak > 2 * target.limit_mib:  # one that stays below is judged by the worker itself
                yield _Result("failed", f"memory: more than {target.limit_mib:.0f} MiB", 0.0, peak)
                return
            if time.monotonic() > deadline:
                yield _Result("failed", f"hang: longer than {target.limit_s:g} s", target.limit_s, peak)
                return
    finally:
        if worker.is_alive() and ended < len(numbers):
            worker.kill()
        worker.join()
        here.close()
        shutil.rmtree(folder, ignore_errors=True)


def _work(target: Target, numbers: range, seed: int, connection: Connection, folder: Path) -> None:
    """Reads inputs and sends their results; a message that is no result says why an input could not be made."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.disable()  # a crash is told by the process that waits for this one
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # decoders in C write there what they think of a file
        os.dup2(nowhere, stream)
    warnings.simplefilter("ignore")
    target.begin()
    ctypes.CDLL(None).malloc_trim(0)  # what the process before had freed, would be there for inputs without counting
    home = folder / "input"
    for number in numbers:
        try:
            data = target.make(_rng(target, seed, number))
        except Exception:
            connection.send(traceback.format_exc())
            return
        home.mkdir()
        connection.send(_judge(target, data, home))
        shutil.rmtree(home)


def _judge(target: Target, data: bytes, folder: Path) -> _Result:
    """Returns what becomes of one input."""
    before, fault = _resident_mib(os.getpid()), None
    _reset_peak()
    start = time.perf_counter()
    try:
        outcome = target.read(data, folder)
    except target.documented as error:
        outcome, fault = type(error).__name__, _fault_of_message(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        outcome, fault = "failed", f"{_named(error)}, {_where(error)}"
    seconds = time.perf_counter() - start
    grown = _peak_mib() - before
    if fault is None and grown > target.limit_mib:
        fault = f"memory: more than {target.limit_mib:.0f} MiB"
    if fault is None and seconds > target.limit_s:
        fault = f"hang: longer than {target.limit_s:g} s"
    return _Result("failed" if fault else outcome, fault, seconds, grown)


def _fault_of_message(error: BaseException) -> str | None:
    """Returns what is wrong with an error's message, which must be a sentence that can be shown."""
    try:
        message = str(error)
        message.encode(errors="backslashreplace")
    except Exception as nested:
        return f"{type(error).__name__} without a message: {_named(nested)}"
    if not message.strip():
        return f"{type(error).__name__} with an empty message, {_where(error)}"
    if len(message) > LONGEST_MESSAGE:
        return f"{type(error).__name__} with a message of more than {LONGEST_MESSAGE} characters, {_where(error)}"
    return None


def _named(error: BaseException) -> str:
    text = ""
    with contextlib.suppress(Exception):
        text = " ".join(str(error).split())[:120]
    return f"{type(error).__name__}: {text}"


def _where(error: BaseException) -> str:
    """Returns the last line of ours that the error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "fastm3ae" in Path(frame.filename).parts] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "nowhere"


def _resident_mib(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0.0


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def render(reports: list[Report], seed: int) -> str:
    """Returns the table, then each way to fail with an input that shows it, then the number of failures."""
    lines = [f"{'target':<20}{'inputs':>8}{'accepted':>10}{'slowest':>12}{'memory':>12}{'failures':>10}  refused"]
    for report in reports:
        refused = [f"{num} {name}" for name, num in report.outcomes.most_common() if name not in ("accepted", "failed")]
        lines.append(
            f"{report.target:<20}{report.outcomes.total():>8}{report.outcomes['accepted']:>10}"
            f"{report.slowest_ms:>9.0f} ms{report.peak_mib:>8.0f} MiB{len(report.failures):>10}  {', '.join(refused)}"
        )
    for report in reports:
        alike: dict[str, list[Failure]] = {}
        for failure in report.failures:
            alike.setdefault(failure.what, []).append(failure)
        for what, found in alike.items():
            lines.append(f"{report.target}: {len(found)} x {what}")
            lines.append(f"    python tests/fuzz/run.py --replay {found[0].file}")
    lines.append(f"seed {seed}: {sum(len(report.failures) for report in reports)} failures")
    return "\n".join(lines)


def replay(target: Target, file: Path) -> str:
    """Gives a target one saved input in this process; what it raises comes through. Returns the outcome."""
    target.begin()
    with tempfile.TemporaryDirectory() as folder:
        return target.read(file.read_bytes(), Path(folder))
