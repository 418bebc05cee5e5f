"""Compares two histories of pytest-benchmark by what does not depend on the machine's mood: ratios to eager PyTorch.

    pytest benchmarks --benchmark-json=new.json
    python benchmarks/compare.py old.json new.json            # the table
    python benchmarks/compare.py old.json new.json --check    # and exit with 1 where ours became slower

A case became slower when its ratio to eager, measured side by side with eager in one process, fell by more than the
tolerance, or when it is missing. Absolute times are not looked at. history.py does the same with more than two.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

TOLERANCE_FRAC = 0.2


def cases_of_ours(path: Path) -> tuple[dict, dict[str, dict]]:
    """What a file of pytest-benchmark holds, and of each case of ours what was noted, its ratio to eager at least."""
    try:
        record = json.loads(path.read_text())
        named = {case["name"]: case["extra_info"] for case in record["benchmarks"]}
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        sys.exit(f"{path} must be a file of pytest --benchmark-json: {error}")
    ours = {name: info for name, info in named.items() if "ours" in name and "ratio_to_eager" in info}
    if not ours:
        sys.exit(f"{path} must have cases of ours with their ratio to eager, got {len(named)} cases and none of them")
    return record, ours


def ratios(path: Path) -> dict[str, float]:
    """The ratio to eager of each case of ours."""
    return {name: info["ratio_to_eager"] for name, info in cases_of_ours(path)[1].items()}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="exit with 1 where a case became slower or is missing")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE_FRAC, help="fraction of the old ratio (default: %(default)s)"
    )


def report_changes(old: Mapping[str, float], new: Mapping[str, float], tolerance: float, is_check: bool) -> None:
    """Prints the table and how many became slower; with ``is_check`` the exit status is 1 if any did."""
    worse = []
    print(f"{'ours, times faster than eager':70} {'old':>8} {'new':>8} {'new/old':>8}")
    for name in sorted(old | new):
        if name not in new:
            worse.append(name)
            print(f"{name:70} {old[name]:8.2f} {'missing':>8}")
        elif name not in old:
            print(f"{name:70} {'':8} {new[name]:8.2f}")
        else:
            change = new[name] / old[name]
            is_worse = change < 1 - tolerance
            worse += [name] * is_worse
            print(f"{name:70} {old[name]:8.2f} {new[name]:8.2f} {change:8.2f}{'  slower' if is_worse else ''}")
    print(f"\n{len(worse)} of {len(old)} cases became slower or are missing")
    if is_check and worse:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    add_options(parser)
    arguments = parser.parse_args()
    report_changes(ratios(arguments.old), ratios(arguments.new), arguments.tolerance, arguments.check)


if __name__ == "__main__":
    main()
