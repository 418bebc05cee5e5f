"""What the loop costs beside the steps, on the demo's model and data.

    python benchmarks/training_loop.py                      # the table
    python benchmarks/training_loop.py --check              # and exit with 1 when one of the two targets is missed

Bookkeeping: the time in metrics, metrics.jsonl, TensorBoard and the progress bar, over the time of the steps; logged
every 10 steps as in the demo's preset. Checkpoints: how long the loop stands still for one, over the time of copying
the same state (weights, optimiser, random states) alone, both measured at the same step; files are written meanwhile.
"""

import argparse
import contextlib
import dataclasses
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import harness
from tqdm import tqdm

from fastm3ae.presets import preset
from fastm3ae.training.checkpoint import Checkpointer, copy_to_host
from fastm3ae.training.loop import Trainer
from fastm3ae.training.meter import Meter
from fastm3ae.training.pretrain import pretrain
from fastm3ae.training.run_folder import RunFolder
from fastm3ae.training.step import OptimizerStep

MAX_BOOKKEEPING_FRAC = 0.01
MAX_BLOCKED_RATIO = 1.5  # of two times that are equal but for noise and a few Python objects
BOOKKEEPING = ((Meter, "add"), (Meter, "read"), (RunFolder, "log"), (tqdm, "update"), (tqdm, "set_postfix_str"))
NUM_WARM_UP = 2  # the first checkpoint allocates the memory that later ones are copied to


class Clock:
    """Durations of calls, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def timed(self, name, function):
        def call(*arguments, **options):
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds.setdefault(name, []).append(time.perf_counter() - start)

        return call

    def watch(self, owner: type, method: str) -> None:
        setattr(owner, method, self.timed(f"{owner.__name__}.{method}", getattr(owner, method)))


def watch(clock: Clock) -> None:
    """Has the clock take the time of steps, of bookkeeping, and of checkpoints and the copy of the same state."""
    for owner, method in (*BOOKKEEPING, (OptimizerStep, "__call__"), (Trainer, "_next")):
        clock.watch(owner, method)
    save, save_state, memory = clock.timed("blocked", Trainer._save), Checkpointer.save, {}

    def copy():
        memory["copy"] = clock.timed("copy", copy_to_host)(memory["state"], memory.get("copy"))

    def save_and_copy(trainer, is_best=False):
        # In turn, because the second finds the state in the caches.
        copies_first = len(clock.seconds.get("blocked", ())) % 2
        if copies_first:
            copy()
        save(trainer, is_best)
        trainer.checkpointer.wait()  # else writing and copying would share the cores
        if not copies_first:
            copy()

    def keep_state(checkpointer, step, model, state, is_best):
        memory["state"] = {"weights": model.state_dict(), "state": state}
        save_state(checkpointer, step, model, state, is_best)

    Trainer._save, Checkpointer.save = save_and_copy, keep_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument("--steps", type=int, default=80, help="steps of the run (default: %(default)s)")
    arguments = parser.parse_args()
    clock = Clock()
    watch(clock)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        config = preset("demo")
        root = Path(folder) / "corpus"
        train = dataclasses.replace(
            config.train, num_steps=arguments.steps, save_every_steps=5, max_val_batches=1, num_pictures=0
        )
        data = dataclasses.replace(config.data, root=str(root), tokenizer=str(root / "tokenizer"))
        pretrain(dataclasses.replace(config, output=f"{folder}/run", train=train, data=data))

    seconds = clock.seconds
    step_s = (sum(seconds["OptimizerStep.__call__"]) + sum(seconds["Trainer._next"])) / arguments.steps
    print(f"training loop of the demo, {arguments.steps} steps\n{harness.machine()}\n")
    print(f"{'step, with its data':28} {step_s * 1e3:9.3f} ms")
    total_s = 0.0
    for name in (f"{owner.__name__}.{method}" for owner, method in BOOKKEEPING):
        per_step_s = sum(seconds[name]) / arguments.steps
        total_s += per_step_s
        print(f"{name:28} {per_step_s * 1e3:9.3f} ms a step, in {len(seconds[name])} calls")
    blocked_s, copy_s = (statistics.median(seconds[name][NUM_WARM_UP:]) for name in ("blocked", "copy"))
    print(f"{'checkpoint: loop stands still':28} {blocked_s * 1e3:8.3f} ms, median of {len(seconds['blocked'])}")
    print(f"{'copy of the state alone':28} {copy_s * 1e3:9.3f} ms")
    frac, ratio = total_s / (step_s + total_s), blocked_s / copy_s
    print(
        f"\nbookkeeping {frac:.2%} of a step (target: below {MAX_BOOKKEEPING_FRAC:.0%}); "
        f"a checkpoint blocks for {ratio:.2f} times the copy (target: at most {MAX_BLOCKED_RATIO})"
    )
    if arguments.check and (frac >= MAX_BOOKKEEPING_FRAC or ratio > MAX_BLOCKED_RATIO):
        sys.exit(1)


if __name__ == "__main__":
    main()
