"""What every source has in common: cleaning texts, merging them per image, and writing the splits."""

import contextlib
import functools
import gzip
import itertools
import os
import random
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from fastm3ae.config.files import parse_json
from fastm3ae.data.arrow import CAPTION_COLUMNS, ArrowTable, write_pairs
from fastm3ae.data.prepare.card import write_card
from fastm3ae.data.prepare.duplicates import OnDuplicates, treat_duplicates
from fastm3ae.data.prepare.encode import Encode, file_of, keep_bytes, read_image
from fastm3ae.data.prepare.report import PrepareReport, SplitReport, Written
from fastm3ae.data.prepare.workers import map_ahead, num_processes
from fastm3ae.errors import UserError

__all__ = [
    "SPLITS",
    "OnBadImage",
    "PrepareReport",
    "Progress",
    "Sample",
    "require_files",
    "read_json_lines",
    "read_lines",
    "keep_texts",
    "draw_splits",
    "require_images",
    "write_rows",
    "write_splits",
]

SPLITS = ("train", "val", "test")
OnBadImage = Literal["drop", "stop"]
"""What to do about an image that cannot be decoded: leave it out and report it, or stop with its name."""
Progress = Callable[[int, int], None]
"""Called with the number of images done and their total."""

LONGEST_LINE, LONGEST_UNPACKED = 2**24, 2**28
"""Characters of a line, and of all that was packed into a .gz file, which may be very small."""


class Sample(NamedTuple):
    """Texts of one image, and its values in columns beyond those of captions. Samples of the same image are merged."""

    split: str
    image: str
    texts: list[str]
    more: Mapping[str, Any] = MappingProxyType({})


def require_files(source: Path, files: Iterable[Path], layout: str, folders: Iterable[Path] = ()) -> None:
    """Raises a UserError that names every missing file and folder, unless all exist.

    Args:
        source: The folder that the user named.
        files: Files that must exist.
        layout: What was expected under ``source``, for the message.
        folders: Folders that must exist.
    """
    if not source.is_dir():
        raise UserError(f"The folder {source} does not exist; expected {layout}.")
    missing = [str(file) for file in files if not file.is_file()]
    missing += [f"the folder {folder}" for folder in folders if not folder.is_dir()]
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing)}; expected {layout}.")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the number, from 1, and the text of each line of a UTF-8 file, with or without a byte-order mark.

    A file whose name ends in .gz is unpacked.

    Raises:
        UserError: The file cannot be read, is not UTF-8, its packing is damaged, or it or a line is far too long.
    """
    is_packed, length = path.suffix == ".gz", 0
    opened = gzip.open if is_packed else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), ""), 1):
                length += len(line)
                if len(line) > LONGEST_LINE:
                    raise UserError(f"{path}, line {number} is longer than {LONGEST_LINE} characters.")
                if is_packed and length > LONGEST_UNPACKED:
                    raise UserError(f"{path} unpacks to more than {LONGEST_UNPACKED} characters.")
                yield number, line
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}.") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number, from 1, and the object of each line that is not blank.

    Raises:
        UserError: The file cannot be read, or a line is no JSON object.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not valid JSON: {error}.") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} must be a JSON object, got {line.strip()[:40]!r}.")
        yield number, record


def keep_texts(
    texts: Iterable[str], min_words: int, report: PrepareReport, where: str, *, strip: bool = True, join: bool = False
) -> list[str]:
    """Returns the texts of at least ``min_words`` words, every run of white space replaced by one space.

    Args:
        texts: Texts of one image.
        min_words: Shorter texts are left out, and reported.
        report: Takes the short texts.
        where: Names the texts in the report.
        strip: Remove white space at both ends, too.
        join: Make one text of those that are kept.
    """
    kept = []
    for text in texts:
        if len(text.split()) < min_words:
            report.drop(f"text of fewer than {min_words} words", f"{where} {text.strip()!r}")
        else:
            kept.append(re.sub(r"\s+", " ", text.strip() if strip else text))
    return [" ".join(kept)] if join and kept else kept


def draw_splits(
    groups: Iterable[str], val_frac: float, test_frac: float, seed: int, report: PrepareReport
) -> dict[str, str]:
    """Returns the split of each group, drawn at random; equal groups, fractions and seeds give equal splits.

    A split that is wanted gets at least one group, however few there are.

    Args:
        groups: What is kept together, by name; names may repeat.
        val_frac: Fraction of the groups for validation.
        test_frac: Fraction of the groups for testing.
        seed: Seed of the draw.
        report: Takes a note of the draw.

    Raises:
        UserError: A fraction is negative, or nothing is left to train on.
    """
    if val_frac < 0 or test_frac < 0 or val_frac + test_frac >= 1:
        fractions = f"{val_frac} and {test_frac}"
        raise UserError(f"val_frac and test_frac must be at least 0 and together less than 1, got {fractions}.")
    order = list(dict.fromkeys(groups))
    random.Random(seed).shuffle(order)
    num_val = max(round(len(order) * val_frac), int(val_frac > 0))
    num_test = max(round(len(order) * test_frac), int(test_frac > 0))
    drawn = dict.fromkeys(order, "train")
    drawn |= dict.fromkeys(order[:num_val], "val") | dict.fromkeys(order[num_val : num_val + num_test], "test")
    if order:
        report.notes.append(f"The splits were drawn at random (seed {seed}).")
    return drawn


def write_splits(
    samples: Iterable[Sample],
    root: Path,
    output: Path,
    report: PrepareReport,
    *,
    columns: Mapping[str, str] = CAPTION_COLUMNS,
    on_bad_image: OnBadImage = "drop",
    num_workers: int = 0,
    progress: Progress | None = None,
    facts: Mapping[str, Any] | None = None,
    encode: Encode = keep_bytes,
    on_duplicates: OnDuplicates | None = None,
) -> PrepareReport:
    """Writes ``{report.name}_{split}.arrow`` for each split and completes the report.

    An image's texts are those of all its samples, in their order; its split is that of its last sample, and its place
    is that of its first. Its bytes are stored as they lie in its file. Either all arrow files are replaced or none.

    Args:
        samples: Texts of images, the splits one after the other.
        root: Folder from which the samples' image paths start. The paths become the image ids.
        output: Folder of the arrow files; made if missing.
        report: Names the data set, and holds what the source has left out so far.
        columns: Kind of each column. Values beyond those of captions are from the samples' ``more``; of an image with
            several samples, from the last.
        on_bad_image: What to do about an image whose file is missing or cannot be decoded.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.
        facts: What the files will say of their preparation.
        encode: What is stored of an image's file; by default its bytes as they are.
        on_duplicates: What to do about images that look the same in two splits; None: they are not looked for.

    Raises:
        UserError: No image with a text is left, or an image is bad or looks like another and that is to stop.

    Source: prepro/make_arrow.py, ``make_arrow``.
    Deviation: The original stores images that cannot be decoded, and its loader then swaps them for others.
    """
    texts_of: dict[str, list[str]] = {}
    split_of: dict[str, str] = {}
    more_of: dict[str, Mapping[str, Any]] = {}
    for split, image, texts, more in samples:
        if split_of.get(image, split) != split:
            report.moved.append(image)
        texts_of.setdefault(image, []).extend(texts)
        split_of[image], more_of[image] = split, more
    rows = [
        {"caption": texts, "image_id": image, "split": split_of[image], **more_of[image]}
        for image, texts in texts_of.items()
    ]
    return write_rows(
        rows,
        root,
        output,
        report,
        columns=columns,
        on_bad_image=on_bad_image,
        num_workers=num_workers,
        progress=progress,
        facts=facts,
        encode=encode,
        on_duplicates=on_duplicates,
    )


def write_rows(
    rows: Sequence[Mapping[str, Any]],
    root: Path,
    output: Path,
    report: PrepareReport,
    *,
    columns: Mapping[str, str],
    on_bad_image: OnBadImage,
    num_workers: int,
    progress: Progress | None,
    facts: Mapping[str, Any] | None = None,
    kinds_of: Callable[[Mapping[str, Any]], Mapping[str, int]] = lambda row: {},
    encode: Encode = keep_bytes,
    on_duplicates: OnDuplicates | None = None,
) -> PrepareReport:
    """Writes ``{report.name}_{split}.arrow`` for each split, its rows in their order, and completes the report.

    A data card, ``{report.name}.md``, and a sheet of samples, ``{report.name}_samples.png``, come with them. Either all
    files are replaced or none.

    Args:
        rows: A value for every column that ``encode`` does not return, one row for each image of a split; ``file``
            where an image's path is not its id.
        root: Folder from which the rows' paths start.
        output: Folder of the files; made if missing.
        report: Names the data set, and holds what the source has left out so far.
        columns: Kind of each column. The first list of strings, if there is one, are the texts.
        on_bad_image: What to do about an image whose file is missing or cannot be decoded.
        num_workers: At most so many processes read the images, with the same result; 0: threads of this one.
        progress: Called after each image.
        facts: What the files will say of their preparation.
        kinds_of: Counts what the report tells apart in a row (``SplitReport.kinds``).
        encode: What is stored of an image's file; by default its bytes as they are.
        on_duplicates: What to do about images that look the same in two splits; None: they are not looked for.

    Raises:
        UserError: No image (or none with a text) is left, one lies outside of the root, an image is bad and
            ``on_bad_image`` is "stop", or there are duplicates and ``on_duplicates`` is.
    """
    rows = sorted(rows, key=lambda row: SPLITS.index(row["split"]))
    _check_within(root, map(file_of, rows))
    text_column = next((name for name, kind in columns.items() if kind == "list<string>"), None)
    look = functools.partial(read_image, root, encode, on_duplicates is not None)
    num_done = itertools.count(1)
    identifying: Counter[str] = Counter()

    def with_images(part: SplitReport, of_split: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in of_split:
            image = row["image_id"]
            try:
                encoded, fault, seen = next(images)
            except BrokenProcessPool:
                raise UserError(
                    f"A process that reads images was ended, by want of memory or by a decoder, at "
                    f"{root / file_of(row)} or an image soon after it; --num-workers 0 reads them in this process."
                ) from None
            if fault and on_bad_image == "stop":
                raise UserError(f"{root / file_of(row)}: {fault}.")
            if fault:
                reason, _, detail = fault.partition(": ")
                report.drop(reason, f"{image} ({detail})" if detail else image)
            else:
                identifying.update(seen.identifying)
                words = [len(text.split()) for text in row[text_column]] if text_column else []
                part.images.append(Written(image, words, kinds_of(row), seen.size_px, seen.look))
                yield {**row, **encoded}
            if progress:
                progress(next(num_done), len(rows))

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with (
        contextlib.closing(map_ahead(look, rows, num_processes(num_workers, len(rows)))) as images,
        tempfile.TemporaryDirectory(dir=output, prefix=f".{report.name}.") as staging,
    ):
        for split in SPLITS:
            part = report.splits[split] = SplitReport(output / f"{report.name}_{split}.arrow")
            of_split = [row for row in rows if row["split"] == split]
            write_pairs(Path(staging, part.file.name), with_images(part, of_split), columns, facts)
        for split, gone in (treat_duplicates(report, on_duplicates) if on_duplicates else {}).items():
            _leave_out(Path(staging, report.splits[split].file.name), report.splits[split], gone, columns, facts)
        if not any(part.num_images for part in report.splits.values()):
            faults = [f"{len(items)} x {reason} ({items[0]})" for reason, items in report.dropped.items()]
            wanted = "image with a text" if text_column else "image"
            why = "; ".join(faults) or ("no text at all" if text_column else "no image at all")
            raise UserError(f"Not one {wanted} was found, so nothing was written: {why}.")
        report.notes += [f"The split {split} is empty." for split, part in report.splits.items() if not part.num_images]
        if identifying:
            counts = ", ".join(f"{count} x {name}" for name, count in identifying.most_common())
            report.warnings.append(f"Fields that may say who a patient is stand in the images' headers: {counts}.")
        write_card(Path(staging), report, facts or {}, text_column)
        for path in sorted(Path(staging).iterdir()):
            path.replace(output / path.name)
    return report


def _leave_out(
    path: Path, part: SplitReport, gone: Container[str], columns: Mapping[str, str], facts: Mapping[str, Any] | None
) -> None:
    """Writes an arrow file again without some of its images."""
    table = ArrowTable([path])
    kept = (
        {name: table.row(i, name) for name in columns} for i, image in enumerate(part.images) if image.image not in gone
    )
    write_pairs(path, kept, columns, facts)
    part.images = [image for image in part.images if image.image not in gone]


def _check_within(root: Path, images: Iterable[str]) -> None:
    """Raises a UserError that names the first image whose path leads out of the folder."""
    folder = os.path.abspath(root)
    for image in images:
        if os.path.commonpath([folder, os.path.abspath(os.path.join(folder, image))]) != folder:
            raise UserError(
                f"The image {image!r} lies outside of {root}, from where nothing is read; of your own table "
                "--image-root names the folder."
            )


def require_images(
    root: Path, images: Iterable[str], allow_missing: bool, report: PrepareReport, namer: str
) -> set[str]:
    """Returns those of the images that are there, and reports the others.

    Args:
        root: Folder from which the images' paths start.
        images: Paths, which may repeat.
        allow_missing: Whether images may be missing.
        report: Takes the missing ones.
        namer: What names the images, for the message.

    Raises:
        UserError: Images are missing, with all their names, and that is not allowed or none is there.
    """
    named = list(dict.fromkeys(images))
    missing = [image for image in named if not (root / image).is_file()]
    if missing and (not allow_missing or len(missing) == len(named)):
        hint = "" if allow_missing else "; --allow-missing leaves out what is about them"
        raise UserError(
            f"{root} lacks {len(missing)} of the {len(named)} images that {namer} name{hint}: {', '.join(missing)}."
        )
    for image in missing:
        report.drop("the image file is missing", image)
    return set(named) - set(missing)
