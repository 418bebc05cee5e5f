"""Training curves: losses, validation metrics with their controls, and the learning rate, of one run or several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastm3ae.errors import UserError
from fastm3ae.visualize.figures import svg_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "NOT_METRICS",
    "Curve",
    "Panel",
    "control_of",
    "curves_figure",
    "draw_panel",
    "panel_svg",
    "panels",
    "run_names",
]

NOT_METRICS = {"step", "split", "recall_candidates", "samples_per_s", "data_wait_frac", "nonfinite_steps", "loss_scale",
               "image_to_report_candidates"}  # fmt: skip
"""What a line of metrics.jsonl says besides metrics."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
"""Of the runs; Okabe and Ito's, which those tell apart who do not see red and green."""
STYLES = {  # how a split is drawn
    "train": {"linewidth": 1.0, "alpha": 0.55},
    "validation": {"linewidth": 1.6, "marker": "o", "markersize": 3.5},
    "control": {"linewidth": 1.2, "marker": "x", "markersize": 3.5, "linestyle": "--"},
}
INK = "#010203"  # no colour of a curve: stands for that of the text around an inline SVG
PANEL_INCHES, NUM_COLUMNS = (3.4, 2.5), 3


class Curve(NamedTuple):
    """A line of a panel.

    Args:
        run: Name of its run.
        kind: "train", "validation" or "control", which is of the validation, too.
        metric: Name of the metric.
        steps: Where it was measured.
        values: What was measured.
    """

    run: str
    kind: str
    metric: str
    steps: list[int]
    values: list[float]


class Panel(NamedTuple):
    """A metric with its control, of all runs."""

    title: str
    curves: list[Curve]


def run_names(folders: Sequence[Path]) -> list[str]:
    """Returns short names of runs: of their folders, or the whole paths where two of these are the same.

    Raises:
        UserError: A run is given twice.
    """
    whole = [folder.resolve() for folder in folders]
    if len(set(whole)) < len(whole):
        raise UserError(f"A run is given twice: {', '.join(map(str, folders))}.")
    names = [folder.name for folder in whole]
    names = names if len(set(names)) == len(names) else list(map(str, folders))
    return [name.encode(errors="backslashreplace").decode() for name in names]  # halves of characters cannot be drawn


def control_of(metric: str, metrics: Sequence[str]) -> str | None:
    """Returns the metric of which another one is the control: "mim_loss" of "mim_loss_patch_mean"."""
    if metric.replace("_majority_", "_") != metric:
        return metric.replace("_majority_", "_")
    own = [name for name in metrics if metric.startswith(f"{name}_") and name != "loss"]
    return max(own, key=len, default=None)


def panels(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Panel]:
    """Returns the panels of several runs: the whole loss first, the learning rate last.

    Args:
        runs: For each run's name the lines of its metrics.jsonl.

    Raises:
        UserError: No run has logged anything.
    """
    every = (name for lines in runs.values() for line in lines for name in line)
    names = [name for name in dict.fromkeys(every) if name not in NOT_METRICS]
    if not names:
        raise UserError(f"{', '.join(runs)}: nothing was logged yet, so that there are no curves.")
    found: dict[str, list[Curve]] = {name: [] for name in sorted(names, key=_place)}
    for run, lines in runs.items():
        for name in found:
            of = control_of(name, names)
            for split, kind in (("train", "train"), ("val", "validation" if of not in found else "control")):
                points = [(line["step"], line[name]) for line in lines if line["split"] == split and name in line]
                if points:
                    steps, values = map(list, zip(*points, strict=True))
                    found[of if of in found else name].append(Curve(run, kind, name, steps, values))
    return [Panel(name.replace("_", " "), curves) for name, curves in found.items() if curves]


def curves_figure(of_metrics: Sequence[Panel]) -> "Figure":
    """Returns all panels beside each other, with one legend."""
    from matplotlib.figure import Figure  # slow to import

    columns = min(NUM_COLUMNS, len(of_metrics))
    rows = -(-len(of_metrics) // columns)
    figure = Figure(figsize=(columns * PANEL_INCHES[0], rows * PANEL_INCHES[1] + 0.6), layout="constrained")
    runs = list(dict.fromkeys(curve.run for panel in of_metrics for curve in panel.curves))
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(all_axes, of_metrics, strict=False):
        draw_panel(axes, panel, runs)
    for axes in all_axes[len(of_metrics) :]:
        axes.remove()
    handles = {}
    for axes in figure.axes:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    legend = figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar sign in a run's name is no mathematics
    return figure


def draw_panel(axes: "Axes", panel: Panel, runs: Sequence[str]) -> None:
    """Draws a panel.

    Args:
        axes: Where to.
        panel: What.
        runs: The names of all runs, in the order of their colours.
    """
    for curve in panel.curves:
        label = curve.kind if len(runs) == 1 else f"{curve.kind}, {curve.run}"
        colour = COLOURS[runs.index(curve.run) % len(COLOURS)]
        axes.plot(curve.steps, curve.values, label=label, color=colour, **STYLES[curve.kind])
    axes.set_title(panel.title, fontsize=9, parse_math=False)
    axes.set_xlim(0, 1.05 * max(curve.steps[-1] for curve in panel.curves) or 1)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def panel_svg(panel: Panel, runs: Sequence[str]) -> str:
    """Returns a panel as SVG for the inside of an HTML page, whose text's colour its axes and words take.

    Args:
        panel: What is drawn.
        runs: As of ``draw_panel``.
    """
    import matplotlib
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context({**dict.fromkeys(inked, INK), "axes.facecolor": "none", "figure.facecolor": "none"}):
        figure = Figure(figsize=PANEL_INCHES, layout="constrained")
        draw_panel(figure.add_subplot(), panel, runs)
        svg = svg_text(figure)
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def _place(name: str) -> int:
    """Returns where a metric stands: the whole loss, the losses, the others, the score, the learning rate."""
    ends = {"loss": 0, "score": 3, "learning_rate": 4}
    return ends.get(name, 1 if "_loss" in name else 2)
