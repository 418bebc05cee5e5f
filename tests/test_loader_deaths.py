"""Processes that load data, and die or lose the trainer that started them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus import pretrain_batches

from fastm3ae.data.loader import Loader
from fastm3ae.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kill -9 and SIGCHLD")


class Large:
    """Batches of which a pipe cannot hold two."""

    def __init__(self, batches):
        self.batches, self.dataset = batches, batches.dataset

    def __getattr__(self, name):
        return getattr(self.__dict__["batches"], name)

    def __getitem__(self, request):
        batch = self.batches[request]
        batch.texts[0] = "word " * 20_000
        return batch


class Broken(Large):
    def __getitem__(self, request):
        raise RuntimeError("a fault of the program")


def loader_of(batches, num_workers=1):
    return Loader(batches, batch_size=5, is_training=True, num_workers=num_workers)


def pid_of_the_only_worker(loader):
    (worker,) = loader._workers
    return worker.pid


def test_a_death_is_told_where_batches_are_waited_for(corpus):
    """Not by a signal handler that raises wherever the trainer is just then."""
    before = signal.getsignal(signal.SIGCHLD)
    loader = loader_of(pretrain_batches(corpus))
    batches = loader.epoch(0)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) is before
    os.kill(pid_of_the_only_worker(loader), signal.SIGKILL)
    time.sleep(0.5)  # nothing happens
    with pytest.raises(UserError, match="A process that loads data died, perhaps for want of memory"):
        list(batches)
    with pytest.raises(UserError, match="A process that loads data died"):
        next(loader.epoch(1))


def test_an_error_in_a_worker_is_no_death(corpus):
    with pytest.raises(RuntimeError, match="a fault of the program"):
        next(loader_of(Broken(pretrain_batches(corpus))).epoch(0))


def test_a_closed_loader_has_no_workers(corpus):
    loader = loader_of(pretrain_batches(corpus))
    assert len(list(loader.epoch(0))) == len(loader)
    pid = pid_of_the_only_worker(loader)
    loader.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_workers_end_with_a_trainer_that_is_killed(corpus):
    """Also those whose batches nobody will take out of the pipe."""
    command = [sys.executable, __file__, *map(str, corpus)]
    root = str(Path(__file__).parents[1])
    result = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    # The pipe of its output is open until the last worker has ended.
    assert result.returncode == -signal.SIGKILL and re.fullmatch(r"2 workers\n", result.stdout)


if __name__ == "__main__":
    loader = loader_of(Large(pretrain_batches([Path(path) for path in sys.argv[1:]])), num_workers=2)
    next(loader.epoch(0))
    time.sleep(1)  # until the pipe is full
    print(len(loader._workers), "workers", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
