"""Your own images, whether a table or a folder names them: their splits, and how they are written."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastm3ae.data.prepare.common import OnBadImage, PrepareReport, Progress, Sample, draw_splits, write_splits
from fastm3ae.data.prepare.duplicates import OnDuplicates
from fastm3ae.data.prepare.own_images import ImageOptions, encode_own
from fastm3ae.data.prepare.own_texts import NO_HEADER, Header
from fastm3ae.data.prepare.report import examples
from fastm3ae.errors import UserError

__all__ = ["SPLIT_NAMES", "Item", "OwnDataOptions", "data_set_name", "usable_header", "write_items"]

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class Item(NamedTuple):
    """An image and its texts; its split, if it has one; and the group, if it has one, that a draw keeps together."""

    image: str
    texts: list[str]
    split: str | None
    group: str | None


@dataclass(frozen=True, kw_only=True)
class OwnDataOptions(ImageOptions):
    """What becomes of the images and the texts of a table or a folder alike, and how splits are drawn.

    Args:
        text_tags: Fields of DICOM headers, such as StudyDescription, whose values become texts after the others.
        join: Make one text of all texts of an image (in a table of a row), such as a report's findings and impression.
        val_frac: Fraction of the images (or groups) for validation, if the splits are drawn.
        test_frac: Fraction of the images (or groups) for testing, if the splits are drawn.
        seed: Seed of the draw.
        min_words: Shorter texts are left out.
        on_bad_image: What to do about an image whose file is missing or cannot be decoded.
        on_duplicates: What to do about images that look the same in two splits: warn, stop, or drop them from the
            first of the two.
    """

    text_tags: Sequence[str] = ()
    join: bool = False
    val_frac: float = 0.1
    test_frac: float = 0.1
    seed: int = 0
    min_words: int = 1
    on_bad_image: OnBadImage = "drop"
    on_duplicates: OnDuplicates = "warn"

    def facts(self) -> dict[str, Any]:
        """Returns the options that arrow files name."""
        values = asdict(self).items()
        return {"options": {name: list(v) if isinstance(v, tuple | list) else v for name, v in values}}


def usable_header(
    headers: Mapping[str, Header | str], image: str, root: Path, options: OwnDataOptions, report: PrepareReport
) -> Header | None:
    """Returns what an image's header says, or None, which is reported, if the file is bad."""
    header = headers.get(image, NO_HEADER)
    if not isinstance(header, str):
        return header
    if options.on_bad_image == "stop":
        raise UserError(f"{root / image}: {header}.")
    report.drop(header, image)
    return None


def write_items(
    items: list[Item],
    root: Path,
    output: Path,
    report: PrepareReport,
    options: OwnDataOptions,
    num_workers: int,
    progress: Progress | None,
) -> PrepareReport:
    """Writes the items' arrow files, and completes the report."""
    return write_splits(
        _assign_splits(items, options, report),
        root,
        output,
        report,
        on_bad_image=options.on_bad_image,
        num_workers=num_workers,
        progress=progress,
        facts=options.facts(),
        encode=functools.partial(encode_own, options),
        on_duplicates=options.on_duplicates,
    )


def _assign_splits(items: list[Item], options: OwnDataOptions, report: PrepareReport) -> Iterator[Sample]:
    """Yields each item with its split, of a volume once for each slice; a draw gives a group's items the same split."""
    groups = [item.group or item.image for item in items if item.split is None]
    drawn = draw_splits(groups, options.val_frac, options.test_frac, options.seed, report)
    splits = [item.split or drawn[item.group or item.image] for item in items]
    _warn_of_groups(items, splits, report)
    for item, split in zip(items, splits, strict=True):
        slices = options.slices(item.image)
        for number in slices:
            image = item.image if len(slices) == 1 else f"{item.image}#{number}"
            yield Sample(split, image, item.texts, {"file": item.image, "slice": number})


def _warn_of_groups(items: Sequence[Item], splits: Sequence[str], report: PrepareReport) -> None:
    """Warns of groups, such as patients, that are in several splits."""
    images_of: dict[str, dict[str, str]] = {}
    for item, split in zip(items, splits, strict=True):
        if item.group is not None:
            images_of.setdefault(item.group, {}).setdefault(split, item.image)
    # The images name a group, because it may be a patient's number.
    shared = [
        " and ".join(f"{image} of {split}" for split, image in images.items())
        for images in images_of.values()
        if len(images) > 1
    ]
    if shared:
        report.warnings.append(f"{len(shared)} of {len(images_of)} groups are in several splits ({examples(shared)}).")


def data_set_name(name: str) -> str:
    """Returns a name that may become a part of file names; raises a UserError if it must not."""
    if not name or "/" in name or "\\" in name or name.startswith("."):
        raise UserError(f"The name of a data set becomes a part of file names, got {name!r}.")
    return name
