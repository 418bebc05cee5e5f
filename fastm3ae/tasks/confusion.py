"""The confusion picture: which classes are predicted for which."""

import io
from collections import Counter
from collections.abc import Sequence

import numpy as np

__all__ = ["MAX_CLASSES", "confusion_counts", "confusion_png"]

MAX_CLASSES = 20
"""So many classes have a row and a column of their own; the rarer ones share one."""
END = 14  # letters of a long name at its start and at its end


def confusion_counts(expected: Sequence[str], predicted: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Returns the classes' names and how often each (row) was predicted as each (column).

    Classes are in the order of how often they are expected, then how often they are predicted. The last is "other
    (n classes)" where there are more than ``MAX_CLASSES``.

    Args:
        expected: The true class of each item.
        predicted: The predicted one.
    """
    num_expected, num_predicted = Counter(expected), Counter(predicted)
    names = sorted(num_expected | num_predicted, key=lambda name: (-num_expected[name], -num_predicted[name], name))
    row_of = {name: min(row, MAX_CLASSES) for row, name in enumerate(names)}
    if len(names) > MAX_CLASSES:
        names[MAX_CLASSES:] = [f"other ({len(names) - MAX_CLASSES} classes)"]
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, ([row_of[name] for name in expected], [row_of[name] for name in predicted]), 1)
    return names, counts


def confusion_png(expected: Sequence[str], predicted: Sequence[str]) -> bytes:
    """Returns a picture of ``confusion_counts`` as PNG: counts, each on the colour of its share of its row.

    Args:
        expected: The true class of each item, at least one.
        predicted: The predicted one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    names, counts = confusion_counts(expected, predicted)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side_inches = max(4.5, 2.5 + 0.42 * len(names))
    figure = Figure(figsize=(side_inches + 1.5, side_inches), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts).tolist():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=colour)
    # A dollar sign in a name is no mathematics.
    labels = [_label(name) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(names)), labels, parse_math=False)
    axes.set(xlabel="predicted", ylabel="expected", title=f"{len(expected)} items")
    figure.colorbar(image, label="share of the row", shrink=0.6)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def _label(name: str) -> str:
    """Returns the name on one line; a long one without its middle, because many long names differ at their ends."""
    name = " ".join(name.split()) or "(empty)"
    return name if len(name) <= 2 * END + 3 else f"{name[:END]}...{name[-END:]}"
