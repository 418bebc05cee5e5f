"""Work on many items ahead of the one that is asked for, by threads or by processes."""

import multiprocessing
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["READ_AHEAD", "ROWS_PER_PROCESS", "map_ahead", "num_processes"]

READ_AHEAD = 64
ROWS_PER_PROCESS = 50
"""A process takes half a second to start: it is worth that for so many images."""

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def num_processes(num_workers: int, num_items: int) -> int:
    """Returns how many of the processes that are allowed so many items are worth; 0: threads of this one do it."""
    wanted = min(num_workers, num_items // ROWS_PER_PROCESS)
    return wanted if wanted > 1 else 0


def map_ahead(function: Callable[[_In], _Out], items: Iterable[_In], num_workers: int = 0) -> Iterator[_Out]:
    """Yields ``function`` of each item in order; workers are some items ahead.

    Args:
        function: For processes, one that can be pickled.
        items: What it is called with.
        num_workers: Processes; 0: threads of this one, which Python lets work at a time as far as libraries in C do.

    Raises:
        BrokenProcessPool: A process has died.
    """
    pool = _processes(num_workers) if num_workers else ThreadPoolExecutor()
    try:
        pending: deque[Future[_Out]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= max(READ_AHEAD, 4 * num_workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _processes(num: int) -> Executor:
    # Started afresh, because what has threads, as libraries here have, cannot be forked safely.
    return ProcessPoolExecutor(num, multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    """Leaves Ctrl-C to the process that waits, and remarks on odd files to the first of its readers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
