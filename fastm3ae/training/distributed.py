"""The processes that train together: how this one joins them, and what they tell each other.

torchrun starts a process per device and says through the environment which one each is. Gradients travel by NCCL
between GPUs and by gloo between CPUs; what the host must know (how many tokens the others mask, whether one was told to
stop) always travels by gloo, so that no GPU is waited for.
"""

import datetime
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastm3ae.device import pick_device
from fastm3ae.errors import UserError

__all__ = ["Processes", "explain_gone_process"]

Value = TypeVar("Value")

TIMEOUT = datetime.timedelta(minutes=60)  # the first process may validate or write for long while others wait


class Processes:
    """This process and those that it trains with.

    Attributes:
        rank: Number of this process, from 0; the first one writes the run folder.
        number: How many there are.
        number_here: How many of them are on this machine.
        device: Where this process computes.
        are_restarted: Whether torchrun has started them again, because one of those before had failed.

    Args:
        device: ``TrainConfig.device``: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        UserError: The device is unknown or not here, or the other processes cannot be met.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.number = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.number_here = int(os.environ.get("LOCAL_WORLD_SIZE", self.number))
        self.device = pick_device(device, int(os.environ.get("LOCAL_RANK", self.rank)), self.number_here)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._host: dist.ProcessGroup | None = None
        self._store: dist.Store | None = None
        if self.number > 1:
            self._store = _meet(self.device)
            self._host = self.new_host_group()
        # After a failure on one machine of several, only that one counts it.
        self.are_restarted = any(self.gather(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def seed(self, seed: int, step: int = 0) -> None:
        """Seeds what dropout draws from, differently in each process and for each step."""
        digest = hashlib.sha256(f"{seed} {step} {self.rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big"))

    def new_host_group(self) -> dist.ProcessGroup | None:
        """Returns a group of all processes whose talk disturbs no other's; None: this one trains alone."""
        return dist.new_group(backend="gloo", timeout=TIMEOUT) if self.number > 1 else None

    def close(self) -> None:
        """Leaves the other processes, all of which do so: none goes while another still talks to it."""
        if self._host is not None:
            _talk(dist.barrier, group=self._host)
            dist.destroy_process_group()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Returns the sum of every value over all processes, in float64; exact for counts."""
        if self._host is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        _talk(dist.all_reduce, total, group=self._host)
        return total.tolist()

    def gather(self, value: Value) -> list[Value]:
        """Returns the values of all processes, in order; they may be anything that can be pickled."""
        if self._host is None:
            return [value]
        values: list[Any] = [None] * self.number
        _talk(dist.all_gather_object, values, value, group=self._host)
        return values

    def gather_rows(self, x: Tensor) -> tuple[Tensor, int]:
        """Returns the rows of all processes, in order and without gradients, and at which of them this one's begin.

        Args:
            x: (rows, ...) on this process's device; the processes may have different numbers of rows, also none.
        """
        if self._host is None:
            return x, 0
        sizes = self.gather(len(x))
        own = x.new_zeros(max(sizes), *x.shape[1:])
        own[: len(x)] = x
        rows = [torch.empty_like(own) for _ in sizes]
        _talk(dist.all_gather, rows, own)
        return torch.cat([some[:size] for some, size in zip(rows, sizes, strict=True)]), sum(sizes[: self.rank])

    def board(self) -> dist.Store | None:
        """Returns where one more thread may leave small values for all processes; None for a process alone."""
        return None if self._store is None else dist.PrefixStore("board", self._store.clone())

    def from_first(self, make: Callable[[], Value]) -> Value:
        """Returns what ``make`` gives in the first process, everywhere; its UserError ends all, and it says why.

        Raises:
            UserError: In the first process, what ``make`` raised; the others end in silence (SystemExit).
        """
        if self._host is None:
            return make()
        answer: list[Any] = [None]
        if self.is_first:
            try:
                answer[0] = make()
            except UserError as error:
                answer[0] = error
        _talk(dist.broadcast_object_list, answer, src=0, group=self._host)
        if isinstance(answer[0], UserError):
            raise answer[0] if self.is_first else SystemExit(2)
        return answer[0]


def _meet(device: torch.device) -> dist.Store:
    """Joins the default process group, which carries the gradients; returns by what the processes have met."""
    place = f"{os.environ.get('MASTER_ADDR')}, port {os.environ.get('MASTER_PORT')}"
    try:
        store, rank, number = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # torchrun's own store outlives processes that it starts again; they must not meet where those before them were.
        # A new one needs no prefix, and has no common one: each machine's torchrun counts only restarts that it began.
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        group = {"store": store, "rank": rank, "world_size": number, "timeout": TIMEOUT}
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device, **group)
        else:
            dist.init_process_group("gloo", **group)
        return store
    except ValueError as error:  # a variable is missing
        raise UserError(
            f"WORLD_SIZE asks for several processes, but how they meet is not said: {error}; start them with torchrun."
        ) from error
    except RuntimeError as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise UserError(
                f"The processes cannot meet at {place}: the port is in use; set MASTER_PORT to a free one."
            ) from error
        raise UserError(f"The processes cannot meet at {place}: {str(error).splitlines()[0]}") from error


@contextmanager
def explain_gone_process() -> Iterator[None]:
    """Says in a sentence that another process is gone, where it is found as gradients or weights are exchanged."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise _gone(error) from error


def _talk(collective: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    try:
        collective(*arguments, **options)
    except RuntimeError as error:
        raise _gone(error) from error


def _gone(error: RuntimeError) -> UserError:
    return UserError(f"Another process is gone; its own message says why ({str(error).splitlines()[0]})")
