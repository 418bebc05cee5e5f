"""Your own images and texts: a table (CSV or JSON lines) that names images, or a folder of images with texts beside."""

import glob
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastm3ae.data.prepare.common import (
    OnBadImage,
    PrepareReport,
    Progress,
    Sample,
    draw_splits,
    keep_texts,
    read_json_lines,
    read_lines,
    write_splits,
)
from fastm3ae.data.prepare.tables import read_csv, require_columns
from fastm3ae.errors import UserError

__all__ = ["prepare_csv", "prepare_folder", "prepare_jsonl"]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class _Item(NamedTuple):
    """An image and its texts; its split, if it has one; and the group that a random split keeps together."""

    image: str
    texts: list[str]
    split: str | None
    group: str


class _Draw(NamedTuple):
    """How splits are drawn for images that have none."""

    val_frac: float
    test_frac: float
    seed: int


class _Columns(NamedTuple):
    """Which columns of a table mean what."""

    image: str
    texts: Sequence[str]
    split: str | None
    group: str | None
    join: bool


def prepare_csv(
    table: Path,
    output: Path,
    *,
    image_column: str = "image",
    text_columns: Sequence[str] = ("caption",),
    split_column: str | None = None,
    group_column: str | None = None,
    join: bool = False,
    image_root: Path | None = None,
    name: str | None = None,
    val_frac: float = 0.1,
    test_frac: float = 0.1,
    seed: int = 0,
    min_words: int = 1,
    delimiter: str | None = None,
    on_bad_image: OnBadImage = "drop",
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes {name}_{train,val,test}.arrow from a CSV table with a header, and one row per image or per text.

    Rows that name the same image are joined: its texts are in the order of the rows, then of the text columns.

    Args:
        table: The CSV file, in UTF-8.
        output: Folder of the arrow files.
        image_column: Column of the images' paths.
        text_columns: Columns of texts. Empty cells are passed over.
        split_column: Column of the splits: train, val or test (or training, valid, validation, dev, ...). None: the
            splits are drawn at random.
        group_column: Column, such as the patient's id, whose equal values a random split keeps together.
        join: Make one text of all texts of a row, such as a report's findings and impression.
        image_root: Folder from which the images' paths start. None: the table's folder.
        name: Name of the data set. None: the table's name.
        val_frac: Fraction of the images (or groups) for validation, if the splits are drawn.
        test_frac: Fraction of the images (or groups) for testing, if the splits are drawn.
        seed: Seed of the draw.
        min_words: Shorter texts are left out.
        delimiter: Character between two cells. None: a tab in a .tsv file, otherwise a comma.
        on_bad_image: What to do about an image whose file is missing or cannot be decoded.
        progress: Called after each image.

    Raises:
        UserError: The table cannot be read, lacks a column, or has a row with more or fewer cells than columns.
    """
    table = Path(table)
    names, rows = read_csv(table, delimiter or ("\t" if table.suffix.lower() == ".tsv" else ","))
    columns = _Columns(image_column, text_columns, split_column, group_column, join)
    report = PrepareReport(_data_set_name(name or table.stem))
    items = _table_items(table, names, rows, columns, min_words, report)
    samples = _assign_splits(items, _Draw(val_frac, test_frac, seed), report)
    root = Path(image_root or table.parent)
    return write_splits(samples, root, output, report, on_bad_image=on_bad_image, progress=progress)


def prepare_jsonl(
    table: Path,
    output: Path,
    *,
    image_column: str = "image",
    text_columns: Sequence[str] = ("caption",),
    split_column: str | None = None,
    group_column: str | None = None,
    join: bool = False,
    image_root: Path | None = None,
    name: str | None = None,
    val_frac: float = 0.1,
    test_frac: float = 0.1,
    seed: int = 0,
    min_words: int = 1,
    on_bad_image: OnBadImage = "drop",
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes {name}_{train,val,test}.arrow from a file with one JSON object per line.

    Lines that name the same image are joined: its texts are in the order of the lines, then of the text columns.

    Args:
        table: The file, in UTF-8. Its objects' keys are the columns.
        output: Folder of the arrow files.
        image_column: Key of the images' paths.
        text_columns: Keys of texts: each a string or a list of strings, which may be empty, null or absent.
        split_column: Key of the splits: train, val or test (or training, valid, validation, dev, ...). None: the
            splits are drawn at random.
        group_column: Key, such as the patient's id, whose equal values a random split keeps together.
        join: Make one text of all texts of a row, such as a report's findings and impression.
        image_root: Folder from which the images' paths start. None: the table's folder.
        name: Name of the data set. None: the table's name.
        val_frac: Fraction of the images (or groups) for validation, if the splits are drawn.
        test_frac: Fraction of the images (or groups) for testing, if the splits are drawn.
        seed: Seed of the draw.
        min_words: Shorter texts are left out.
        on_bad_image: What to do about an image whose file is missing or cannot be decoded.
        progress: Called after each image.

    Raises:
        UserError: The file cannot be read, a line is no JSON object, no line has a key, or a value has another type.
    """
    table = Path(table)
    rows = list(read_json_lines(table))
    names = list(dict.fromkeys(key for _, row in rows for key in row))
    columns = _Columns(image_column, text_columns, split_column, group_column, join)
    report = PrepareReport(_data_set_name(name or table.stem))
    items = _table_items(table, names, rows, columns, min_words, report)
    samples = _assign_splits(items, _Draw(val_frac, test_frac, seed), report)
    root = Path(image_root or table.parent)
    return write_splits(samples, root, output, report, on_bad_image=on_bad_image, progress=progress)


def prepare_folder(
    source: Path,
    output: Path,
    *,
    text_keys: Sequence[str] = ("caption", "captions", "text", "texts", "report"),
    name: str | None = None,
    val_frac: float = 0.1,
    test_frac: float = 0.1,
    seed: int = 0,
    min_words: int = 1,
    on_bad_image: OnBadImage = "drop",
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes {name}_{train,val,test}.arrow from a folder of images with their texts beside them.

    The texts of x.png are the whole of x.txt and those in x.json: a string, a list of strings, or an object with such
    values. Folders train, val and test (or training, valid, validation, dev, ...) right under the source are the
    splits; without them the splits are drawn at random.

    Args:
        source: The folder; it is searched with all folders below it.
        output: Folder of the arrow files.
        text_keys: Keys of texts in a JSON object, in this order.
        name: Name of the data set. None: the folder's name.
        val_frac: Fraction of the images for validation, if the splits are drawn.
        test_frac: Fraction of the images for testing, if the splits are drawn.
        seed: Seed of the draw.
        min_words: Shorter texts are left out.
        on_bad_image: What to do about an image that cannot be decoded.
        progress: Called after each image.

    Raises:
        UserError: The folder does not exist or holds no image, or a text file cannot be read.
    """
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"The folder {source} does not exist.")
    report = PrepareReport(_data_set_name(name or source.resolve().name))
    items = _folder_items(source, text_keys, min_words, report)
    samples = _assign_splits(items, _Draw(val_frac, test_frac, seed), report)
    return write_splits(samples, source, output, report, on_bad_image=on_bad_image, progress=progress)


def _table_items(
    table: Path,
    names: Sequence[str],
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    columns: _Columns,
    min_words: int,
    report: PrepareReport,
) -> list[_Item]:
    """Returns the image and the texts of each row that has both."""
    wanted = (columns.image, *columns.texts, columns.split, columns.group)
    require_columns(table, names, [column for column in wanted if column is not None])
    items = []
    for number, row in rows:
        where = f"line {number}"
        value = row.get(columns.image) or ""
        if not isinstance(value, str):
            raise UserError(f"{table}, {where}: {columns.image!r} must be a path, got {value!r}.")
        image = Path(value.strip()).as_posix() if value.strip() else ""
        texts = [text for column in columns.texts for text in _texts(row.get(column), f"{table}, {where}: {column!r}")]
        split = _split(row, columns.split, f"{table}, {where}") if columns.split else None
        if not image:
            report.drop("row without an image", where)
        elif not texts:
            report.drop("row without a text", where)
        elif texts := keep_texts(texts, min_words, report, where, join=columns.join):
            group = row.get(columns.group) if columns.group else None
            items.append(_Item(image, texts, split, image if group in (None, "") else str(group)))
    return items


def _texts(value: Any, where: str) -> list[str]:
    """Returns the texts of a string, a list of strings, or None, without blank ones."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    for text in values:
        if not isinstance(text, str):
            raise UserError(f"{where} must be a string or a list of strings, got {value!r}.")
    return [text for text in values if text.strip()]


def _split(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    split = SPLIT_NAMES.get(str(value).strip().lower())
    if split is None:
        raise UserError(f"{where}: {column!r} must be one of {', '.join(SPLIT_NAMES)}, got {value!r}.")
    return split


def _folder_items(source: Path, text_keys: Sequence[str], min_words: int, report: PrepareReport) -> list[_Item]:
    """Returns the images below a folder that have texts beside them, in the order of their paths."""
    files = sorted(map(Path, glob.glob("**/*", root_dir=source, recursive=True)))  # follows links, skips hidden files
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        found = Counter(path.suffix for path in files if path.suffix)
        others = f"; it holds {', '.join(f'{n} x {suffix}' for suffix, n in found.most_common(5))}" if found else ""
        raise UserError(f"{source} holds no image ({', '.join(IMAGE_SUFFIXES)}){others}.")
    has_splits = any(_top_split(path) for path in images)
    items = []
    for path in images:
        if has_splits and not _top_split(path):
            report.drop("image outside of the split folders", path.as_posix())
            continue
        texts = _texts_beside(source / path, text_keys)
        if not texts:
            report.drop("image without a text in a .txt or .json file beside it", path.as_posix())
        elif texts := keep_texts(texts, min_words, report, path.as_posix()):
            items.append(_Item(path.as_posix(), texts, _top_split(path), path.as_posix()))
    stems = {path.with_suffix("") for path in images}
    for path in files:
        if path.suffix in (".txt", ".json") and path.with_suffix("") not in stems:
            report.drop("text file without an image beside it", path.as_posix())
    return items


def _top_split(path: Path) -> str | None:
    return SPLIT_NAMES.get(path.parts[0].lower()) if len(path.parts) > 1 else None


def _texts_beside(image: Path, text_keys: Sequence[str]) -> list[str]:
    """Returns the texts of ``image``'s .txt file, then those of its .json file."""
    texts = []
    plain, structured = image.with_suffix(".txt"), image.with_suffix(".json")
    if plain.is_file():
        texts += _texts("".join(line for _, line in read_lines(plain)), str(plain))
    if structured.is_file():
        try:
            value = json.loads("".join(line for _, line in read_lines(structured)))
        except json.JSONDecodeError as error:
            raise UserError(f"{structured} is not valid JSON: {error}.") from None
        if isinstance(value, dict):
            for key in text_keys:
                texts += _texts(value.get(key), f"{structured}: {key!r}")
        else:
            texts += _texts(value, str(structured))
    return texts


def _assign_splits(items: list[_Item], draw: _Draw, report: PrepareReport) -> Iterator[Sample]:
    """Yields each item with its split; a draw gives the same split to all items of a group."""
    groups = [item.group for item in items if item.split is None]
    drawn = draw_splits(groups, draw.val_frac, draw.test_frac, draw.seed, report)
    for item in items:
        yield Sample(item.split or drawn[item.group], item.image, item.texts)


def _data_set_name(name: str) -> str:
    if not name or "/" in name or "\\" in name or name.startswith("."):
        raise UserError(f"The name of a data set becomes a part of file names, got {name!r}.")
    return name
