"""Breaks runs in every way that machines do, and compares what became of them with a run that nothing happened to.

    python tests/faults/campaign.py                                  # the table
    python tests/faults/campaign.py --check                          # and exit with 1 if any run is not as it was
    python tests/faults/campaign.py --only kill ranks --kills 20     # some scenarios
    python tests/faults/campaign.py --only kill --trial 7 --seed 3   # that trial again

A tiny model trains for 14 steps, saves every 3 and validates every 5. A trial starts such a run, does something to it
at random moments, goes on with ``--resume auto`` until it is complete, and compares losses and metrics, final and best
weights, the optimiser's state and which checkpoints were kept, bit for bit. At most two intervals of checkpoints may be
lost: they are written while training goes on, so that a run which dies meanwhile has the one before. A checkpoint that
was once there must be found again. Linux only.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from faults import ranks, scenarios
from faults.processes import prepare
from faults.story import BOUND, Scene, Story

# What is told in each scenario, and how often at least; each goes on until it had the faults that it shall have.
SCENARIOS = {
    "kill": (scenarios.kill, 1),
    "full_disk": (scenarios.full_disk, 24),
    "full_file_system": (scenarios.full_file_system, 8),
    "damage": (scenarios.damage, 32),
    "worker": (scenarios.worker, 12),
    "signals": (scenarios.signals, 24),
    "corrupt": (scenarios.corrupt, 6),
    "ranks": (ranks.rank_killed, 8),
}


def tell(scene: Scene, name: str, arguments: argparse.Namespace) -> list[Story]:
    """Tells the stories of a scenario, and says at once where one went wrong."""
    tell_one, number = SCENARIOS[name]
    stories: list[Story] = []

    def num_missing() -> int:
        """Returns how many faults are missing: of one, or of the kills, half of them while a checkpoint is written."""
        num = sum(story.faults for story in stories)
        if name != "kill":
            return 1 - num
        return arguments.kills - min(num, 2 * sum(story.while_writing for story in stories))

    # A run may end before its fault, and a kill may miss the writing.
    least = min(number, arguments.trials or number)
    most = 9 + (arguments.kills if name == "kill" else least)
    for trial in range(most) if arguments.trial is None else [arguments.trial]:
        if arguments.trial is None and trial >= least and num_missing() <= 0:
            break
        stories.append(tell_one(scene, f"{name} {arguments.seed} {trial}"))
        if trial == most - 1 and num_missing() > 0:
            stories[-1].wrong.append(f"{num_missing()} faults are missing")
        if stories[-1].wrong:
            again = f"python tests/faults/campaign.py --seed {arguments.seed} --only {name} --trial {trial}"
            print(f"{stories[-1].folder}: {'; '.join(stories[-1].wrong)}\nagain: {again}", file=sys.stderr)
        else:
            shutil.rmtree(stories[-1].folder)
    return stories


def row(name: str, stories: Sequence[Story], seconds: float) -> str:
    """Returns a scenario's row of the table."""
    statuses = sum((story.statuses for story in stories), Counter())
    steps = [step for story in stories for step in story.resumed_from]
    lost = [steps for story in stories for steps in story.lost]
    wrong = [fault for story in stories for fault in story.wrong]
    cells = [
        name.replace("_", " "),
        len(stories),
        sum(story.faults for story in stories),
        sum(story.while_writing for story in stories),
        f"{min(steps)} to {max(steps)}" if steps else "",
        max(lost, default=0),
        ", ".join(f"{status} ({count})" for status, count in sorted(statuses.items())),
        sum("not the uninterrupted run" in fault for fault in wrong),
        sum("a traceback" in fault for fault in wrong),
        len(wrong),
        f"{max((s for story in stories for s in story.ended_in_s), default=0):.1f} s",
        f"{seconds:.0f} s",
    ]
    return f"| {' | '.join(map(str, cells))} |"


HEADER = (
    "scenario", "trials", "faults", "while a checkpoint was written", "resumed from step", "steps lost at most",
    "exit statuses", "unequal runs", "tracebacks", "anything wrong", "ended after a fault within", "time",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if anything is wrong")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=100, help="so many in the scenario kill, half of them in writing")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="NAME")
    parser.add_argument("--trials", type=int, help="of each other scenario, at most, but for the first fault")
    parser.add_argument("--trial", type=int, help="this trial alone")
    parser.add_argument("--steps", type=int, default=14, help="of each run")
    parser.add_argument("--plant", help="a fault of the program: see planted.py")
    chosen = parser.parse_args(arguments)
    began = time.monotonic()
    prepare()
    root = Path(tempfile.mkdtemp(prefix="fastm3ae_faults_"))
    scene = Scene(root, chosen.plant, chosen.steps)
    scene.reference()
    print(f"seed {chosen.seed}, runs of {chosen.steps} steps, torch {torch.__version__}, {commit()}\n")
    print(f"| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}")
    told: list[Story] = []
    for name in chosen.only:
        if name == "full_file_system" and not scenarios.can_mount(root / "corpus"):
            print(f"| {name.replace('_', ' ')} | left out: this process may not mount a file system |")
            continue
        start = time.monotonic()
        stories = tell(scene, name, chosen)
        print(row(name, stories, time.monotonic() - start), flush=True)
        told += stories
    wrong = sum(bool(story.wrong) for story in told)
    if not wrong:
        shutil.rmtree(root)
    print(f"\nsteps lost: the bound is {BOUND}, two intervals; one more where the newest checkpoint was damaged")
    print(f"{time.monotonic() - began:.0f} s in all")
    print(
        f"{sum(story.faults for story in told)} faults in {len(told)} runs: {wrong} runs did not become the "
        "uninterrupted one, without a traceback and within the bound (target 0)"
    )
    return int(chosen.check and (wrong > 0 or not told))


def commit() -> str:
    """Returns which version is tested."""
    folder = Path(__file__).parent
    described = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return f"commit {described.stdout.strip() or 'unknown'}"


if __name__ == "__main__":
    sys.exit(main())
