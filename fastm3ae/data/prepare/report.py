"""What a preparation reports: what it wrote, and everything that it left out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["PrepareReport", "SplitReport"]

NUM_EXAMPLES = 3


@dataclass
class SplitReport:
    """What one arrow file holds."""

    file: Path
    num_images: int = 0
    num_texts: int = 0
    num_words: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """Number of texts of each kind, where they are told apart; of images without texts, how many have each label."""

    def add(self, texts: Sequence[str], kinds: Mapping[str, int]) -> None:
        """Counts one image and its texts."""
        self.num_images += 1
        self.kinds.update(kinds)
        self.num_texts += len(texts)
        self.num_words += sum(len(text.split()) for text in texts)


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

    def drop(self, reason: str, item: str) -> None:
        """Records something that was left out."""
        self.dropped.setdefault(reason, []).append(item)

    def render(self) -> str:
        """Returns the report as plain text: tables of the splits, then what was left out and what else to know."""
        lines = self._splits_with_texts() if self.text_name else self._splits_with_labels()
        lines += [f"Left out {len(items)}: {reason} ({_examples(items)})." for reason, items in self.dropped.items()]
        if not self.dropped:
            lines.append("Nothing was left out.")
        if self.moved:
            lines.append(f"Named in several splits and put into the last: {len(self.moved)} ({_examples(self.moved)}).")
        return "\n".join(lines + self.notes)

    @property
    def _kinds(self) -> list[str]:
        """Kinds or labels of all splits, in the order in which they were counted."""
        return list(dict.fromkeys(kind for part in self.splits.values() for kind in part.kinds))

    def _splits_with_texts(self) -> list[str]:
        """Returns a row for each split: its images, its texts and their kinds."""
        table = [(self.name, ["images", f"{self.text_name}s", *self._kinds, f"words/{self.text_name}"], "file")]
        for split, part in self.splits.items():
            words = f"{part.num_words / part.num_texts:.1f}" if part.num_texts else "-"
            counts = [part.num_images, part.num_texts, *(part.kinds[kind] for kind in self._kinds)]
            table.append((split, [*map(str, counts), words], str(part.file)))
        return _aligned(table)

    def _splits_with_labels(self) -> list[str]:
        """Returns a row for each split, and then one for each label, because the names of labels are long."""
        files = [(split, [str(part.num_images)], str(part.file)) for split, part in self.splits.items()]
        labels = [(label, [str(part.kinds[label]) for part in self.splits.values()], "") for label in self._kinds]
        return [
            *_aligned([(self.name, ["images"], "file"), *files]),
            *_aligned([("images with", list(self.splits), ""), *labels]),
        ]


def _aligned(table: Sequence[tuple[str, list[str], str]]) -> list[str]:
    """Returns lines of a name, cells in columns, and a last cell of any width; the first line has the headers."""
    width = max(12, *(len(name) + 1 for name, _, _ in table))
    widths = [max(9, len(header) + 2) for header in table[0][1]]
    return [f"{name:<{width}}{''.join(map(str.rjust, cells, widths))}  {last}".rstrip() for name, cells, last in table]


def _examples(items: list[str]) -> str:
    """Returns the first few items, and dots if there are more."""
    return "; ".join(items[:NUM_EXAMPLES]) + ("; ..." if len(items) > NUM_EXAMPLES else "")
