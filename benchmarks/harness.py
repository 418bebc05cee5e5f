"""Times variants of one computation against each other: interleaved, in one process, medians and ratios of medians."""

import argparse
import datetime
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Workload:
    """Variants that compute the same thing, and the bytes that any of them must read and write at least."""

    variants: Mapping[str, Callable[[], object]]
    num_bytes: int


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


def copy_of(num_bytes: int) -> Callable[[], object]:
    """A copy that reads and writes ``num_bytes`` in total: the ceiling of anything that memory bounds."""
    source = torch.rand(num_bytes // 8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def machine() -> str:
    """What the numbers depend on: processor, threads, versions, commit, date."""
    describe = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"
    return (
        f"{processor()} ({torch.backends.cpu.get_cpu_capability()}), "
        f"{torch.get_num_threads()} threads, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, commit {commit}, {datetime.date.today()}"
    )


def main(
    description: str,
    title: str,
    make_workloads: Callable[[], Mapping[str, Workload]],
    *,
    baseline: str,
    ours: str,
    gate: str,
    target: float,
) -> None:
    """Prints a row per workload and variant, then how many times faster ``ours`` is than ``baseline`` at ``gate``.

    With --check the exit status is 1 when that ratio is below ``target``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help=f"exit with 1 when the ratio is below {target}")
    parser.add_argument("--rounds", type=int, default=30, help="measurements of each variant (default: %(default)s)")
    arguments = parser.parse_args()

    print(f"{title}\n{machine()}\n")
    header = ("", "", "median ms", "p20", "p80", "GB/s", "of copy", f"vs {baseline}")
    print("{:18} {:14} {:>10} {:>8} {:>8} {:>7} {:>8} {:>9}".format(*header))
    ratios = {}
    for name, workload in make_workloads().items():
        timings = measure({**workload.variants, "copy": copy_of(workload.num_bytes)}, arguments.rounds)
        for variant, timing in timings.items():
            ratios[name, variant] = timings[baseline].median_s / timing.median_s
            print(
                f"{name:18} {variant:14} {timing.median_s * 1e3:10.2f} {timing.percentile_s(20) * 1e3:8.2f} "
                f"{timing.percentile_s(80) * 1e3:8.2f} {workload.num_bytes / timing.median_s / 1e9:7.2f} "
                f"{timings['copy'].median_s / timing.median_s:8.0%} {ratios[name, variant]:8.2f}x"
            )
    print(f"\n{ours} vs {baseline}, {gate}: {ratios[gate, ours]:.2f}x (target: {target}x)")
    if arguments.check and ratios[gate, ours] < target:
        sys.exit(1)
