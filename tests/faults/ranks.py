"""Two processes that train together under torchrun, of which one is killed."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from faults.processes import ENVIRONMENT, wait_until
from faults.scenarios import moment
from faults.story import ENDS_IN_S, Scene, Story
from runs import command


class Launcher:
    """torchrun with two processes of the command; looks to a story like one process.

    Args:
        arguments: Those of the command.
        folder: Where each process's output goes.
        max_restarts: How often torchrun starts both again after a failure.
    """

    def __init__(self, arguments: list[str], folder: Path, max_restarts: int = 0) -> None:
        self._folder = folder
        folder.mkdir()
        options = {"nproc-per-node": 2, "max-restarts": max_restarts, "log-dir": folder, "redirects": 3}
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        with (folder / "torchrun.txt").open("wb") as log:
            self._process = subprocess.Popen(
                [*launch, "-m", "fastm3ae", *arguments], stdout=log, stderr=log, start_new_session=True,
                env=os.environ | ENVIRONMENT,
            )  # fmt: skip
        self.pid = self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status of torchrun."""
        return self._process.poll()

    @property
    def outputs(self) -> list[str]:
        """What the processes printed, at each attempt."""
        attempts = sorted({path.parents[1] for path in self._folder.rglob("std*.log")})
        return ["".join(path.read_text() for path in sorted(attempt.rglob("std*.log"))) for attempt in attempts]

    @property
    def output(self) -> str:
        """What they printed at the last attempt."""
        return (self.outputs or [""])[-1]

    def ranks(self) -> dict[int, int]:
        """Returns the ids of the processes by their ranks."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended
                parent = re.sub(r".*\)", "", (path / "stat").read_text(), flags=re.DOTALL).split()[1]
                rank = re.search(rb"\0RANK=(\d+)\0", (path / "environ").read_bytes())
                if int(parent) == self.pid and rank is not None:
                    found[int(rank[1])] = int(path.name)
        return found

    def signal(self, number: int, to_group: bool = False) -> None:
        """Sends a signal to torchrun; to_group: and to its processes."""
        for pid in [self.pid, *(self.ranks().values() if to_group else [])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def rank_killed(scene: Scene, name: str) -> Story:
    """One of two is killed: in turn with DDP and FSDP2, with torchrun's restart and without."""
    number = int(name.split()[-1])
    parallel, max_restarts = ("ddp", "fsdp")[number % 2], number // 2 % 2
    story = Story(scene, name, train={"parallel": parallel})
    # With a restart, the command is a new run's: that there is something to resume is found by the restart itself.
    arguments = story.arguments(*(["--train.num-workers", "0"] if max_restarts else []))
    process = Launcher(arguments, story.folder / "log_1", max_restarts)
    story.wait(process, lambda: len(process.ranks()) == 2 and story.step(process.output) >= 0)
    ranks = process.ranks()
    story.groups += ranks.values()
    if moment(story, process, "any any writing"):
        story.fault()
        with contextlib.suppress(ProcessLookupError, KeyError):
            os.kill(ranks[story.rng.randrange(2)], signal.SIGKILL)
    story.ended(process, *([0] if max_restarts else [0, 1]))
    if not story.statuses[0]:
        story.ended(Launcher(story.arguments(), story.folder / "log_2"), 0)
    story.compare(_reference(scene, parallel))
    return story


def _reference(scene: Scene, parallel: str) -> Path:
    """Returns the folder of a run of two processes to which nothing happened."""
    story = Story(scene, f"reference_{parallel}", train={"parallel": parallel})
    if not story.run.exists():
        process = Launcher(command(story.folder, **story.changes), story.folder / "log")
        assert wait_until(lambda: process.status is not None, ENDS_IN_S) and process.status == 0, process.output
    return story.run
