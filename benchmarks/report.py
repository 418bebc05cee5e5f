"""Joins the figures that benchmarks wrote with --json: one Markdown table, one JSON file, and a plot per op.

    python benchmarks/report.py FOLDER    # reads bench_*.json and step_*.json there, writes report.md, results.json
                                          # and plots.png

A plot shows, over the batch size, how many times faster than eager PyTorch each variant is; it needs matplotlib, which
the extra "bench" installs.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

# The same in every panel; peers take matplotlib's next one.
COLORS = {"eager": "tab:gray", "torch.compile": "tab:blue", "ours": "tab:red"}


def figures(records: list[dict]) -> Iterator[str]:
    """A line per target."""
    yield "| op | workload | against | measured | target | |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for record in records:
        for figure in record["figures"]:
            value, target = figure["figure"], figure["target"]
            if figure["versus"] in ("copy", "product"):
                texts = "-" if value is None else f"{value:.0%}", f"{target:.0%} of its rate"
            else:
                texts = "-" if value is None else f"{value:.2f}x", f"{target}x"
            verdict = "not installed" if value is None else "met" if value >= target else "**missed**"
            yield f"| {record['op']} | {figure['workload']} | {figure['versus']} | {' | '.join(texts)} | {verdict} |"


def times(records: list[dict]) -> Iterator[str]:
    """A line per row of the benchmarks' tables."""
    yield "| op | batch | workload | variant | median ms | p20 | p80 | rate | of ceiling | peak MiB | vs eager |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for record in records:
        for row in record["rows"]:
            unit = "GB/s" if row["ceiling"] == "copy" else "GFLOP/s"
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
            versus = "" if row["times_eager"] is None else f"{row['times_eager']:.2f}x"
            yield (
                f"| {row['op']} | {row['batch_size']} | {row['workload']} | {row['variant']} | "
                f"{row['median_s'] * 1e3:.4f} | {row['p20_s'] * 1e3:.4f} | {row['p80_s'] * 1e3:.4f} | "
                f"{row['rate_per_s'] / 1e9:.1f} {unit} | {row['share_of_ceiling']:.0%} of {row['ceiling']} | {peak} | "
                f"{versus} |"
            )


def step_figures(records: list[dict]) -> Iterator[str]:
    """A line per target of a whole step."""
    yield "| step | figure | measured | target | |"
    yield "| --- | --- | --- | --- | --- |"
    for record in records:
        for figure in record["figures"]:
            value = "-" if figure["value"] is None else f"{figure['value']:.2f}"
            target = f"at {'most' if figure['is_at_most'] else 'least'} {figure['target']}"
            verdict = "not measured" if figure["value"] is None else "**missed**" if figure["is_missed"] else "met"
            yield f"| {record['step']} | {figure['name']} | {value} | {target} | {verdict} |"


def step_times(records: list[dict]) -> Iterator[str]:
    """A line per variant of a whole step."""
    yield "| step | pairs | variant | a pass | median ms | p20 | p80 | samples/s | utilisation | GiB | vs the first |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for record in records:
        for row in record["rows"]:
            start = f"| {record['step']} | {row['batch_size']} | {row['variant']} |"
            if "error" in row:
                yield f"{start} failed: {row['error'].replace('|', '/')} | | | | | | | |"
                continue
            milliseconds = " | ".join(f"{row[key] * 1e3:.2f}" for key in ("median_s", "p20_s", "p80_s"))
            utilisation = f"{row['utilisation']:.1%}" if "utilisation" in row else ""
            peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
            yield (
                f"{start} {row.get('max_pass', row['batch_size'])} | {milliseconds} | {row['samples_per_s']:.1f} | "
                f"{utilisation} | {peak} | {row['times_first']:.2f}x |"
            )


def plot(records: list[dict], path: Path) -> None:
    """One panel per op and workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = []
    for record in records:
        panels += [(record, workload) for workload in dict.fromkeys(row["workload"] for row in record["rows"])]
    num_columns = 4
    num_rows = -(-len(panels) // num_columns)
    figure, axes = pyplot.subplots(num_rows, num_columns, figsize=(4.5 * num_columns, 3.2 * num_rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (record, workload) in zip(axes.flat, panels, strict=False):
        rows = [row for row in record["rows"] if row["workload"] == workload and row["times_eager"] is not None]
        for variant in dict.fromkeys(row["variant"] for row in rows):
            points = sorted((row["batch_size"], row["times_eager"]) for row in rows if row["variant"] == variant)
            axis.plot(*zip(*points, strict=True), marker="o", label=variant, color=COLORS.get(variant))
        axis.set(title=f"{record['op']}\n{workload}", xlabel="batch size", ylabel="times eager", ylim=(0, None))
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("bench_*.json"))]
    steps = [json.loads(path.read_text()) for path in sorted(folder.glob("step_*.json"))]
    if not records and not steps:
        sys.exit(f"{folder} must have files bench_*.json or step_*.json, got none")
    lines = []
    if steps:
        lines += [f"# Steps, {steps[0]['machine']}", "", *step_figures(steps), "", *step_times(steps), ""]
        lines += [f"- {record['step']}: {note}" for record in steps for note in record["notes"]] + [""]
    if records:
        lines += [f"# Kernels, {records[0]['machine']}", "", *figures(records), ""]
    num_first_lines = len(lines)
    lines += times(records) if records else []
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    (folder / "results.json").write_text(json.dumps(records + steps, indent=1))
    if not records:
        print("no plots: these are of kernels")
    elif importlib.util.find_spec("matplotlib"):
        plot(records, folder / "plots.png")
    else:
        print("no plots: matplotlib is not installed (pip install 'fastm3ae[bench]')")
    print("\n".join(lines[:num_first_lines]))


if __name__ == "__main__":
    main()
