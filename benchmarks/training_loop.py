"""What the loop costs beside the steps, on the demo's model and data.

    python benchmarks/training_loop.py                      # the table
    python benchmarks/training_loop.py --check              # and exit with 1 when one of the two targets is missed

Bookkeeping: the time in metrics, metrics.jsonl, TensorBoard and the progress bar, over the time of the steps; logged
every 10 steps as in the demo's preset. Checkpoints: how long the loop stands still for one, and by how much longer the
steps take beside which one is written, over the time of the steps from one checkpoint of the demo to the next. They are
written much more often here, so that there are many.
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

from fastm3ae.config.presets import preset
from fastm3ae.training.loop import Trainer
from fastm3ae.training.meter import Meter
from fastm3ae.training.nonfinite import Nonfinite
from fastm3ae.training.pretrain import pretrain
from fastm3ae.training.run_folder import RunFolder
from fastm3ae.training.step import OptimizerStep

MAX_BOOKKEEPING_FRAC, MAX_CHECKPOINT_FRAC = 0.01, 0.02
BOOKKEEPING = ((Meter, "add"), (Meter, "settle"), (Meter, "read"), (Nonfinite, "end_step"), (Nonfinite, "read"),
               (RunFolder, "log"), (tqdm, "update"), (tqdm, "set_postfix_str"))  # fmt: skip
SAVE_EVERY_STEPS = 8
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


def watch(clock: Clock, checkpoints: Path) -> list[bool]:
    """Has the clock take the time of steps, of bookkeeping and of checkpoints.

    Returns a list to which each step adds whether a checkpoint was being written when it began.
    """
    is_writing: list[bool] = []
    for owner, method in (*BOOKKEEPING, (Trainer, "_next"), (Trainer, "_save")):
        clock.watch(owner, method)
    step = clock.timed("step", OptimizerStep.__call__)

    def noted_step(*arguments):
        is_writing.append(any(checkpoints.glob(".step_*")))
        return step(*arguments)

    OptimizerStep.__call__ = noted_step
    return is_writing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument("--steps", type=int, default=160, help="steps of the run (default: %(default)s)")
    arguments = parser.parse_args()
    clock, config = Clock(), preset("demo")
    cadence = min(config.train.save_every_steps, config.train.validate_every_steps)  # the best ones are saved, too
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        root = Path(folder) / "corpus"
        is_writing = watch(clock, Path(folder) / "run" / "checkpoints")
        train = dataclasses.replace(
            config.train,
            num_steps=arguments.steps,
            save_every_steps=SAVE_EVERY_STEPS,
            max_val_batches=1,
            num_pictures=0,
        )
        data = dataclasses.replace(config.data, root=str(root), tokenizer=str(root / "tokenizer"))
        pretrain(dataclasses.replace(config, output=f"{folder}/run", train=train, data=data))

    seconds = clock.seconds
    step_s = (sum(seconds["step"]) + sum(seconds["Trainer._next"])) / arguments.steps
    print(f"training loop of the demo, {arguments.steps} steps\n{harness.machine()}\n")
    print(f"{'step, with its data':36} {step_s * 1e3:9.3f} ms")
    total_s = 0.0
    for name in (f"{owner.__name__}.{method}" for owner, method in BOOKKEEPING):
        per_step_s = sum(seconds[name]) / arguments.steps
        total_s += per_step_s
        print(f"{name:36} {per_step_s * 1e3:9.3f} ms a step, in {len(seconds[name])} calls")
    saves = seconds["Trainer._save"][NUM_WARM_UP:]
    blocked_s = statistics.median(saves)
    steps = list(zip(seconds["step"], is_writing, strict=True))[NUM_WARM_UP * SAVE_EVERY_STEPS :]
    alone, beside = ([s for s, writes in steps if writes is wanted] for wanted in (False, True))
    slower_s = 0.0
    if beside:  # else each was written before the next step began
        slower_s = (statistics.mean(beside) - statistics.mean(alone)) * len(beside) / len(saves)
    print(f"{'checkpoint: loop stands still':36} {blocked_s * 1e3:9.3f} ms, median of {len(saves)}")
    print(
        f"{'checkpoint: steps beside its writing':36} {slower_s * 1e3:9.3f} ms longer, "
        f"{len(beside)} of them beside {len(saves)} checkpoints"
    )
    bookkeeping, checkpoint = total_s / (step_s + total_s), (blocked_s + max(0.0, slower_s)) / (cadence * step_s)
    print(
        f"\nbookkeeping {bookkeeping:.2%} of a step (target: below {MAX_BOOKKEEPING_FRAC:.0%}); a checkpoint every "
        f"{cadence} steps {checkpoint:.2%} (target: below {MAX_CHECKPOINT_FRAC:.0%})"
    )
    if arguments.check and (bookkeeping >= MAX_BOOKKEEPING_FRAC or checkpoint >= MAX_CHECKPOINT_FRAC):
        sys.exit(1)


if __name__ == "__main__":
    main()
