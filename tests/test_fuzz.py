"""The short form of tests/fuzz/run.py; and that the fuzzer finds what it is there to find."""

import os
import re
import sys
import time
from pathlib import Path

import pytest
from fuzz.campaign import render, replay, run_campaign
from fuzz.mutate import mutate
from fuzz.run import main
from fuzz.targets import TARGETS

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")

NUM = {"arrow": 300, "image": 150, "dicom": 150, "nifti": 150, "checkpoint": 50, "training-checkpoint": 50,
       "configuration": 100, "command": 60, "official-line": 200}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_inputs_are_refused_with_a_sentence(name, tmp_path):
    """As `python tests/fuzz/run.py --check`, with fewer inputs."""
    report = run_campaign(TARGETS[name](), NUM[name], seed=0, failures=tmp_path)
    assert not report.failures, render([report], seed=0)
    assert report.outcomes.total() == NUM[name]
    accepted = report.outcomes["accepted"] + report.outcomes["an older one"]
    assert 0 < accepted < NUM[name]  # whole inputs are read, and damage is seen


class Planted:
    """A reader with one bug, which some inputs reach."""

    name, documented, limit_s, limit_mib = "planted", (ValueError,), 4.0, 64.0

    def __init__(self, bug):
        self.bug = bug

    def begin(self):
        pass

    def make(self, rng):
        return mutate(b"0123456789abcdef", rng)

    def read(self, data, folder):
        if len(data) < 16:
            self.bug()
        if b"7" not in data:
            raise ValueError("there is no 7")
        return "accepted"


def look_up():
    return {}["x"]


def wait():
    time.sleep(60)


def eat_at_once():
    return bytearray(b"x") * 400_000_000


def eat_for_long():
    eaten = []
    while True:
        eaten.append(b"x" * 10**7)
        time.sleep(0.001)


def say_nothing():
    raise ValueError("  ")


def say_much():
    raise ValueError("x" * 5000)


class PanicError(BaseException):
    """As Rust's, it is no Exception."""


def panic():
    raise PanicError("index out of bounds")


@pytest.mark.parametrize(
    ("bug", "what"),
    [
        (look_up, r"KeyError: 'x', test_fuzz.py:\d+"),
        (panic, r"PanicError: index out of bounds, test_fuzz.py:\d+"),
        (os.abort, "the process ended: SIGABRT"),
        (lambda: os._exit(3), "the process ended: exit status 3"),
        (lambda: sys.exit(0), "SystemExit: 0, "),
        (wait, "hang: longer than 4 s"),
        (eat_at_once, "memory: more than 64 MiB"),
        (eat_for_long, "memory: more than 64 MiB"),
        (say_nothing, "ValueError with an empty message, "),
        (say_much, "ValueError with a message of more than 4000 characters"),
    ],
)
def test_a_planted_bug_is_found_and_the_campaign_goes_on(bug, what, tmp_path):
    report = run_campaign(Planted(bug), 12, seed=3, failures=tmp_path)
    assert report.outcomes.total() == 12 and report.outcomes["accepted"]
    assert 0 < len(report.failures) == report.outcomes["failed"] < 8
    for failure in report.failures:
        assert re.match(what, failure.what)
        assert len(failure.file.read_bytes()) < 16 and failure.file.name.startswith("planted_3_")
    table = render([report], seed=3)
    assert f"--replay {report.failures[0].file}" in table
    assert table.endswith(f"seed 3: {len(report.failures)} failures")


def test_memory_that_was_free_before_counts(tmp_path):
    kept = [bytearray(b"x") * 2**16 for _ in range(7000)]  # such small ones are in the heap, which only its end shrinks
    end = bytearray(b"x") * 2**16
    kept.clear()
    report = run_campaign(Planted(eat_at_once), 12, seed=3, failures=tmp_path)
    assert {failure.what for failure in report.failures} == {"memory: more than 64 MiB"}, len(end)


def test_equal_seeds_give_equal_inputs(tmp_path):
    reports = [run_campaign(Planted(look_up), 40, seed, tmp_path / str(i)) for i, seed in enumerate((5, 5, 6))]
    first, again, other = ([failure.file.read_bytes() for failure in report.failures] for report in reports)
    assert first == again != other
    assert reports[0].outcomes == reports[1].outcomes


def test_a_failure_is_replayed_with_what_it_raised(tmp_path):
    report = run_campaign(Planted(look_up), 20, seed=0, failures=tmp_path)
    with pytest.raises(KeyError, match="x"):
        replay(Planted(look_up), report.failures[0].file)


def test_an_input_that_cannot_be_made_is_no_failure_of_the_reader(tmp_path):
    target = Planted(look_up)
    target.make = lambda rng: 1 / 0
    with pytest.raises(RuntimeError, match="planted: an input could not be made:(.|\n)*ZeroDivisionError"):
        run_campaign(target, 3, seed=0, failures=tmp_path)


def test_the_command(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", "--failures", str(tmp_path), *arguments])
        return main()

    assert run("--check", "--target", "official-line", "--num", "20", "--seed", "4") == 0
    assert capsys.readouterr().out.endswith("seed 4: 0 failures\n")
    monkeypatch.setitem(TARGETS, "planted", lambda: Planted(look_up))
    assert run("--target", "planted", "--num", "20") == 0 and run("--check", "--target", "planted", "--num", "20") == 1
    with pytest.raises(KeyError, match="x"):
        run("--replay", str(next(tmp_path.glob("planted_0_*.bin"))))
    with pytest.raises(SystemExit, match="2"):
        run("--target", "pictures")
    assert "there is no target pictures; there are arrow, image" in capsys.readouterr().err
