"""Compares two histories of pytest-benchmark by what does not depend on the machine's mood: ratios to eager PyTorch.

    pytest benchmarks --benchmark-json=new.json
    python benchmarks/compare.py old.json new.json            # the table
    python benchmarks/compare.py old.json new.json --check    # and exit with 1 where ours became slower

A case became slower when its ratio to eager, measured side by side with eager in one process, fell by more than the
tolerance, or when it is missing. Absolute times are not looked at.
"""

import argparse
import json
import sys
from pathlib import Path

TOLERANCE_FRAC = 0.2


def ratios(path: Path) -> dict[str, float]:
    """The ratio to eager of each case of ours."""
    try:
        cases = json.loads(path.read_text())["benchmarks"]
        named = {case["name"]: case["extra_info"] for case in cases}
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        sys.exit(f"{path} must be a file of pytest --benchmark-json: {error}")
    ours = {name: info for name, info in named.items() if "ours" in name and "ratio_to_eager" in info}
    if not ours:
        sys.exit(f"{path} must have cases of ours with their ratio to eager, got {len(named)} cases and none of them")
    return {name: info["ratio_to_eager"] for name, info in ours.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a case became slower or is missing")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE_FRAC, help="fraction of the old ratio (default: %(default)s)"
    )
    arguments = parser.parse_args()
    old, new = ratios(arguments.old), ratios(arguments.new)
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
            is_worse = change < 1 - arguments.tolerance
            worse += [name] * is_worse
            print(f"{name:70} {old[name]:8.2f} {new[name]:8.2f} {change:8.2f}{'  slower' if is_worse else ''}")
    print(f"\n{len(worse)} of {len(old)} cases became slower or are missing")
    if arguments.check and worse:
        sys.exit(1)


if __name__ == "__main__":
    main()
