"""What the benchmarks of whole steps share: models, batches of reports, steps in turn, peaks of memory, targets."""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from harness import Timing
from torch import Tensor

from fastm3ae import objectives
from fastm3ae.config import ModelConfig
from fastm3ae.data.batch import PretrainBatch
from fastm3ae.model.build import Model, build_model

Losses = Callable[[Model, PretrainBatch], Tensor]
"""The sum of a step's losses."""


@dataclass(frozen=True)
class Figure:
    """What was reached beside its target.

    Args:
        name: What it says.
        value: How many times as much; None: not measured.
        target: What it must reach at least.
        is_at_most: It must not be more than the target instead.
    """

    name: str
    value: float | None
    target: float
    is_at_most: bool = False

    @property
    def is_missed(self) -> bool:
        if self.value is None:
            return False
        return self.value > self.target if self.is_at_most else self.value < self.target

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.2f}"
        return f"{self.name}: {value} (target: at {'most' if self.is_at_most else 'least'} {self.target})"


def with_vocabulary(config: ModelConfig, vocab_size: int) -> ModelConfig:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=vocab_size, pad_token_id=1))


def make_model(config: ModelConfig, device: str = "cpu") -> Model:
    """A model with random weights, made where it stays."""
    torch.manual_seed(0)
    with torch.device(device):
        model = build_model(config)
    return model.to(device).train()  # .to: the decoder's positions come from NumPy


def packed(model: Model, batch: PretrainBatch, **options: bool) -> Tensor:
    return objectives.total(objectives.losses(model(batch, **options), batch, model.config))


def run(
    losses: Losses, model: Model, batch: PretrainBatch, autocast: Callable[[], AbstractContextManager] = nullcontext
) -> None:
    """A step without an optimiser."""
    model.zero_grad(set_to_none=True)
    with autocast():
        loss = losses(model, batch)
    loss.backward()


def in_turn(step: Callable[[PretrainBatch], object], batches: Sequence[PretrainBatch]) -> Callable[[], None]:
    """A function that makes a step on the next of the batches, and waits for the device."""
    rotation = itertools.cycle(batches)

    def run_next() -> None:
        step(next(rotation))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run_next


def compare(runs: Mapping[str, Callable[[], object]], rounds: int, warm_up_rounds: int = 2) -> dict[str, Timing]:
    """Times of each, which are printed with the ratios of those that ran one after the other."""
    timings = harness.measure(runs, rounds, warm_up_rounds)
    width = max(map(len, timings))
    first = next(iter(timings))
    for name, timing in timings.items():
        spread = f"20 %: {timing.percentile_s(20):.3f}, 80 %: {timing.percentile_s(80):.3f}"
        print(f"{name:{width}} {timing.median_s:7.3f} s ({spread}), of the processors {timing.median_cpu_s:7.3f} s")
    for name in list(timings)[1:]:
        pairs = [a / b for a, b in zip(timings[first].samples_s, timings[name].samples_s, strict=True)]
        print(f"{first} / {name}, each pair: {', '.join(f'{pair:.2f}' for pair in pairs)}", flush=True)
    return timings


def row_of(batch_size: int, variant: str, timing: Timing, first: Timing, peak_gib: float | None, **more) -> dict:
    """What ``write_json`` takes of a variant, whose time is compared with that of the first one."""
    return {
        "batch_size": batch_size,
        "variant": variant,
        "median_s": timing.median_s,
        "p20_s": timing.percentile_s(20),
        "p80_s": timing.percentile_s(80),
        "samples_per_s": batch_size / timing.median_s,
        "peak_gib": peak_gib,
        "times_first": first.median_s / timing.median_s,
        **more,
    }


def peak_gib(script: str, name: str, *options: str) -> float:
    """The most memory that was resident in a process of its own, in which ``script --peak-of name`` says it."""
    command = [sys.executable, script, "--peak-of", name, *options]
    peak = float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    print(f"{name:10} {peak:6.2f} GiB at the peak", flush=True)
    return peak


def resident_gib() -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def report(figures: Sequence[Figure], is_check: bool, errors: Sequence[str] = ()) -> None:
    """Prints the figures; with ``is_check`` the exit status is 1 if one is missed or something failed."""
    for figure in figures:
        print(figure)
    for error in errors:
        print(f"failed: {error}")
    if is_check and (errors or any(figure.is_missed for figure in figures)):
        sys.exit(1)


def write_json(
    path: Path, title: str, rows: Iterable[Mapping], figures: Sequence[Figure], notes: Sequence[str] = ()
) -> None:
    """Writes what ``report.py`` reads: rows as of ``row_of``, or with an error in the place of times."""
    record = {
        "step": title,
        "machine": harness.machine(),
        "rows": list(rows),
        "notes": list(notes),
        "figures": [dataclasses.asdict(figure) | {"is_missed": figure.is_missed} for figure in figures],
    }
    path.write_text(json.dumps(record, indent=1))
