"""Keeps, draws and checks the history of the kernels' benchmarks: times faster than eager PyTorch, over commits.

    pytest benchmarks --benchmark-autosave                         # a run, in .benchmarks/
    python benchmarks/history.py FOLDER --add .benchmarks/*/*.json # what is kept of runs: small files in FOLDER
    python benchmarks/history.py FOLDER --output history.png       # the table of the last run, and the plot
    python benchmarks/history.py FOLDER --check                    # and exit with 1 where ours became slower

A case became slower when its ratio to eager fell, by more than the tolerance, below the median of its ratios in the
runs before (at most five), or when the run before has it and the last one not. A ratio is of one run, in which both
ran in turn in one process, so that a slow machine slows both; absolute times are never compared. Runs are ordered by
their commits' dates. Runs of other processors or GPUs are another history: --machine chooses, by a part of the name,
where the folder holds several.

A kept file has the form of pytest-benchmark's, less what is not looked at here; compare.py reads both.
"""

import argparse
import json
import math
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from compare import add_options, cases_of_ours, report_changes

NUM_BEFORE = 5


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the benchmarks: what it measured (times faster than eager by case), where, and of which commit."""

    path: Path
    commit: str
    date: str
    machine: str
    ratios: dict[str, float]

    @property
    def label(self) -> str:
        return f"{self.commit}\n{self.date[:10]}"


def read_run(path: Path) -> Run:
    record, ours = cases_of_ours(path)
    commit = record.get("commit_info") or {}
    if not commit.get("id") or not commit.get("time"):
        sys.exit(f"{path} must say of which commit it is: run pytest in a git checkout")
    machines = {info.get("machine", "unknown").partition(", Python ")[0] for info in ours.values()}
    return Run(
        path=path,
        commit=commit["id"][:7] + ("*" if commit.get("dirty") else ""),
        date=commit["time"],
        machine=" or ".join(sorted(machines)),
        ratios={name: info["ratio_to_eager"] for name, info in ours.items()},
    )


def read_history(folder: Path, machine: str | None) -> list[Run]:
    """The runs of one machine, the oldest commit first."""
    runs = [read_run(path) for path in sorted(folder.rglob("*.json"))]
    names = sorted({run.machine for run in runs})
    if machine is not None:
        runs = [run for run in runs if machine in run.machine]
    if not runs:
        sys.exit(f"{folder} must hold runs{f' of {machine}' if machine else ''}, got those of: {names or 'none'}")
    if machine is None and len(names) > 1:
        sys.exit(f"{folder} holds runs of several machines; choose with --machine a part of: {'; '.join(names)}")
    return sorted(runs, key=lambda run: (run.date, run.path.name))


def keep(folder: Path, path: Path) -> None:
    """Writes what is looked at of a run, named after the commit's date, the commit and the machine."""
    record, ours = cases_of_ours(path)
    run = read_run(path)
    cases = [
        {"name": case["name"], "extra_info": case["extra_info"], "stats": {"median": case["stats"]["median"]}}
        for case in record["benchmarks"]
        if case["name"] in ours
    ]
    kept = {
        "commit_info": {name: record["commit_info"].get(name) for name in ("id", "time", "dirty")},
        "benchmarks": sorted(cases, key=lambda case: case["name"]),
    }
    machine = re.sub(r"[^a-z0-9]+", "-", run.machine.lower()).strip("-")
    file = folder / f"{run.date[:10]}_{run.commit.replace('*', '-dirty')}_{machine}.json"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{path} is kept as {file}")


def before(runs: list[Run]) -> dict[str, float]:
    """Of each case of the last run but one the median of its ratios in the runs before the last."""
    earlier = runs[-1 - NUM_BEFORE : -1]
    names = earlier[-1].ratios if earlier else ()
    return {name: statistics.median(run.ratios[name] for run in earlier if name in run.ratios) for name in names}


def plot(runs: list[Run], path: Path) -> None:
    """A panel per op, a line per workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, list[str]] = {}
    for name in sorted({name for run in runs for name in run.ratios}):
        panels.setdefault(name.partition("[")[0].removeprefix("test_"), []).append(name)
    num_columns = min(3, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    figure, axes = pyplot.subplots(num_rows, num_columns, figsize=(5 * num_columns, 3.4 * num_rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (op, names) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            workload = name.partition("[")[2].removesuffix("]").replace("ours-", "").replace("-ours", "")
            axis.plot([run.ratios.get(name, math.nan) for run in runs], marker="o", label=workload)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=op, ylabel="times eager", yscale="log", xlim=(-0.3, len(runs) - 0.7))
        axis.set_xticks(range(len(runs)), [run.label for run in runs], fontsize="x-small")
        axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.tick_params(axis="y", which="both", labelsize="x-small")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize="x-small")
    figure.suptitle(runs[-1].machine)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of kept runs, those in folders below it, too")
    parser.add_argument("--add", type=Path, nargs="+", help="files of pytest-benchmark to keep there")
    parser.add_argument("--machine", help="part of a processor's or GPU's name")
    parser.add_argument("--output", type=Path, help="the plot, PNG, PDF or SVG")
    add_options(parser)
    arguments = parser.parse_args()
    for path in arguments.add or ():
        keep(arguments.folder, path)
    runs = read_history(arguments.folder, arguments.machine)
    if arguments.output:
        plot(runs, arguments.output)
    print(f"{len(runs)} runs, {runs[-1].machine}")
    print(f"old: the median of the {len(runs[:-1][-NUM_BEFORE:])} before, new: commit {runs[-1].commit}\n")
    report_changes(before(runs), runs[-1].ratios, arguments.tolerance, arguments.check)


if __name__ == "__main__":
    main()
