"""The short form of faults/campaign.py, and that the campaign finds a fault of the program."""

import sys

import pytest
from faults import campaign

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc and limits other processes' files")

SHORT = ["--check", "--seed", "1", "--kills", "3", "--trials", "1", "--steps", "7", "--only"]


def test_runs_survive(capsys):
    """A fault of each kind but corrupt images and those under torchrun; all of them: the script by itself."""
    names = ["kill", "full_disk", "damage", "worker", "signals"]
    status = campaign.main([*SHORT, *names])
    output = capsys.readouterr()
    assert status == 0, output.out + output.err
    rows = [line.split(" | ") for line in output.out.splitlines() if line.startswith("| ")]
    faults = {row[0].removeprefix("| "): row[2] for row in rows}
    assert all(int(faults[name.replace("_", " ")]) > 0 for name in names), faults


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        ("forgets_the_random_state", "is not the uninterrupted run: metrics.jsonl"),
        ("removes_before_it_publishes", "was there, and it went on from 0"),
    ],
)
def test_a_planted_fault_is_found(plant, found, capsys):
    assert campaign.main([*SHORT, "kill", "--plant", plant]) == 1
    assert found in capsys.readouterr().err
