"""One run from its start through its faults to its end, and whether it became the run that nothing had happened to."""

import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

from faults.processes import STARTED, Process, group, wait_until
from runs import TRAIN as TINY
from runs import command, write_corpus
from safetensors.numpy import load_file

SAVE_EVERY = 3
# Checkpoints fall into epochs (of 3 batches), logged windows and between validations; two passes a step.
TRAIN = {**TINY, "num_steps": 14, "micro_batch": 5, "log_every_steps": 2, "validate_every_steps": 5,
         "save_every_steps": SAVE_EVERY, "keep_checkpoints": 2, "num_pictures": 1}  # fmt: skip
BOUND = 2 * SAVE_EVERY
"""Steps that may be lost: a run that is killed while it writes a checkpoint has the one before."""
ENDS_IN_S = 240
"""No process may take longer to its end, after a fault or without one, on however busy a machine."""
ORPHANS_END_IN_S = 30
CLOCKS = ("samples_per_s", "data_wait_frac", "wall_s")


class Scene:
    """Where stories happen: the corpus, and runs that nothing happens to.

    Args:
        root: A folder.
        plant: A fault of the program that all stories' processes have: see ``faults.planted``.
        num_steps: Of each run.
    """

    def __init__(self, root: Path, plant: str | None = None, num_steps: int = TRAIN["num_steps"]) -> None:
        self.root, self.plant, self.train = root, plant, {**TRAIN, "num_steps": num_steps}
        self.seconds = 0.0  # of a whole run
        self.corpus = root / "corpus"
        self.corpus.mkdir()
        write_corpus(self.corpus)

    def reference(self, name: str = "plain", corpus: Path | None = None, **changes) -> Path:
        """Returns the folder of a run that nothing happened to; it is made when it is first asked for."""
        folder = self.root / f"reference_{name}"
        if not folder.exists():
            shutil.copytree(corpus or self.corpus, folder)
            began = time.monotonic()
            process = Process(command(folder, **{**changes, "train": {**self.train, **changes.get("train", {})}}))
            assert wait_until(lambda: process.status is not None, ENDS_IN_S) and process.status == 0, process.output
            self.seconds = self.seconds or time.monotonic() - began
        return folder / "run"


class Story:
    """A run, its processes, and what was seen of them.

    Attributes:
        folder: Holds the corpus and the run folder.
        run: The run folder.
        num_steps: Of the run.
        rng: For what happens in it.
        faults: How many have happened, and ``while_writing`` how many of them while a checkpoint was written.
            made: Steps that were made, as far as processes have said it.
        resumed_from: Steps at which processes went on.
        lost: Steps that they had to make again.
        statuses: Exit statuses seen.
        ended_in_s: How long processes took to end after a fault.
        wrong: Sentences on what must not be.
        groups: Leaders of the groups of processes that have been started.
        is_heard: Whether what processes say can be read.

    Args:
        scene: Where it happens.
        name: Of its folder.
        seed: Of its random numbers.
        corpus: The data; None: the scene's.
        folder: Holds it all; None: a folder of the scene.
        changes: Of the configuration.
    """

    def __init__(self, scene: Scene, name: str, corpus: Path | None = None, folder: Path | None = None, **changes):
        self.scene, self.rng = scene, random.Random(name)
        self.folder = folder or scene.root / name.replace(" ", "_")
        shutil.copytree(corpus or scene.corpus, self.folder, dirs_exist_ok=True)
        self.run = self.folder / "run"
        self.changes = {**changes, "train": {**scene.train, **changes.get("train", {})}}
        self.num_steps = self.changes["train"]["num_steps"]
        self.faults = self.while_writing = 0
        self.resumed_from: list[int] = []
        self.lost: list[int] = []
        self.statuses: Counter[int] = Counter()
        self.ended_in_s: list[float] = []
        self.wrong: list[str] = []
        self.made = self._published = self._was_published = 0
        self._bound = BOUND
        self.groups: list[int] = []
        self.is_heard = True
        self._faulted: float | None = None

    # What happens.

    def start(self, *arguments: str, log: Path | None = None) -> Process:
        """Starts the command, which goes on with what there is."""
        self._faulted, self._was_published = None, self._published
        process = Process(self.arguments(*arguments), self.scene.plant, log)
        self.wait(process, lambda: STARTED in process.output)
        return process

    def arguments(self, *arguments: str) -> list[str]:
        """Returns the command's arguments."""
        return command(self.folder, *(arguments or ("--resume", "auto")), **self.changes)

    def wait(self, process, condition=lambda: False, seconds: float = ENDS_IN_S) -> bool:
        """Returns whether a condition came true while the process was running; watches its checkpoints."""

        def is_over() -> bool:
            self._published = max(self._published, *self.checkpoints(), 0)
            return process.status is not None or condition()

        if not wait_until(is_over, seconds) and seconds >= ENDS_IN_S:
            self.wrong.append(f"a process did not end in {ENDS_IN_S} s: {process.output[-1200:]}")
            process.signal(signal.SIGKILL, to_group=True)
        return process.status is None

    def fault(self) -> None:
        """Notes that one happens now."""
        self.faults += 1
        self.while_writing += self.is_writing()
        self._faulted = time.monotonic()

    def forgive(self, intervals: int, is_damaged: bool = False) -> None:
        """Notes that so many intervals more may be lost; and whether checkpoints were damaged."""
        self._bound = BOUND + intervals * SAVE_EVERY
        self._published *= not is_damaged

    def ended(self, process, *allowed: int) -> int:
        """Waits for the end of a process, looks at what it left behind, and returns its exit status."""
        self.wait(process)
        if self._faulted is not None:
            self.ended_in_s.append(time.monotonic() - self._faulted)
        output = process.output
        status = process.status if process.status is not None else -signal.SIGKILL
        self.statuses[status] += 1
        self.groups.append(process.pid)
        if status not in allowed:
            self.wrong.append(f"exit status {status}, expected {' or '.join(map(str, allowed))}: {output[-1200:]}")
        if "Traceback" in output and status != -signal.SIGKILL:  # then it is of a worker, whom nobody listens to
            self.wrong.append(f"a traceback: {output[output.rindex('Traceback') :][-1200:]}")
        if status == 2 and self.is_heard and len(re.findall(r"^(?:rank \d+: )?error: ", output, re.MULTILINE)) != 1:
            self.wrong.append(f"not one sentence: {output[-1200:]}")
        for attempt in process.outputs:
            self._look_at(attempt)
        return status

    def _look_at(self, output: str) -> None:
        """Notes from where a process went on, and how far it came."""
        begun = re.search(r"run: going on from step_(\d+)|run: (nothing) to resume yet", output)
        step = int(begun[1] or 0) if begun is not None else 0
        if begun is not None and (self.made or self.resumed_from):
            self.resumed_from.append(step)
            self.lost.append(max(0, self.made - step))
            if self.lost[-1] > self._bound:
                self.wrong.append(f"{self.lost[-1]} steps were lost: {self.made} were made, and it went on from {step}")
            if step < self._was_published:
                self.wrong.append(f"step_{self._was_published:06d} was there, and it went on from {step}")
            self._bound = BOUND
        if self.step(output) >= 0:
            self.made = self.step(output)

    def finish(self, reference: Path) -> None:
        """Lets the run end, and compares it."""
        if self.statuses[0] == 0:
            self.ended(self.start(), 0)
        self.compare(reference)

    def compare(self, reference: Path) -> None:
        """Compares the run with one that nothing happened to, and waits for processes that were left behind."""
        if self.statuses[0] and (found := differences(self.run, reference)):
            self.wrong.append(f"is not the uninterrupted run: {'; '.join(found)}")
        if not wait_until(lambda: not any(map(group, self.groups)), ORPHANS_END_IN_S):
            self.wrong.append("processes were left behind")
            for pid in [pid for leader in self.groups for pid in group(leader)]:
                os.kill(pid, signal.SIGKILL)

    # What there is to see.

    def checkpoints(self) -> list[int]:
        """Returns the steps of the checkpoints that have their names."""
        folder = self.run / "checkpoints"
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return [int(name[5:]) for name in names if re.fullmatch(r"step_\d+", name)]

    def step(self, output: str) -> int:
        """Returns how many steps are made, as far as a process has said it; -1 before it says anything."""
        return max(map(int, re.findall(rf"(\d+)/{self.num_steps} \[", output)), default=-1)

    def is_writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.run / "checkpoints").glob(".step_*.partial"))


def differences(got: Path, want: Path) -> list[str]:
    """Returns in what two complete runs differ, clocks left aside."""
    found = []
    kept = [_kept(run / "checkpoints") for run in (got, want)]
    if kept[0] != kept[1]:
        found.append(f"checkpoints: {kept[0]} instead of {kept[1]}")
    metrics = [list(map(_without_clocks, (run / "metrics.jsonl").read_text().splitlines())) for run in (got, want)]
    if metrics[0] != metrics[1]:
        steps = [[(line["step"], line["split"]) for line in lines] for lines in metrics]
        first = next((pair for pair in zip(*metrics, strict=False) if pair[0] != pair[1]), "the length")
        found.append(f"metrics.jsonl: {steps[0]} instead of {steps[1]}, first {first}")
    if len({json.dumps(_without_clocks((run / "summary.json").read_text())) for run in (got, want)}) > 1:
        found.append("summary.json")
    for name in ("best", last := max(path.name for path in (want / "checkpoints").glob("step_*")), f"{last}/parts"):
        tensors = [_tensors(run / "checkpoints" / name) for run in (got, want)]
        names = tensors[0].keys() | tensors[1].keys()
        unequal = [tensor for tensor in names if tensors[0].get(tensor) != tensors[1].get(tensor)]
        found += [f"{name}: {len(unequal)} of {len(names)} tensors, as {unequal[0]}"] if unequal else []
    return found


def _kept(checkpoints: Path) -> tuple[int, list[str]]:
    """Returns how many checkpoints there are, and what else is there, with the files of the last one and the best."""
    # A signal may have saved one between the intervals, so that another one is the last but one.
    *others, last = sorted(path.name for path in checkpoints.glob("step_*"))
    names = {str(path.relative_to(checkpoints)) for path in checkpoints.rglob("*")}
    return len(others), sorted(name for name in names if name.split("/")[0] not in others)


def _without_clocks(line: str) -> dict:
    return {name: value for name, value in json.loads(line).items() if name not in CLOCKS}


def _tensors(folder: Path) -> dict[str, list[bytes]]:
    """Returns what the tensors in a folder's files hold; one that is divided among them in the files' order."""
    found: dict[str, list[bytes]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            found.setdefault(name, []).append(tensor.tobytes())
    return found
