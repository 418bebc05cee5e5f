"""Several processes of one command on this machine, one per GPU, each with the environment that torchrun gives it."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from types import FrameType

import torch

__all__ = ["is_one_of_several", "launch", "processes_for"]

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 30  # how long the other processes may take to end by themselves after one has failed


def is_one_of_several() -> bool:
    """Whether torchrun, or ``launch``, has started this process."""
    return "WORLD_SIZE" in os.environ or "LOCAL_RANK" in os.environ


def processes_for(num_gpus: int, device: str) -> tuple[int, str | None]:
    """Returns how many processes this machine can give to a run that asks for so many GPUs, and what is missing.

    Args:
        num_gpus: GPUs that the run was written for.
        device: ``TrainConfig.device``; one that names a CPU or a single GPU takes one process.
    """
    if device not in ("auto", "cuda"):
        return 1, None
    num_here = torch.cuda.device_count()
    if num_here >= num_gpus:
        return num_gpus, None
    found = f"only {num_here} GPU{'s' * (num_here > 1)}" if num_here else "no GPU, so that the CPU computes"
    return max(1, num_here), f"num_gpus is {num_gpus}, but this machine has {found}"


def launch(command: Sequence[str], num_processes: int) -> int:
    """Runs a command in so many processes that know of each other; returns 0, or the first failure's exit status.

    SIGINT, SIGTERM and SIGHUP go on to the processes, and however long they take to save is waited for. When one fails
    by itself, the others get half a minute.

    Args:
        command: The program and its arguments, the same for all.
        num_processes: How many.
    """
    children: list[subprocess.Popen] = []
    is_stopping = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        is_stopping = True
        for child in children:
            child.send_signal(number)

    # A signal that is ignored, as under nohup, stays so.
    caught = [number for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, forward) for number in caught}
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_processes)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        **os.environ,
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
    }
    status, deadline = 0, 0.0
    try:
        for rank in range(num_processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # In a session of its own, or else Ctrl-C would reach it twice: from the terminal, and from here.
            children.append(subprocess.Popen(command, env=environment | ranks, start_new_session=True))
        while None in [child.poll() for child in children]:
            if not status:
                status, deadline = _first_failure(children), time.monotonic() + GRACE_S
            elif time.monotonic() > deadline and not is_stopping:
                break
            time.sleep(0.1)
        return status or _first_failure(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _first_failure(children: Sequence[subprocess.Popen]) -> int:
    """Returns the exit status of a child that failed, 128 + the number of the signal that killed it, or 0."""
    failed = next((child.returncode for child in children if child.returncode), 0)
    return 128 - failed if failed < 0 else failed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
