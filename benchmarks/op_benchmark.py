"""The benchmark of an op: its table, its check against targets, its JSON, and its cases for pytest-benchmark.

Variants run interleaved in one process, after their results were checked; figures are medians and ratios of medians.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import cuda_timing
import harness
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CEILINGS = ("copy", "product")
# Read and written by a copy that no cache holds.
COPIED_BYTES = 2 << 30
# Products that are large enough to reach the processor's rate.
PRODUCT = {"cuda": (8192, torch.bfloat16), "cpu": (1024, torch.float32)}


@dataclass(frozen=True)
class Workload:
    """Variants that compute the same thing.

    Args:
        variants: What is timed, by name.
        num_bytes: What any of them must read and write at least; its ceiling is a copy.
        num_flops: Where it is products that take the time: how many operations they need; its ceiling is a product.
    """

    variants: Mapping[str, Callable[[], object]]
    num_bytes: int
    num_flops: int = 0

    @property
    def ceiling(self) -> str:
        return "product" if self.num_flops else "copy"

    @property
    def num_done(self) -> int:
        return self.num_flops or self.num_bytes


@dataclass(frozen=True)
class Target:
    """At how many times a variant's speed, or at what share of the ceiling, our op must work."""

    workload: str
    versus: str
    ratio: float


@dataclass(frozen=True, kw_only=True)
class OpBenchmark:
    """What is timed of an op.

    Args:
        op: Its name.
        shape: What all batch sizes share, in words.
        workloads: Names of the workloads.
        variants: Names of the variants, the first of them eager PyTorch as the original writes it.
        make: Makes and checks the workloads of a batch size.
        batch_size: For each device, that of the table, of the targets and of pytest's cases.
        targets: For each device.
        rounds: For each device, how often each variant runs.
    """

    op: str
    shape: str
    workloads: tuple[str, ...]
    variants: tuple[str, ...]
    make: Callable[[int], Mapping[str, Workload]]
    batch_size: Mapping[str, int]
    targets: Mapping[str, tuple[Target, ...]]
    rounds: Mapping[str, int]

    @functools.cached_property
    def default_workloads(self) -> Mapping[str, Workload]:
        return self.make_on_stream(self.batch_size[DEVICE])

    def make_on_stream(self, batch_size: int) -> Mapping[str, Workload]:
        torch.manual_seed(0)
        torch.compiler.reset()  # counts a function's variants, those of other batch sizes too, and refuses to make many
        with torch.cuda.stream(cuda_timing.STREAM) if DEVICE == "cuda" else nullcontext():
            made = self.make(batch_size)
        assert set(made) == set(self.workloads)
        return made


def measure(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, harness.Timing]:
    return cuda_timing.measure(runs, rounds) if DEVICE == "cuda" else harness.measure(runs, rounds)


def make_ceiling(workload: Workload) -> tuple[Callable[[], object], int]:
    """What nothing can be faster than, and the bytes or operations of a run of it."""
    if workload.ceiling == "product":
        size, dtype = PRODUCT[DEVICE]
        left, right = torch.randn(2, size, size, device=DEVICE, dtype=dtype)
        return lambda: left @ right, 2 * size**3
    num_bytes = COPIED_BYTES if DEVICE == "cuda" else workload.num_bytes
    source = torch.rand(num_bytes // 8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), num_bytes


def rows_of(benchmark: OpBenchmark, batch_size: int, workloads: Mapping[str, Workload], rounds: int) -> list[dict]:
    """A row per workload and variant, the ceiling among them."""
    rows = []
    for name, workload in workloads.items():
        ceiling, ceiling_done = make_ceiling(workload)
        timings = measure({**workload.variants, workload.ceiling: ceiling}, rounds)
        eager_s = timings[benchmark.variants[0]].median_s
        ceiling_rate = ceiling_done / timings[workload.ceiling].median_s
        for variant, timing in timings.items():
            is_ceiling = variant == workload.ceiling
            rate = (ceiling_done if is_ceiling else workload.num_done) / timing.median_s
            measures_memory = DEVICE == "cuda" and not is_ceiling
            rows.append(
                {
                    "op": benchmark.op,
                    "device": DEVICE,
                    "batch_size": batch_size,
                    "workload": name,
                    "variant": variant,
                    "median_s": timing.median_s,
                    "p20_s": timing.percentile_s(20),
                    "p80_s": timing.percentile_s(80),
                    "rate_per_s": rate,
                    "ceiling": workload.ceiling,
                    "share_of_ceiling": rate / ceiling_rate,
                    "times_eager": None if is_ceiling else eager_s / timing.median_s,
                    "peak_bytes": cuda_timing.peak_bytes(workload.variants[variant]) if measures_memory else None,
                }
            )
    return rows


HEADER = "{:34} {:15} {:>10} {:>10} {:>10} {:>16} {:>16} {:>8} {:>9}".format(
    "", "", "median ms", "p20", "p80", "rate", "of ceiling", "peak MiB", "vs eager"
)


def format_row(row: dict) -> str:
    rate = f"{row['rate_per_s'] / 1e9:.1f} {'GB/s' if row['ceiling'] == 'copy' else 'GFLOP/s'}"
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
    times = "" if row["times_eager"] is None else f"{row['times_eager']:.2f}x"
    ceiling = f"{row['share_of_ceiling']:.0%} of {row['ceiling']}"
    return (
        f"{row['workload']:34} {row['variant']:15} {row['median_s'] * 1e3:10.4f} {row['p20_s'] * 1e3:10.4f} "
        f"{row['p80_s'] * 1e3:10.4f} {rate:>16} {ceiling:>16} {peak:>8} {times:>9}"
    )


def figures_of(benchmark: OpBenchmark, rows: list[dict]) -> list[dict]:
    """What our op reaches beside each target; None beside one against a peer that is not installed."""
    of = {(row["workload"], row["variant"]): row for row in rows}
    figures = []
    for target in benchmark.targets[DEVICE]:
        ours, peer = of[target.workload, "ours"], of.get((target.workload, target.versus))
        if target.versus in CEILINGS:
            figure = ours["share_of_ceiling"]
        else:
            figure = peer["median_s"] / ours["median_s"] if peer else None
        figures.append({"workload": target.workload, "versus": target.versus, "target": target.ratio, "figure": figure})
    return figures


def format_figure(op: str, figure: dict) -> str:
    name = f"{op}, {figure['workload']}: ours vs {figure['versus']}"
    if figure["figure"] is None:
        return f"{name}: not measured, it is not installed (target: {figure['target']}x)"
    if figure["versus"] in CEILINGS:
        return f"{name}, share of its rate: {figure['figure']:.0%} (target: {figure['target']:.0%})"
    return f"{name}: {figure['figure']:.2f}x (target: {figure['target']}x)"


def main(benchmark: OpBenchmark, description: str) -> None:
    """Prints the table and, last, each figure beside its target; with --check the exit status is 1 if one is missed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    rounds = benchmark.rounds[DEVICE]
    parser.add_argument("--rounds", type=int, default=rounds, help="runs of each variant (default: %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[], help="more than that of the targets")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()

    print(f"{benchmark.op}, {benchmark.shape}, {DEVICE}\n{harness.machine()}")
    default, rows = benchmark.batch_size[DEVICE], {}
    for batch_size in sorted({default, *arguments.batch_sizes}):
        made = benchmark.default_workloads if batch_size == default else benchmark.make_on_stream(batch_size)
        rows[batch_size] = rows_of(benchmark, batch_size, made, arguments.rounds)
        print(f"\nbatch {batch_size}\n{HEADER}")
        print("\n".join(map(format_row, rows[batch_size])), flush=True)
    figures = figures_of(benchmark, rows[default])
    if arguments.json:
        record = {
            "op": benchmark.op,
            "shape": benchmark.shape,
            "machine": harness.machine(),
            "rows": sum(rows.values(), []),
            "figures": figures,
        }
        arguments.json.write_text(json.dumps(record, indent=1))
    print("\n" + "\n".join(format_figure(benchmark.op, figure) for figure in figures))
    missed = [figure for figure in figures if figure["figure"] is not None and figure["figure"] < figure["target"]]
    if arguments.check and missed:
        sys.exit(1)


def pytest_cases(spec: OpBenchmark) -> Callable:
    """The test function of a benchmark file: a case per workload and variant, for pytest-benchmark's history."""

    @pytest.mark.parametrize("workload", spec.workloads)
    @pytest.mark.parametrize("variant", spec.variants)
    def case(benchmark, workload, variant):
        made = spec.default_workloads[workload]
        if variant not in made.variants:
            pytest.skip(f"{variant} does not do this")
        run, rounds = made.variants[variant], max(3, spec.rounds[DEVICE] // 3)
        timings = measure({"eager": made.variants[spec.variants[0]], "this": run}, spec.rounds[DEVICE])
        benchmark.extra_info["ratio_to_eager"] = harness.times_as_fast(timings["eager"], timings["this"])
        benchmark.extra_info["num_bytes"] = made.num_bytes
        benchmark.extra_info["machine"] = harness.machine()
        benchmark.pedantic(synchronised(run), rounds=rounds, warmup_rounds=1)

    return case


def synchronised(run: Callable[[], object]) -> Callable[[], object]:
    if DEVICE == "cpu":
        return run

    def run_to_the_end() -> None:
        with torch.cuda.stream(cuda_timing.STREAM):
            run()
        torch.cuda.synchronize()

    return run_to_the_end
