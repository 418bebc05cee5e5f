"""A run that stands still ends with status 75 and says who stood where; one that moves, however slowly, does not."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import NO_DROPOUT, command, losses, run, write_corpus

from fastm3ae.config.train import MAX_STALL_TIMEOUT_S, TrainConfig
from fastm3ae.errors import UserError
from fastm3ae.training.distributed import TIMEOUT, Processes
from fastm3ae.training.watchdog import EXIT_STATUS, PATIENCE, Watchdog

ALONE = Processes("cpu")
# Epochs of 3 batches of 8 pairs, in pieces of 2.
TRAIN = {"num_steps": 6, "micro_batch": 2, "save_every_steps": 1, "validate_every_steps": 6, "num_pictures": 0}
STALL = str(Path(__file__).with_name("stall.py"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
SENTENCE = re.compile(
    r"error: process (\d) of (\d) on (\S+) stands still: ([\w ]+), after step (\d+), for (\d+) s; (.+); the stacks of "
    r"its threads go to (\S+); exit status 75, so that it may be started again"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watchdog")
    write_corpus(folder)
    return folder


def start(folder, how, output, timeout_s, rank=0, number=1, port=None, stdin=None, **train):
    """Starts one process of the command with a loader that behaves so from batch 1 of epoch 1, step 5, on."""
    how, culprit = how
    arguments = command(
        folder, "--resume", "auto", output=output, train={**TRAIN, "stall_timeout_s": timeout_s, **train}
    )
    environment = ENVIRONMENT
    if number > 1:
        environment = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number),
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    return subprocess.Popen(
        [sys.executable, STALL, f"{how},{culprit},1,1", *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=stdin, text=True,
    )  # fmt: skip


def start_two(folder, how, output, timeout_s, **train):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [start(folder, how, output, timeout_s, rank, 2, port, **train) for rank in range(2)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_that_stands_still(folder, num_workers):
    output = f"hang_{num_workers}"
    process = start(folder, ("hang", 0), output, 6, num_workers=num_workers)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_STATUS, text[-3000:]
    (found,) = SENTENCE.finditer(text)
    assert found.groups()[:2] + found.groups()[3:5] == ("0", "1", "loading data", "4")
    assert found[3] == socket.gethostname() and 6 <= int(found[6]) <= 7
    stacks = (folder / output / "stall_process_0.txt").read_text()
    assert found[8] == str(folder / output / "stall_process_0.txt") and found[0] in stacks and "in _train" in stacks
    if num_workers:
        (pid,) = re.fullmatch(r"its loader processes: (\d+) \(sleeping\)", found[7]).groups()
        while is_running(int(pid)):  # killed, but perhaps not yet dead
            time.sleep(0.05)
    else:
        assert found[7] == "it has no loader processes" and "stall.py" in stacks
    # What a launcher does with this status: the same command again.
    assert run(folder, "--resume", "auto", output=output, train={**TRAIN, "stall_timeout_s": 6}) == 0


def test_of_two_processes_the_culprit_speaks_first(folder):
    processes = start_two(folder, ("hang", 1), "hang_of_two", 6)
    texts = {}
    texts[1], _ = processes[1].communicate(timeout=120)
    ended = time.monotonic()
    assert "stands still" not in peek(folder, "hang_of_two", 0)
    texts[0], _ = processes[0].communicate(timeout=120)
    assert processes[1].returncode == EXIT_STATUS and processes[0].returncode in (2, EXIT_STATUS), texts
    found = SENTENCE.search(texts[1])
    assert found[1] == "1" and found[4] == "loading data" and found[5] == "4"
    # The other one hears that it is gone, or would have waited for it a little longer.
    assert "rank 0: error: Another process is gone; its own message says why" in texts[0] or SENTENCE.search(texts[0])
    assert time.monotonic() - ended < 30


def is_running(pid):
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and ") Z " not in path.read_text()


def peek(folder, output, rank):
    path = folder / output / f"stall_process_{rank}.txt"
    return path.read_text() if path.exists() else ""


def test_a_launcher_starts_them_again(folder):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    arguments = command(
        folder, "--resume", "auto", output="again", model=NO_DROPOUT, train={**TRAIN, "stall_timeout_s": 6}
    )
    result = subprocess.run(
        [sys.executable, *launcher, STALL, "hang,1,1,1", *arguments],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert [found[1] for found in SENTENCE.finditer(result.stderr)][0] == "1" and "from step_000004" in result.stdout
    assert run(folder, output="never", model=NO_DROPOUT, train=TRAIN) == 0
    assert losses(folder / "again")[-1][3:] == pytest.approx(losses(folder / "never")[-1][3:], rel=1e-5)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_process_that_cannot_speak_is_named_by_the_other(folder, culprit):
    """As of a machine that is gone. Process 0 keeps what the others would know."""
    output, waiting = f"frozen_{culprit}", 1 - culprit
    processes = start_two(folder, ("freeze", culprit), output, 6)
    text, _ = processes[waiting].communicate(timeout=120)
    processes[culprit].kill()
    processes[culprit].communicate()
    assert processes[waiting].returncode == EXIT_STATUS, text[-3000:]
    found = SENTENCE.search(text)
    assert found[1] == str(waiting) and found[4] == "exchanging counts" and int(found[6]) >= 6 * PATIENCE
    if culprit:
        host = re.escape(socket.gethostname())
        where = rf"it waits for process 1 on {host} \(last seen [a-z ]+, after step \d\), whose own line says more"
        assert re.fullmatch(where, found[7]), found[7]
    else:
        assert found[7] == "another one is the culprit, perhaps on the machine of process 0, which does not answer"
    assert "in sum" in peek(folder, output, waiting)


def test_who_waits_for_a_slow_one_waits(folder):
    """Batches of 2 s and more, in pieces of half a second: the other process waits for longer than it might."""
    processes = start_two(folder, ("slow", 1), "slow", 1.5, micro_batch=1)
    for process in processes:
        text, _ = process.communicate(timeout=240)
        assert process.returncode == 0, text[-3000:]


def test_a_stopped_process_has_not_stood_still(folder):
    process = start(folder, ("slow", 0), "stopped", 3)
    metrics = folder / "stopped" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 4' in metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGSTOP)
    time.sleep(7)
    process.send_signal(signal.SIGCONT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text[-3000:]


def test_a_debugger_has_all_time(folder):
    process = start(folder, ("debug", 0), "debugged", 2, stdin=subprocess.PIPE)
    metrics = folder / "debugged" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 4' in metrics.read_text()):
        time.sleep(0.05)
    time.sleep(7)
    assert process.poll() is None
    process.stdin.write("import os; os._exit(3)\n")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 3, text[-3000:]


def watched(monkeypatch, timeout_s):
    """A watchdog of this process, and when it would have ended it."""
    ends = []
    monkeypatch.setattr(Watchdog, "_end", lambda watchdog, still_s, stacks: ends.append(still_s))
    watchdog = Watchdog(timeout_s, ALONE, Path(), lambda: 0)
    return watchdog, ends


def test_what_moves_is_left_alone(monkeypatch):
    watchdog, ends = watched(monkeypatch, 2.0)
    autocast = watchdog.watching(lambda: None)
    with watchdog:
        for number in range(12):
            (lambda: watchdog.begin("a phase"), watchdog.progress, autocast)[number % 3]()
            time.sleep(0.5)
    assert ends == []
    with watchdog:
        pass


def test_all_that_a_run_does_is_named(folder, monkeypatch):
    begun, begin = [], Watchdog.begin

    def note(watchdog, phase, waits=False):
        begun.append((phase, waits))
        begin(watchdog, phase, waits)

    monkeypatch.setattr(Watchdog, "begin", note)
    assert run(folder, output="named", train={**TRAIN, "num_steps": 2, "save_every_steps": 9, "num_pictures": 1}) == 0
    step = [("loading data", False), ("exchanging counts", True), ("computing the step", False),
            ("reading losses off the device", True)]  # fmt: skip
    assert begun == [
        ("reading losses off the device", True), *step, *step, ("validating", False), ("joining the validations", True),
        ("drawing pictures", False), ("saving a checkpoint", False), ("waiting for the last checkpoint", False),
        ("summing up", True),
    ]  # fmt: skip


def test_without_a_limit_nobody_watches(monkeypatch):
    watchdog, ends = watched(monkeypatch, None)
    with watchdog:
        watchdog.begin("a phase")
    assert ends == [] and watchdog._threads == []


@pytest.mark.parametrize("timeout_s", [0, -1.0, 2701.0, float("nan")])
def test_limits_that_cannot_be(timeout_s):
    with pytest.raises(UserError, match="train.stall_timeout_s must be positive and at most 2700.0, after which"):
        TrainConfig(stall_timeout_s=timeout_s)
    assert MAX_STALL_TIMEOUT_S * PATIENCE < TIMEOUT.total_seconds()
    TrainConfig(stall_timeout_s=None)
