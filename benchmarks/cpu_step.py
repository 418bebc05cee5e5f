"""The packed step beside the original's, forward and backward, at the official sizes on a CPU.

    python benchmarks/cpu_step.py            # the figures
    python benchmarks/cpu_step.py --check    # and exit with 1 if one misses its target
    python benchmarks/cpu_step.py --demo     # at the demo's sizes, 32 pairs, without dropout; no target

4 pairs with captions of 24 to 60 tokens, 15 % of them masked, float32, dropout 0.1. Both steps run on one model, in
turn, without an optimiser; the figure is the ratio of the medians. A peak of memory is that of a process of its own:
the most that was resident during a step, with the model and its gradients. Takes about 10 minutes and 12 GB.
"""

import argparse
from functools import partial

import harness
import original_step
import whole_step
from whole_step import Figure, with_vocabulary

from fastm3ae.config.presets import preset

NUM_TOKENS, LENGTHS, NUM_MASKED = 64, (24, 33, 45, 60), 6


def original(model, batch):
    return sum(outputs.loss for _, outputs in original_step.passes(model, batch))


STEPS = {"original": original, "packed": whole_step.packed}


def ratio(model, batch, rounds: int) -> float:
    """How many times as fast the packed step is."""
    runs = {name: partial(whole_step.run, losses, model, batch) for name, losses in STEPS.items()}
    timings = whole_step.compare(runs, rounds)
    return timings["original"].median_s / timings["packed"].median_s


def print_demo(rounds: int) -> None:
    model = whole_step.make_model(with_vocabulary(preset("demo").model, 400))
    batch = original_step.make_batch(model.config, [16 + number % 12 for number in range(32)], 3, num_tokens=48)
    print(f"the step at the demo's sizes, 32 pairs, float32\n{harness.machine()}\n")
    print(f"\npacked step: {ratio(model, batch, rounds):.2f} times as fast as the original's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure misses its target")
    parser.add_argument("--rounds", type=int, help="measurements of each step (default: 5, of the demo 20)")
    parser.add_argument("--demo", action="store_true", help="at the demo's sizes")
    parser.add_argument("--peak-of", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.demo:
        return print_demo(arguments.rounds or 20)
    model = whole_step.make_model(with_vocabulary(preset("m3ae").model, 50265))
    batch = original_step.make_batch(model.config, LENGTHS, NUM_MASKED, NUM_TOKENS)
    if arguments.peak_of:
        for _ in range(2):
            whole_step.run(STEPS[arguments.peak_of], model, batch)
        return print(whole_step.resident_gib())

    print(f"the step at the official sizes, {len(LENGTHS)} pairs of {LENGTHS} tokens, float32\n{harness.machine()}\n")
    times_as_fast = ratio(model, batch, arguments.rounds or 5)
    del model
    peaks = {name: whole_step.peak_gib(__file__, name) for name in STEPS}
    print()
    figures = [
        Figure("the original's time over that of the packed step", times_as_fast, 1.4),
        Figure("the packed step's peak memory over the original's", peaks["packed"] / peaks["original"], 0.85, True),
    ]
    whole_step.report(figures, arguments.check)


if __name__ == "__main__":
    main()
