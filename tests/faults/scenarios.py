"""What happens to runs: each scenario is one story, told by its own random numbers."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from corpus import caption_rows
from faults.processes import Process
from faults.story import Scene, Story
from runs import write_corpus

from fastm3ae.data.arrow import write_pairs

DIED, TERMINATED, INTERRUPTED = -signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT


def moment(story: Story, process: Process, kinds: str = "any any writing writing end start") -> bool:
    """Waits for a random moment of one of the kinds; returns whether the process is running then."""
    rng, kind = story.rng, story.rng.choice(kinds.split())
    if kind == "writing":
        for _ in range(rng.randint(1, 3)):
            story.wait(process, lambda: not story.is_writing())
            if not story.wait(process, story.is_writing):
                return False
        seconds = rng.uniform(0, 0.02)
    elif kind == "end":
        last = story.run / "checkpoints" / f"step_{story.num_steps:06d}"
        if not story.wait(process, lambda: last.exists() or last.with_name(f".{last.name}.partial").exists()):
            return False
        seconds = rng.uniform(0, 0.1)
    elif kind == "start":
        seconds = rng.uniform(0, 0.5)
    else:
        step = rng.randint(story.made, story.num_steps)
        if not story.wait(process, lambda: story.step(process.output) >= step):
            return False
        seconds = rng.uniform(0, 2 * story.scene.seconds / story.num_steps)
    return story.wait(process, seconds=seconds) or process.status is None


def kill(scene: Scene, name: str) -> Story:
    """kill -9, one to four times."""
    story = Story(scene, name)
    story.changes["train"]["num_workers"] = story.rng.randint(0, 2)
    for _ in range(story.rng.randint(1, 4)):
        process = story.start()
        if moment(story, process, "writing writing writing any any start end"):
            story.fault()
            process.signal(signal.SIGKILL)
        if story.ended(process, DIED, 0) == 0:
            break
    story.finish(scene.reference())
    return story


def full_disk(scene: Scene, name: str) -> Story:
    """Files stop growing at a random size, from a random moment on, and in half of the stories only for a while."""
    story = Story(scene, name)
    # Without loader processes: the limit would be one of the memory that they share, too, as no full disk is.
    story.changes["train"] |= {"num_workers": 0, "tensorboard": story.rng.random() < 0.5}
    process = story.start()
    if moment(story, process):
        story.fault()
        size = story.rng.choice([0, int(10 ** story.rng.uniform(1, 6.3))])
        _limit(process, size)
        story.forgive(intervals=1)
        if story.rng.random() < 0.5:
            story.wait(process, seconds=story.rng.uniform(0, story.scene.seconds))
            _limit(process, resource.RLIM_INFINITY)
    story.ended(process, 0, 2)
    story.finish(scene.reference())
    return story


def _limit(process: Process, size: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_file_system(scene: Scene, name: str) -> Story:
    """A file system of 32 MiB is filled up to a random rest at a random moment; what is printed may be on it, too."""
    folder = scene.root / name.replace(" ", "_")
    with _file_system(folder, mib=32):
        story = Story(scene, name, folder=folder)
        log = folder / "log.txt" if story.rng.random() < 0.5 else None
        story.is_heard = log is None
        process = story.start(log=log)
        if moment(story, process):
            story.fault()
            free = shutil.disk_usage(folder).free
            rest = story.rng.choice([0, int(10 ** story.rng.uniform(1, 6.3))])
            with open(folder / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
                filler.write(bytes(max(0, free - rest)))
            story.forgive(intervals=1)
        story.ended(process, 0, 2)
        (folder / "filler").unlink(missing_ok=True)
        story.finish(scene.reference())
    return story


@contextlib.contextmanager
def _file_system(folder: Path, mib: int) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a file system."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


FILES = ("model.safetensors", "parts/", "training_state.json", "checkpoint.json")


def _truncate(path: Path, story: Story) -> None:
    os.truncate(path, story.rng.randrange(path.stat().st_size))


def _flip(path: Path, story: Story) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(story.rng.choice([1, 1, 4, 64])):
        content[story.rng.randrange(len(content))] ^= story.rng.randint(1, 255)
    with path.open("r+b") as file:
        file.write(content)


DAMAGES: tuple[Callable[[Path, Story], None], ...] = (
    _truncate,
    _flip,
    lambda path, story: path.unlink(),
    lambda path, story: os.truncate(path, 0),
)


def damage(scene: Scene, name: str) -> Story:
    """After a kill -9 the newest checkpoint is damaged: in turn each kind of file in each way; and rests lie about."""
    story = Story(scene, name)
    number = int(name.split()[-1])
    process = story.start()
    if story.wait(process, lambda: len(story.checkpoints()) > 1 and max(story.checkpoints()) > 5):
        story.wait(process, seconds=story.rng.uniform(0, 0.3 * story.scene.seconds))
        process.signal(signal.SIGKILL)
    story.ended(process, DIED, 0)
    story.statuses[0] = 0  # also a complete run shall find it
    checkpoints = story.run / "checkpoints"
    newest = checkpoints / f"step_{max(story.checkpoints()):06d}"
    file = FILES[number % len(FILES)]
    path = story.rng.choice(sorted((newest / file).iterdir())) if file.endswith("/") else newest / file
    DAMAGES[number // len(FILES) % len(DAMAGES)](path, story)
    story.fault()
    story.forgive(intervals=1, is_damaged=True)
    for left_over in (f".step_{story.rng.randint(1, 14):06d}.{what}" for what in ("partial", "old")):
        if story.rng.random() < 0.5 and not (checkpoints / left_over).exists():
            (checkpoints / left_over / "parts").mkdir(parents=True)
            (checkpoints / left_over / "model.safetensors").write_bytes(b"half of")
    story.finish(scene.reference())
    return story


def worker(scene: Scene, name: str) -> Story:
    """A process that loads data is killed; the run says so, or has all that it needs."""
    story = Story(scene, name)
    story.changes["train"]["num_workers"] = story.rng.randint(1, 2)
    process = story.start()
    story.wait(process, process.workers)
    if moment(story, process, "any any writing") and (workers := process.workers()):
        story.fault()
        with contextlib.suppress(ProcessLookupError):
            os.kill(story.rng.choice(workers), signal.SIGKILL)
    if story.ended(process, 0, 2) == 2 and "A process that loads data died" not in process.output:
        story.wrong.append(f"another sentence was expected: {process.output[-500:]}")
    story.finish(scene.reference())
    return story


SIGNALS = ((signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGKILL),
           (signal.SIGTERM,), (signal.SIGINT,), (signal.SIGINT, signal.SIGTERM))  # fmt: skip


def signals(scene: Scene, name: str) -> Story:
    """One or two signals, to the process or to its group: the run saves and ends, or dies of the second one."""
    story = Story(scene, name)
    story.changes["train"]["num_workers"] = story.rng.randint(0, 2)
    sent, to_group = SIGNALS[int(name.split()[-1]) % len(SIGNALS)], story.rng.random() < 0.5
    process = story.start()
    if moment(story, process):
        story.fault()
        process.signal(sent[0], to_group)
        for number in sent[1:]:
            story.wait(process, seconds=story.rng.uniform(0, 0.5))
            process.signal(number, to_group)
    story.ended(process, 0, *(128 + number for number in sent), *(-number for number in sent))
    story.finish(scene.reference())
    return story


def corrupt(scene: Scene, name: str) -> Story:
    """Images are damaged: they are skipped and counted, also over a kill -9, or the run stops until they are mended."""
    skips = int(name.split()[-1]) % 2 == 0
    corpus = scene.root / "corrupt"
    bad = (2, 7)
    if not corpus.exists():
        corpus.mkdir()
        write_corpus(corpus)
        write_pairs(corpus / "made_train.arrow", _of_the_same_length(bad))
    option = {"data": {"on_bad_sample": "skip" if skips else "stop"}}
    story = Story(scene, name, corpus=corpus, **option)
    story.changes["train"]["num_workers"] = story.rng.randint(0, 2)
    process = story.start()
    if skips:
        if moment(story, process):
            story.fault()
            process.signal(signal.SIGKILL)
        story.ended(process, DIED, 0)
        story.finish(scene.reference("corrupt", corpus, **option))
        return story
    story.fault()
    story.ended(process, 2)
    if not any(f"made_train.arrow, row {row}" in process.output for row in bad):
        story.wrong.append(f"no file and row: {process.output[-500:]}")
    shutil.copy(scene.corpus / "made_train.arrow", story.folder)
    story.finish(scene.reference())
    return story


def _of_the_same_length(bad: tuple[int, ...]) -> Iterator[dict]:
    for number, row in enumerate(caption_rows(12, 100)):
        if number in bad:
            row["image"] = row["image"][:20] + bytes(len(row["image"]) - 20)
        yield row


__all__ = ["can_mount", "corrupt", "damage", "full_disk", "full_file_system", "kill", "moment", "signals", "worker"]
