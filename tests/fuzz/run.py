"""Hostile files and arguments, by the thousand, to everything of fastm3ae that reads what others wrote.

python tests/fuzz/run.py --check                         10,000 inputs to each reader
python tests/fuzz/run.py --target arrow --num 500        some of one
python tests/fuzz/run.py --replay FILE                   an input that broke its reader, with what it raised

An input must be accepted or refused by a documented error with a message, soon and with little memory; the process must
live, and nothing that the input says may run. An input is made from the seed and its number: the same ones each time.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def main() -> int:
    """Runs the campaign, or one saved input again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", help="which readers (default: all)")
    parser.add_argument("--num", type=int, default=10_000, help="inputs to each (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default 0)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if an input broke its reader")
    parser.add_argument("--failures", type=Path, default=Path(tempfile.gettempdir(), "fastm3ae_fuzz"), metavar="DIR",
                        help="where such inputs are kept (default %(default)s)")  # fmt: skip
    parser.add_argument("--replay", type=Path, metavar="FILE", help="one of them again, in this process")
    chosen = parser.parse_args()

    from fuzz.campaign import render, replay, run_campaign
    from fuzz.targets import TARGETS

    if chosen.replay is not None:
        print(replay(TARGETS[chosen.replay.name.split("_")[0]](), chosen.replay))
        return 0
    if unknown := set(chosen.target or ()) - TARGETS.keys():
        parser.error(f"there is no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    reports, start = [], time.monotonic()
    for name in chosen.target or TARGETS:
        reports.append(run_campaign(TARGETS[name](), chosen.num, chosen.seed, chosen.failures))
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    print(render(reports, chosen.seed))
    return int(chosen.check and any(report.failures for report in reports))


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    sys.exit(main())
