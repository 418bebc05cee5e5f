"""What a preparation reports: what it wrote, and everything that it left out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

__all__ = ["NUM_EXAMPLES", "PrepareReport", "SplitReport", "Written", "examples"]

NUM_EXAMPLES = 3


class Written(NamedTuple):
    """What is known of an image that an arrow file holds.

    Args:
        image: Its id.
        num_words: How many words each of its texts has.
        kinds: How many of its texts are of each kind, where they are told apart; of an image without texts, 0 or 1 for
            each label.
        size_px: Its width and height.
        look: Its perceptual hash, if it was asked for.
    """

    image: str
    num_words: Sequence[int]
    kinds: Mapping[str, int]
    size_px: tuple[int, int]
    look: bytes = b""


@dataclass
class SplitReport:
    """What one arrow file holds, image by image."""

    file: Path
    images: list[Written] = field(default_factory=list)

    @property
    def num_images(self) -> int:
        """How many images it holds."""
        return len(self.images)

    @property
    def num_texts(self) -> int:
        """How many texts they have together."""
        return sum(len(image.num_words) for image in self.images)

    @property
    def num_words(self) -> list[int]:
        """Number of words of each text."""
        return [num for image in self.images for num in image.num_words]

    @property
    def kinds(self) -> Counter[str]:
        """How many texts (without texts: images) there are of each kind, or with each label."""
        counts: Counter[str] = Counter()
        for image in self.images:
            counts.update(image.kinds)
        return counts


@dataclass
class PrepareReport:
    """What was written, and everything that was left out."""

    name: str
    text_name: str | None = "text"
    """What one of its texts is called; None for images with labels and without texts."""
    splits: dict[str, SplitReport] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> what was left out for it, each by name."""
    moved: list[str] = field(default_factory=list)
    """Images that several splits name."""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What may make results better than they are, or say who a patient is."""

    def drop(self, reason: str, item: str) -> None:
        """Records something that was left out."""
        self.dropped.setdefault(reason, []).append(item)

    def render(self) -> str:
        """Returns the report as plain text: tables of the splits, then what was left out and what else to know."""
        lines = self._splits_with_texts() if self.text_name else self._splits_with_labels()
        lines += [f"Left out {len(items)}: {reason} ({examples(items)})." for reason, items in self.dropped.items()]
        if not self.dropped:
            lines.append("Nothing was left out.")
        if self.moved:
            lines.append(f"Named in several splits and put into the last: {len(self.moved)} ({examples(self.moved)}).")
        return "\n".join([*lines, *self.notes, *(f"Warning: {warning}" for warning in self.warnings)])

    @property
    def kinds(self) -> list[str]:
        """Kinds or labels of all splits, in the order in which they were counted."""
        return list(dict.fromkeys(kind for part in self.splits.values() for kind in part.kinds))

    def _splits_with_texts(self) -> list[str]:
        """Returns a row for each split: its images, its texts and their kinds."""
        kinds = self.kinds
        table = [(self.name, ["images", f"{self.text_name}s", *kinds, f"words/{self.text_name}"], "file")]
        for split, part in self.splits.items():
            num_words, num_kinds = part.num_words, part.kinds
            words = f"{fmean(num_words):.1f}" if num_words else "-"
            counts = [part.num_images, part.num_texts, *(num_kinds[kind] for kind in kinds)]
            table.append((split, [*map(str, counts), words], str(part.file)))
        return _aligned(table)

    def _splits_with_labels(self) -> list[str]:
        """Returns a row for each split, and then one for each label, because the names of labels are long."""
        files = [(split, [str(part.num_images)], str(part.file)) for split, part in self.splits.items()]
        kinds = [part.kinds for part in self.splits.values()]
        labels = [(label, [str(counts[label]) for counts in kinds], "") for label in self.kinds]
        return [
            *_aligned([(self.name, ["images"], "file"), *files]),
            *_aligned([("images with", list(self.splits), ""), *labels]),
        ]


def _aligned(table: Sequence[tuple[str, list[str], str]]) -> list[str]:
    """Returns lines of a name, cells in columns, and a last cell of any width; the first line has the headers."""
    width = max(12, *(len(name) + 1 for name, _, _ in table))
    widths = [max(9, len(header) + 2) for header in table[0][1]]
    return [f"{name:<{width}}{''.join(map(str.rjust, cells, widths))}  {last}".rstrip() for name, cells, last in table]


def examples(items: Sequence[str]) -> str:
    """Returns the first few items, and dots if there are more."""
    return "; ".join(items[:NUM_EXAMPLES]) + ("; ..." if len(items) > NUM_EXAMPLES else "")
