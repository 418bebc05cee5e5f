"""What an arrow file holds: its columns, its texts or labels, its images, and hashes of its content."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pyarrow as pa

from fastm3ae.data.arrow import ArrowTable
from fastm3ae.data.decode import open_image

__all__ = ["ArrowDescription", "describe_arrow"]

TEXT_COLUMNS = ("caption", "questions")
LABEL_COLUMNS = {"labels": "list<int>", "mask": "binary"}
NUM_EXAMPLES = 5  # of the classes of a column


@dataclass(frozen=True, kw_only=True)
class ArrowDescription:
    """What an arrow file holds."""

    path: Path
    num_bytes: int
    num_batches: int
    columns: dict[str, str]
    """Arrow type of each column, by name."""
    texts_per_image: Sequence[int]
    """Number of texts of each image; empty if the file has no column of texts."""
    words_per_text: Sequence[int]
    """Number of words of each text."""
    options: Mapping[str, Any]
    """With which options `fastm3ae prepare` wrote the file, where it says so."""
    classes: Mapping[str, Sequence[str]]
    """For columns of labels, what the label 0, 1, ... stands for, where the file says so."""
    num_with_label: Mapping[str, int]
    """Number of images with each of the labels of images without texts, by the label's name."""
    num_images: int
    num_sampled: int
    """Images whose headers were read."""
    formats: Counter[str]
    """File format and mode of the sampled images, and how many are alike."""
    mask_formats: Counter[str]
    """The same of their masks."""
    widths_px: Sequence[int]
    heights_px: Sequence[int]
    fingerprint: str
    """SHA-256 of texts, ids and image sizes, by which a run knows its data."""
    content: str
    """SHA-256 of all values: equal for files of equal rows, however these are cut into record batches."""

    def render(self) -> str:
        """Returns the description as plain text."""
        size = f"{self.num_bytes / 2**20:.1f} MiB"
        lines = [
            f"{self.path}: {self.num_images} images, {size}, record batches: {self.num_batches}",
            *(f"  {name}: {kind}" for name, kind in self.columns.items()),
        ]
        if self.words_per_text:
            lines.append(f"{len(self.words_per_text)} texts; {_range('per image', self.texts_per_image)}")
            lines.append(_range("words per text", self.words_per_text))
        if self.options:
            lines.append(
                "prepared with " + ", ".join(f"{name}={_plain(value)}" for name, value in self.options.items())
            )
        for column, names in self.classes.items():
            dots = ", ..." if len(names) > NUM_EXAMPLES else ""
            lines.append(f"{column}: {len(names)} classes ({', '.join(map(repr, names[:NUM_EXAMPLES]))}{dots})")
        if self.num_with_label:
            lines.append("images with each label:")
            lines += [f"  {count} x {name}" for name, count in self.num_with_label.items()]
        if self.num_sampled:
            lines.append(f"{self.num_sampled} images sampled:")
            lines += [f"  {count} x {kind}" for kind, count in self.formats.most_common()]
            lines += [f"  {count} x mask: {kind}" for kind, count in self.mask_formats.most_common()]
        if self.widths_px:
            lines.append(f"  {_range('width in pixels', self.widths_px)}; {_range('height', self.heights_px)}")
        lines.append(f"texts, ids and image sizes: sha256 {self.fingerprint}")
        return "\n".join([*lines, f"content: sha256 {self.content}"])


def describe_arrow(path: Path | str, max_images: int = 200) -> ArrowDescription:
    """Returns what an arrow file holds. Every byte is read once, for its hash; no image is decoded.

    Args:
        path: An arrow file of images, with texts or labels.
        max_images: The headers of at most so many images are read, evenly spaced.

    Raises:
        UserError: The file cannot be read, is damaged, or has no column of images.
    """
    path = Path(path)
    whole = ArrowTable([path])
    whole.check_plain()
    schema = whole.batches[0].schema
    text_columns = [name for name in TEXT_COLUMNS if name in schema.names]
    facts = whole.facts()[path.name]
    label_names = facts.get("classes", {}).get("labels", [])
    label_columns = {name: kind for name, kind in LABEL_COLUMNS.items() if label_names and name in schema.names}
    table = ArrowTable.open([path], {"image": "binary"} | dict.fromkeys(text_columns, "list<string>") | label_columns)
    texts = table.column(text_columns[0]) if text_columns else []
    sampled = range(0, len(table), max(1, -(-len(table) // max_images)))
    formats, sizes_px = _read_headers(table, "image", sampled)
    mask_formats, _ = _read_headers(table, "mask", sampled) if "mask" in label_columns else (Counter(), [])
    return ArrowDescription(
        path=path,
        num_bytes=path.stat().st_size,
        num_batches=len(table.batches),
        columns={field.name: str(field.type) for field in schema},
        texts_per_image=[len(row) for row in texts],
        words_per_text=[len(text.split()) for row in texts for text in row],
        options=facts.get("options", {}),
        classes=facts.get("classes", {}),
        num_with_label=_count_labels(table, label_names) if "labels" in label_columns else {},
        num_images=len(table),
        num_sampled=len(sampled),
        formats=formats,
        mask_formats=mask_formats,
        widths_px=[width for width, _ in sizes_px],
        heights_px=[height for _, height in sizes_px],
        fingerprint=table.fingerprint(
            ["image", *text_columns[:1], *label_columns, *(name for name in ("image_id",) if name in schema.names)]
        ),
        content=_hash_content(table.batches),
    )


def _read_headers(table: ArrowTable, column: str, rows: Iterable[int]) -> tuple[Counter[str], list[tuple[int, int]]]:
    """Returns how many images of a column are of each format and mode, and the sizes of those that can be read."""
    formats: Counter[str] = Counter()
    sizes_px = []
    for row in rows:
        try:
            with open_image(table.image_bytes(row, column)) as image:
                formats[f"{image.format}, mode {image.mode}"] += 1
                sizes_px.append(image.size)
        except (OSError, ValueError):
            formats["unreadable"] += 1
    return formats, sizes_px


def _count_labels(table: ArrowTable, names: Sequence[str]) -> dict[str, int]:
    """Returns in how many rows each label is 1."""
    counts = dict.fromkeys(names, 0)
    for labels in table.column("labels"):
        for name, label in zip(names, labels, strict=False):  # inspect shows a damaged file, too
            counts[name] += label
    return counts


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _range(name: str, values: Sequence[int]) -> str:
    return f"{name}: {min(values)} to {max(values)}, mean {fmean(values):.1f}, median {median(values):.0f}"


def _hash_content(batches: list[pa.RecordBatch]) -> str:
    """Returns the SHA-256 of every row's values, in the order of the columns' names, each with its name and length."""
    digest = hashlib.sha256()
    for batch in batches:
        columns = sorted(zip(batch.schema.names, batch.columns, strict=True), key=lambda column: column[0])
        for row in range(batch.num_rows):
            for name, array in columns:
                value = array[row]
                is_bytes = isinstance(value, pa.BinaryScalar | pa.LargeBinaryScalar) and value.is_valid
                data = value.as_buffer() if is_bytes else json.dumps(value.as_py(), default=str).encode()
                digest.update(f"{name} {len(data)} ".encode())
                digest.update(data)
    return digest.hexdigest()
