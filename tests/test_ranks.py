"""The short form of ranks/parity.py."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "ranks" / "parity.py"


def test_processes_equal_one_in_every_way():
    """Two processes, M3AE and MPMA, DDP and FSDP2; 2 and 4 processes and more steps: the script by itself."""
    arguments = ["--num-ranks", "2", "--steps", "4", "--seed", "3", "--check"]
    result = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line for line in result.stdout.splitlines() if re.match(r"\| M\w+ \| 2 \| (ddp|fsdp) \|", line)]
    assert len(rows) == 4, result.stdout
