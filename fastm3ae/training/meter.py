"""Running means of what a run logs, and where its time goes."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastm3ae.training.distributed import Processes

__all__ = ["Meter"]


class Meter:
    """Sums on the device, read (and waited for) only when they are logged; and where the time goes.

    Args:
        processes: Those over which the sums are taken.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.total_samples = self.total_seconds = self.total_waited = 0.0
        self._start_window()

    def _start_window(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._unread: list[tuple[dict[str, tuple[Tensor, int]], Tensor]] = []
        self._samples, self._waited, self._paused, self._started = 0, 0.0, 0.0, time.perf_counter()

    def add(self, sums: dict[str, tuple[Tensor, int]], num_samples: int, is_skipped: Tensor) -> None:
        """Adds one step's sums and counts, of this process alone.

        Args:
            sums: For each metric its sum (a scalar on the device) and over how many it was taken.
            num_samples: Pairs of this process in the step.
            is_skipped: Whether the step is to be left out of all means (a scalar on the device).
        """
        self._unread.append((sums, is_skipped))
        self._samples += num_samples

    def settle(self) -> None:
        """Adds up the steps since the last call, but for those to be left out; waits for the device."""
        unread, self._unread = self._unread, []
        are_skipped = torch.stack([is_skipped for _, is_skipped in unread]).tolist() if unread else []
        for (sums, _), is_skipped in zip(unread, are_skipped, strict=True):
            for name, (total, count) in () if is_skipped else sums.items():
                self._sums[name] = self._sums[name] + total if name in self._sums else total
                self._counts[name] += count

    def wait(self, fetch: Callable[[], Any]) -> Any:
        """Returns what ``fetch`` gives, and counts its time as waiting for data."""
        before = time.perf_counter()
        fetched = fetch()
        self._waited += time.perf_counter() - before
        return fetched

    def pause(self, work: Callable[[], None]) -> None:
        """Does some work whose time is not training time."""
        before = time.perf_counter()
        work()
        self._paused += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """Returns the means since the last call, with samples per second and the share of time spent on waiting.

        There are no means if every step was left out.
        """
        self.settle()
        names = list(self._sums)
        sums = torch.stack([self._sums[name].double() for name in names]).tolist() if names else []
        counts = [self._counts[name] for name in names]
        seconds = time.perf_counter() - self._started - self._paused
        *totals, samples = self.processes.sum([*sums, *counts, self._samples])
        means = (total / max(1, count) for total, count in zip(totals[: len(names)], totals[len(names) :], strict=True))
        values = dict(zip(names, means, strict=True))
        if names:
            values["loss"] = sum(value for name, value in values.items() if name.endswith("_loss"))
        values["samples_per_s"] = samples / max(seconds, 1e-9)
        values["data_wait_frac"] = self._waited / max(seconds, 1e-9)
        self.total_samples += samples
        self.total_seconds += seconds
        self.total_waited += self._waited
        self._start_window()
        return values

    def state(self) -> dict[str, Any]:
        """Returns what ``restore`` needs to go on in the middle of a window."""
        self.settle()
        seconds = time.perf_counter() - self._started - self._paused
        return {
            "sums": dict(self._sums),
            "counts": dict(self._counts),
            "window": (self._samples, self._waited, seconds),
            "totals": (self.total_samples, self.total_seconds, self.total_waited),
        }

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Goes on where ``state`` was taken; the clock counts what had passed until then."""
        self._start_window()
        self._sums = {name: total.to(device) for name, total in state["sums"].items()}
        self._counts.update(state["counts"])
        self._samples, self._waited, seconds = state["window"]
        self._started -= seconds
        self.total_samples, self.total_seconds, self.total_waited = state["totals"]
