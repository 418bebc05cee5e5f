"""The packed step beside the original's, forward and backward, at the official sizes on a CPU.

    python benchmarks/cpu_step.py            # the figures
    python benchmarks/cpu_step.py --check    # and exit with 1 if one misses its target
    python benchmarks/cpu_step.py --demo     # at the demo's sizes, 32 pairs, without dropout; no target

4 pairs with captions of 24 to 60 tokens, 15 % of them masked, float32, dropout 0.1. Both steps run on one model, in
turn, without an optimiser; the figure is the ratio of the medians. A peak of memory is that of a process of its own:
the most that was resident during a step, with the model and its gradients. Takes about 10 minutes and 12 GB.
"""

import argparse
import dataclasses
import subprocess
import sys
from functools import partial
from pathlib import Path

import harness
import original_step
import torch

from fastm3ae import objectives
from fastm3ae.config import M3AEConfig
from fastm3ae.model.m3ae import M3AE
from fastm3ae.presets import preset

NUM_TOKENS, LENGTHS, NUM_MASKED = 64, (24, 33, 45, 60), 6
MIN_RATIO, MAX_MEMORY_FRAC = 1.4, 0.85


def make_model(name: str, vocab_size: int) -> M3AE:
    run = preset(name)
    text = dataclasses.replace(run.model.text, vocab_size=vocab_size, pad_token_id=1)
    config: M3AEConfig = dataclasses.replace(run.model, text=text)
    torch.manual_seed(0)
    return M3AE(config).train()


def original(model, batch):
    return sum(outputs.loss for _, outputs in original_step.passes(model, batch))


def packed(model, batch):
    return objectives.total(objectives.losses(model(batch), batch, model.config))


STEPS = {"original": original, "packed": packed}


def run(losses, model, batch):
    model.zero_grad(set_to_none=True)
    losses(model, batch).backward()


def compare(model, batch, rounds: int) -> float:
    """How many times as fast the packed step is."""
    runs = {name: partial(run, losses, model, batch) for name, losses in STEPS.items()}
    timings = harness.measure(runs, rounds, warm_up_rounds=2)
    for name, timing in timings.items():
        spread = f"20 %: {timing.percentile_s(20):.2f}, 80 %: {timing.percentile_s(80):.2f}"
        print(f"{name:10} {timing.median_s:6.2f} s ({spread}), of the processors {timing.median_cpu_s:6.2f} s")
    pairs = [a / b for a, b in zip(*(timing.samples_s for timing in timings.values()), strict=True)]
    print(f"ratio of each pair: {', '.join(f'{pair:.2f}' for pair in pairs)}", flush=True)
    return timings["original"].median_s / timings["packed"].median_s


def print_demo(rounds: int) -> None:
    model = make_model("demo", vocab_size=400)
    batch = original_step.make_batch(model.config, [16 + number % 12 for number in range(32)], 3, num_tokens=48)
    print(f"the step at the demo's sizes, 32 pairs, float32\n{harness.machine()}\n")
    ratio = compare(model, batch, max(rounds, 20))
    print(f"\npacked step: {ratio:.2f} times as fast as the original's")


def peak_gib(name: str) -> float:
    """Runs two steps in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", name]
    peak = float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    print(f"{name:10} {peak:6.2f} GiB at the peak", flush=True)
    return peak


def resident_gib() -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure misses its target")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each step (default: %(default)s)")
    parser.add_argument("--demo", action="store_true", help="at the demo's sizes")
    parser.add_argument("--peak-of", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.demo:
        return print_demo(arguments.rounds)
    model = make_model("m3ae", vocab_size=50265)
    batch = original_step.make_batch(model.config, LENGTHS, NUM_MASKED, NUM_TOKENS)
    if arguments.peak_of:
        for _ in range(2):
            run(STEPS[arguments.peak_of], model, batch)
        return print(resident_gib())

    print(f"the step at the official sizes, {len(LENGTHS)} pairs of {LENGTHS} tokens, float32\n{harness.machine()}\n")
    ratio = compare(model, batch, arguments.rounds)
    del model
    peaks = {name: peak_gib(name) for name in STEPS}
    frac = peaks["packed"] / peaks["original"]
    print(f"\npacked step: {ratio:.2f} times as fast as the original's (target: {MIN_RATIO})")
    print(f"packed step: {frac:.2f} of its peak memory (target: {MAX_MEMORY_FRAC})")
    if arguments.check and (ratio < MIN_RATIO or frac > MAX_MEMORY_FRAC):
        sys.exit(1)


if __name__ == "__main__":
    main()
