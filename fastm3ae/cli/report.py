"""The command that writes a run as a page of HTML."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastm3ae.cli.say import printable

__all__ = ["report"]


def report(arguments: Sequence[str]) -> None:
    """Write one HTML page about a run: curves, validation, pictures, evaluations, data, versions, configuration."""
    parser = argparse.ArgumentParser(prog="fastm3ae report", description=report.__doc__)
    parser.add_argument("run", type=Path, help="a run folder, or the folder of fastm3ae finetune --seeds")
    parser.add_argument("--output", type=Path, help="the file (default: report.html in the folder)")
    parser.add_argument(
        "--evaluations", type=Path, nargs="+", default=[], metavar="FOLDER",
        help="folders of fastm3ae evaluate that do not lie below the run; those that do are found",
    )  # fmt: skip
    chosen = parser.parse_args(arguments)

    from fastm3ae.training.report import write_report

    print(printable(f"wrote {write_report(chosen.run, chosen.output, chosen.evaluations)}"))
