"""The end-to-end table on one GPU: the original's step and ours, optimiser included, at the official sizes.

    python benchmarks/gpu_step.py --check                  # everything; exits with 1 on a missed target or a failure
    python benchmarks/gpu_step.py --check --seconds 200    # begins nothing more after so long: compiling takes minutes
    python benchmarks/gpu_step.py --variants original packed --batch-sizes 64

The original: fp16 autocast with a gradient scaler and its AdamW (original_step.py), also with its passes compiled.
Ours: what ``fastm3ae pretrain --preset m3ae`` makes of a batch, in bf16 autocast with fused AdamW: the packed step,
with ``train.compiled``, with ``train.cuda_graphs``, and with both.

Captions have 20 to 60 tokens, of which 15 % are masked; 4 batches lie on the device and are taken in turn. All variants
make a step of 256 pairs in passes of 64, because the original's activations of all of them do not fit, or of half as
many as long as they find too little memory.

Each variant is prepared (two steps on each batch: compiled, recorded, its gradient scale found), then measured beside
the original, in turn, on the same batches, and freed. "of the original" is the ratio of those two medians, and what is
said against the compiled original is the ratio of two such ratios. Utilisation is what the packed step needs in FLOPs
(fastm3ae/training/flops.py) over the time and over the rate of a large product in bf16, measured first. Memory is the
most that the process reserved for the variant, model and optimiser included. The largest batch is that of one step in
one pass, found by doubling and halving.

Without a GPU: the demo's sizes in float32, what needs no GPU and does not compile, and no target.
"""

import argparse
import gc
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import whole_step
from original_step import OriginalStep, make_batch
from whole_step import Figure

from fastm3ae.config import M3AEConfig, PretrainConfig
from fastm3ae.config.presets import preset
from fastm3ae.data.batch import PretrainBatch
from fastm3ae.device import compute_dtype
from fastm3ae.model.m3ae import M3AE
from fastm3ae.training.distributed import Processes
from fastm3ae.training.flops import count_flops, model_without_values
from fastm3ae.training.loop import build_step
from fastm3ae.training.profile import measure_matmul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRESET, VOCAB_SIZE, NUM_TOKENS = {"cuda": ("m3ae", 50265, 64), "cpu": ("demo", 400, 48)}[DEVICE]
SHORTEST, LONGEST, MASKED_FRAC = 20, {"cuda": 60, "cpu": 40}[DEVICE], 0.15
NUM_BATCHES, NUM_PREPARING = 4, 8
BATCH_SIZES, MAX_PASS = {"cuda": ((256, 32), 64), "cpu": ((8,), 4)}[DEVICE]
MAX_BATCH = {"cuda": 2048, "cpu": 0}[DEVICE]
NUM_STEPS = 100_000  # of the schedule

# At how many times the original's speed, and of the compiled original's.
MUST, GOAL, MUST_COMPILED = {256: 2.0, 32: 2.5}, {256: 2.5, 32: 3.5}, 1.5
# What no step at this precision can reach; a figure above it says that the yardstick is wrong.
WALL = {256: 3.6}

Step = Callable[[list[PretrainBatch]], object]
"""Makes a step on the pieces of a batch."""


@dataclass(frozen=True)
class Variant:
    """A way to make a step.

    Args:
        make: Builds it.
        is_ours: Whether it is a step of ours.
        needs_gpu: Whether it records CUDA graphs.
        compiles: Whether it takes minutes to prepare.
    """

    make: Callable[[PretrainConfig, M3AE], Step]
    is_ours: bool = True
    needs_gpu: bool = False
    compiles: bool = False


def original(config: PretrainConfig, model: M3AE, compiled: bool) -> Step:
    step = OriginalStep(model, config.optim, NUM_STEPS, compiled)
    return lambda pieces: step(*pieces)


def packed(config: PretrainConfig, model: M3AE, **options: bool) -> Step:
    train = replace(config.train, device=DEVICE, micro_batch=MAX_PASS, **options)
    step = build_step(replace(config, train=train), model, NUM_STEPS, Processes(DEVICE))
    return lambda pieces: step(pieces, step.count(pieces))


YARDSTICK, COMPILED_YARDSTICK = "original", "original, compiled"
VARIANTS = {
    YARDSTICK: Variant(partial(original, compiled=False), is_ours=False),
    "packed": Variant(packed),
    "packed, CUDA graphs": Variant(partial(packed, cuda_graphs=True), needs_gpu=True),
    COMPILED_YARDSTICK: Variant(partial(original, compiled=True), is_ours=False, compiles=True),
    "packed, compiled, CUDA graphs": Variant(
        partial(packed, compiled=True, cuda_graphs=True), needs_gpu=True, compiles=True
    ),
    "packed, compiled": Variant(partial(packed, compiled=True), compiles=True),
}
DEFAULT_VARIANTS = [
    name for name, variant in VARIANTS.items() if DEVICE == "cuda" or not (variant.needs_gpu or variant.compiles)
]


@dataclass
class Contestant:
    """A variant that is ready to be measured.

    Args:
        step: Its step.
        batches: What it takes in turn, each in pieces.
        max_pass: Pairs of a pass.
        reserved_gib: The most memory that was reserved for it; None: unknown, on a CPU.
    """

    step: Step
    batches: list[list[PretrainBatch]]
    max_pass: int
    reserved_gib: float | None


@lru_cache(maxsize=2)  # the original's and another variant's
def make_batches(config: M3AEConfig, batch_size: int, max_pass: int, number: int) -> list[list[PretrainBatch]]:
    """Batches in pieces. The lengths of a batch do not depend on how it is divided."""
    batches = []
    for seed in range(number):
        lengths = np.random.default_rng(seed).integers(SHORTEST, LONGEST + 1, batch_size)
        num_masked = np.maximum(1, np.round(MASKED_FRAC * (lengths - 2)).astype(int))
        places = [slice(first, first + max_pass) for first in range(0, batch_size, max_pass)]
        pieces = [
            make_batch(config, lengths[at].tolist(), num_masked[at].tolist(), NUM_TOKENS, seed=at.start + seed)
            for at in places
        ]
        batches.append([piece.to(DEVICE) for piece in pieces])
    return batches


def free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def num_times_full() -> int:
    """How often the allocator had to give memory back and ask again."""
    return torch.cuda.memory_stats()["num_alloc_retries"] if DEVICE == "cuda" else 0


def prepare(config: PretrainConfig, name: str, batch_size: int) -> Contestant:
    """Makes a variant's first steps, in passes of half as many pairs as long as they find too little memory."""
    max_pass = min(batch_size, MAX_PASS)
    while True:
        free()
        try:
            return prepare_passes(config, name, batch_size, max_pass)
        except torch.OutOfMemoryError:
            if max_pass == 1:
                raise
        max_pass = -(-max_pass // 2)


def prepare_passes(config: PretrainConfig, name: str, batch_size: int, max_pass: int) -> Contestant:
    """Makes a variant's first steps, in passes of at most so many pairs."""
    batches = make_batches(config.model, batch_size, max_pass, NUM_BATCHES)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
    step = VARIANTS[name].make(config, whole_step.make_model(config.model, DEVICE))
    for number in range(NUM_PREPARING):
        step(batches[number % NUM_BATCHES])
    reserved_gib = (torch.cuda.max_memory_reserved() - before) / 2**30 if DEVICE == "cuda" else None
    return Contestant(step, batches, max_pass, reserved_gib)


def contest(
    config: PretrainConfig, name: str, batch_size: int, rounds: int, flops: float, matmul_flops_per_s: float
) -> dict[str, dict]:
    """Measures a variant beside the original: a row for each."""
    contestants = {each: prepare(config, each, batch_size) for each in dict.fromkeys([YARDSTICK, name])}
    runs = {each: whole_step.in_turn(contestant.step, contestant.batches) for each, contestant in contestants.items()}
    num_full = num_times_full()
    timings = harness.measure(runs, rounds, warm_up_rounds=1)
    if num_times_full() > num_full:
        print(f"{name} at {batch_size} pairs: memory ran full while it was measured, so that its times are too long")
    return {
        each: whole_step.row_of(
            batch_size,
            each,
            timing,
            timings[YARDSTICK],
            contestants[each].reserved_gib,
            max_pass=contestants[each].max_pass,
            utilisation=flops / timing.median_s / matmul_flops_per_s,
        )
        for each, timing in timings.items()
    }


def result_or_reason(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """What the function returns, or why it failed: what keeps a variant from running is a result of this benchmark."""
    try:
        return function(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        torch.compiler.reset()


def needed_flops(config: PretrainConfig, batch_size: int) -> float:
    """FLOPs of a packed step on the first of the batches."""
    ((batch,),) = make_batches(config.model, batch_size, batch_size, 1)
    batch, model = batch.to("meta"), model_without_values(config.model)
    losses = (("step", whole_step.packed(model, batch)) for _ in range(1))  # computed when it is asked for
    return count_flops(model, losses)["step"].total()


def largest_batch(config: PretrainConfig, name: str) -> int:
    """The most pairs of a step in one pass, within an eighth."""
    step = VARIANTS[name].make(config, whole_step.make_model(config.model, DEVICE))

    def fits(batch_size: int) -> bool:
        free()
        try:
            step(make_batches(config.model, batch_size, batch_size, 1)[0])
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return False
        return True

    low, high = 0, 32
    while high <= MAX_BATCH and fits(high):
        low, high = high, 2 * high
    while low and high - low > low // 8:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


HEADER = (
    f"{'pairs':>5} {'variant':30} {'a pass':>6} {'median ms':>10} {'p20':>9} {'p80':>9} {'samples/s':>10} "
    f"{'utilisation':>11} {'GiB':>6} {'of the original':>16}"
)


def format_row(row: dict) -> str:
    start = f"{row['batch_size']:5} {row['variant']:30}"
    if "error" in row:
        return f"{start} failed: {row['error']}"
    median, p20, p80 = (row[key] * 1e3 for key in ("median_s", "p20_s", "p80_s"))
    peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
    return (
        f"{start} {row['max_pass']:6} {median:10.2f} {p20:9.2f} {p80:9.2f} {row['samples_per_s']:10.1f} "
        f"{row['utilisation']:11.1%} {peak:>6} {row['times_first']:15.2f}x"
    )


def figures_of(rows: Mapping[tuple[int, str], dict], batch_sizes: Sequence[int]) -> list[Figure]:
    """The best of ours beside each target of a GPU."""
    figures = []
    for batch_size in (size for size in batch_sizes if size in MUST):
        times = {
            name: rows[batch_size, name]["times_first"]
            for name in VARIANTS
            if "times_first" in rows.get((batch_size, name), {})
        }
        best = max((name for name in times if VARIANTS[name].is_ours), key=times.get, default=None)
        ratio, compiled = times.get(best), times.get(COMPILED_YARDSTICK)
        what = f"{batch_size} pairs, {best or 'ours'}"
        wall = WALL.get(batch_size, math.inf)
        note = f"; {wall} IS THE WALL: THE YARDSTICK IS WRONG" if ratio and ratio > wall else ""
        goal = f"goal: {GOAL[batch_size]}{note}"
        figures.append(Figure(f"{what}, times as fast as the original ({goal})", ratio, MUST[batch_size]))
        versus = ratio / compiled if ratio and compiled else None
        figures.append(Figure(f"{what}, times as fast as the original compiled", versus, MUST_COMPILED))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed or a variant fails")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES, help="default: %(default)s")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=DEFAULT_VARIANTS, help="default: all")
    parser.add_argument("--rounds", type=int, default=8, help="measured steps of each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing more after so long")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    start = time.perf_counter()

    config = preset(PRESET)
    model_config = whole_step.with_vocabulary(config.model, VOCAB_SIZE)
    config = replace(config, model=model_config, optim=preset("m3ae").optim)
    title = f"M3AE's step with its optimiser, preset {PRESET}, {DEVICE}"
    print(f"{title}\n{harness.machine()}")
    matmul_flops_per_s = measure_matmul(torch.device(DEVICE), compute_dtype(config.train, torch.device(DEVICE)))
    notes = [f"a large product: {matmul_flops_per_s / 1e12:.4g} TFLOP/s"]
    if left_out := [name for name in VARIANTS if name not in arguments.variants]:
        notes.append(f"left out: {'; '.join(left_out)}")
    print("\n".join(notes))
    others = [name for name in VARIANTS if name in arguments.variants and name != YARDSTICK] or [YARDSTICK]
    flops = {batch_size: needed_flops(config, batch_size) for batch_size in arguments.batch_sizes}
    rows: dict[tuple[int, str], dict] = {}
    errors, no_time = [], []

    def has_time(what: str) -> bool:
        if time.perf_counter() - start < arguments.seconds:
            return True
        no_time.append(what)
        return False

    def save() -> list[Figure]:
        figures = figures_of(rows, arguments.batch_sizes) if DEVICE == "cuda" else []
        if arguments.json:
            whole_step.write_json(arguments.json, title, rows.values(), figures, notes)
        return figures

    def measure(names: Sequence[str]) -> None:
        for name, batch_size in itertools.product(names, arguments.batch_sizes):
            what = f"{name} at {batch_size} pairs"
            if not has_time(what):
                continue
            of_step = arguments.rounds, flops[batch_size], matmul_flops_per_s
            found, reason = result_or_reason(partial(contest, config, name, batch_size, *of_step))
            free()
            if reason:
                errors.append(what)
                found = {name: {"batch_size": batch_size, "variant": name, "error": reason}}
            for each, row in found.items():
                if (batch_size, each) not in rows:
                    rows[batch_size, each] = row
                    print(format_row(row), flush=True)
            save()  # each time, because this may be stopped

    print(f"\n{HEADER}")
    measure([name for name in others if not VARIANTS[name].compiles])
    for name in (YARDSTICK, "packed") if DEVICE == "cuda" else ():
        what = f"the largest batch of one pass, {name}"
        if name in arguments.variants and has_time(what):
            size, reason = result_or_reason(partial(largest_batch, config, name))
            free()
            notes.append(f"{what}: {reason or f'{size} pairs'}")
            print(notes[-1], flush=True)
            if reason:
                errors.append(what)
    measure([name for name in others if VARIANTS[name].compiles])

    if no_time:
        notes.append(f"no time left for: {'; '.join(no_time)}")
        print(notes[-1])
    print()
    whole_step.report(save(), arguments.check, errors)


if __name__ == "__main__":
    main()
