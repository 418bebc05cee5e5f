"""What every source has in common: cleaning texts, merging them per image, and writing the splits."""

import gzip
import itertools
import json
import random
import re
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar

from fastm3ae.data.arrow import CAPTION_COLUMNS, write_pairs
from fastm3ae.data.images import decode_image
from fastm3ae.data.prepare.report import PrepareReport, SplitReport
from fastm3ae.errors import UserError

__all__ = [
    "SPLITS",
    "Encode",
    "OnBadImage",
    "PrepareReport",
    "Progress",
    "Sample",
    "require_files",
    "read_json_lines",
    "read_lines",
    "keep_texts",
    "draw_splits",
    "map_ahead",
    "require_images",
    "write_rows",
    "write_splits",
]

SPLITS = ("train", "val", "test")
OnBadImage = Literal["drop", "stop"]
"""What to do about an image that cannot be decoded: leave it out and report it, or stop with its name."""
Progress = Callable[[int, int], None]
"""Called with the number of images done and their total."""
Encode = Callable[[bytes, Mapping[str, Any]], Mapping[str, Any]]
"""Returns a row's image, and what else is made from it, from the bytes of the image's file and the row.

Raises a ValueError, whose message is a part of a sentence, if the image is bad.
"""

READ_AHEAD = 64

_In = TypeVar("_In")
_Out = TypeVar("_Out")


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
        UserError: The file cannot be read, is not UTF-8, or its packing is damaged.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as lines:
            yield from enumerate(lines, 1)
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
            record = json.loads(line)
        except json.JSONDecodeError as error:
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
    progress: Progress | None = None,
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
        progress: Called after each image.

    Raises:
        UserError: No image with a text is left, or an image is bad and ``on_bad_image`` is "stop".

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
    return write_rows(rows, root, output, report, columns=columns, on_bad_image=on_bad_image, progress=progress)


def keep_bytes(data: bytes, row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the bytes of an image's file as its image.

    Raises:
        ValueError: They cannot be decoded.
    """
    decode_image(data)
    return {"image": data}


def write_rows(
    rows: Sequence[Mapping[str, Any]],
    root: Path,
    output: Path,
    report: PrepareReport,
    *,
    columns: Mapping[str, str],
    on_bad_image: OnBadImage,
    progress: Progress | None,
    facts: Mapping[str, Any] | None = None,
    kinds_of: Callable[[Mapping[str, Any]], Mapping[str, int]] = lambda row: {},
    encode: Encode = keep_bytes,
) -> PrepareReport:
    """Writes ``{report.name}_{split}.arrow`` for each split, its rows in their order, and completes the report.

    Either all arrow files are replaced or none.

    Args:
        rows: A value for every column that ``encode`` does not return, one row for each image of a split.
        root: Folder from which the rows' image ids start.
        output: Folder of the arrow files; made if missing.
        report: Names the data set, and holds what the source has left out so far.
        columns: Kind of each column. The first list of strings, if there is one, are the texts.
        on_bad_image: What to do about an image whose file is missing or cannot be decoded.
        progress: Called after each image.
        facts: What the files will say of their preparation.
        kinds_of: Counts what the report tells apart in a row (``SplitReport.kinds``).
        encode: What is stored of an image's file; by default its bytes as they are.

    Raises:
        UserError: No image (or none with a text) is left, or an image is bad and ``on_bad_image`` is "stop".
    """
    text_column = next((name for name, kind in columns.items() if kind == "list<string>"), None)

    def with_images(split: str, part: SplitReport) -> Iterator[dict[str, Any]]:
        of_split = [row for row in rows if row["split"] == split]
        read = map_ahead(lambda row: _read_image(root / row["image_id"], row, encode), of_split)
        for row, (encoded, fault) in zip(of_split, read, strict=True):
            image = row["image_id"]
            if fault and on_bad_image == "stop":
                raise UserError(f"{root / image}: {fault}.")
            if fault:
                reason, _, detail = fault.partition(": ")
                report.drop(reason, f"{image} ({detail})" if detail else image)
            else:
                part.add(row[text_column] if text_column else (), kinds_of(row))
                yield {**row, **encoded}
            if progress:
                progress(next(num_done), len(rows))

    num_done = itertools.count(1)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=f".{report.name}.") as staging:
        for split in SPLITS:
            part = report.splits[split] = SplitReport(output / f"{report.name}_{split}.arrow")
            write_pairs(Path(staging, part.file.name), with_images(split, part), columns, facts)
        if not any(part.num_images for part in report.splits.values()):
            faults = [f"{len(items)} x {reason} ({items[0]})" for reason, items in report.dropped.items()]
            wanted = "image with a text" if text_column else "image"
            why = "; ".join(faults) or ("no text at all" if text_column else "no image at all")
            raise UserError(f"Not one {wanted} was found, so nothing was written: {why}.")
        for part in report.splits.values():
            Path(staging, part.file.name).replace(part.file)
    report.notes += [f"The split {split} is empty." for split, part in report.splits.items() if not part.num_images]
    return report


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


def map_ahead(function: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
    """Yields ``function`` of each item in order; threads work some items ahead."""
    with ThreadPoolExecutor() as pool:
        pending: deque[Future[_Out]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) == READ_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _read_image(path: Path, row: Mapping[str, Any], encode: Encode) -> tuple[Mapping[str, Any], str]:
    """Returns what a row's image file is encoded as, and what is wrong with the file ("" if nothing is)."""
    try:
        return encode(path.read_bytes(), row), ""
    except FileNotFoundError:
        return {}, "the image file is missing"
    except OSError as error:
        return {}, f"the image file cannot be read: {error}"
    except ValueError as error:
        return {}, str(error)
