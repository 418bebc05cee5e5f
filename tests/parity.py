"""Compares fastm3ae with recorded numbers of the original: ``python tests/parity.py FOLDER``.

FOLDER holds goldens: pairs NAME.safetensors + NAME.json of models (weights, inputs, random draws, outputs, losses,
gradients, in float32 and float64), of the optimiser, and of the data pipeline in FOLDER/data. Prints the maximal error
of every recorded value and exits with 1 if one misses its tolerance.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from parity_common import Check  # noqa: E402
from parity_data import check_data_goldens  # noqa: E402
from parity_model import check_model  # noqa: E402
from parity_optim import check_optimizer, check_position_tables  # noqa: E402


def checks_of(path: Path) -> Iterable[Check]:
    """The checks of one golden, by what its JSON holds."""
    meta = json.loads(path.with_suffix(".json").read_text())
    if "config" in meta:
        return check_model(path)
    if path.stem.startswith("optimizer_"):
        return check_optimizer(path)
    if "cases" in meta:
        return check_position_tables(path)
    return [Check(path.name, float("inf"), False, "what kind of golden this is is not known")]


def goldens(folder: Path) -> Iterator[tuple[str, Iterable[Check]]]:
    """Every golden of the folder with its checks."""
    for path in sorted(folder.glob("*.safetensors")):
        yield path.stem, checks_of(path)
    if (folder / "data" / "data_pipeline.json").is_file():
        yield "data", check_data_goldens(folder / "data")


def main() -> int:
    """Prints every check and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quiet", action="store_true", help="print only what missed, and the sums")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    num_checks = num_missed = 0
    for name, checks in goldens(arguments.folder):
        passed, worst = 0, 0.0
        missed = []
        for check in checks:
            if not arguments.quiet or not check.ok:
                print(f"{'ok  ' if check.ok else 'MISS'} {check.max_error:10.3e}  {name}: {check.name}  {check.detail}")
            passed += check.ok
            worst = max(worst, check.max_error if check.ok else 0.0)
            missed += [] if check.ok else [check]
        print(f"{name}: {passed} passed, {len(missed)} missed, largest error that passed {worst:.3e}")
        num_checks += passed + len(missed)
        num_missed += len(missed)
    if num_checks == 0:
        print(f"{arguments.folder}: no goldens found (expected NAME.safetensors with NAME.json)")
    print(f"{num_checks - num_missed} of {num_checks} checks passed")
    return 1 if num_missed or not num_checks else 0


if __name__ == "__main__":
    sys.exit(main())
