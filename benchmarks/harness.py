"""Times variants of one computation against each other: interleaved, in one process, medians and ratios of medians."""

import datetime
import importlib.util
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from fastm3ae.training.run_folder import processor


@dataclass(frozen=True)
class Timing:
    """What each run took: on the clock, and of the processors, worker processes included (NaN where unknown)."""

    samples_s: tuple[float, ...]
    cpu_samples_s: tuple[float, ...]

    @property
    def median_s(self):
        return statistics.median(self.samples_s)

    @property
    def median_cpu_s(self):
        return statistics.median(self.cpu_samples_s)

    def percentile_s(self, percent):
        return statistics.quantiles(self.samples_s, n=100, method="inclusive")[percent - 1]


def times_as_fast(first: Timing, second: Timing) -> float:
    """How many times as fast the second is: the median over the rounds, in each of which both ran a moment apart.

    By the processors' time, where it is known: on a busy machine that on the clock says little of one millisecond.
    """
    pairs = first.samples_s, second.samples_s
    if not math.isnan(second.median_cpu_s):
        pairs = first.cpu_samples_s, second.cpu_samples_s
    return statistics.median(a / b for a, b in zip(*pairs, strict=True))


def measure(variants: Mapping[str, Callable[[], object]], rounds: int, warm_up_rounds: int = 3) -> dict[str, Timing]:
    """Runs every variant once in each round, so that a slow moment of the machine falls on all of them."""
    samples = {name: [] for name in variants}
    for round_ in range(-warm_up_rounds, rounds):
        for name, run in variants.items():
            start_cpu, start = cpu_s(), time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            if round_ >= 0:
                samples[name].append((seconds, cpu_s() - start_cpu))
    return {name: Timing(*zip(*runs, strict=True)) for name, runs in samples.items()}


def cpu_s() -> float:
    """Processor time of this process and its living children so far; NaN where the system has no /proc."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        stat = Path(f"/proc/{child.pid}/stat")
        if not stat.exists():
            return math.nan
        user, system = stat.read_text().rpartition(")")[2].split()[11:13]
        total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def machine() -> str:
    """What the numbers depend on: processor or GPU, threads, versions, commit, date."""
    describe = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"
    unit = f"{processor()} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        unit = f"{torch.cuda.get_device_name()}, driver {_driver()}, {unit}"
    return (
        f"{unit}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {_version('triton')}, commit {commit}, {datetime.date.today()}"
    )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _version(package: str) -> str:
    return metadata.version(package) if importlib.util.find_spec(package) else "missing"
