"""The short form of benchmarks/training_loop.py: the loop beside the steps costs next to nothing."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "training_loop.py"


def test_bookkeeping_and_checkpoints_are_cheap():
    command = [sys.executable, SCRIPT, "--steps", "32", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "bookkeeping" in result.stdout.splitlines()[-1]
