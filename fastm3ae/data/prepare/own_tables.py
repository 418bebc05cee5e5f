"""Your own table (CSV or JSON lines) that names images and holds their texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastm3ae.data.prepare.common import PrepareReport, Progress, keep_texts, read_json_lines
from fastm3ae.data.prepare.own_data import SPLIT_NAMES, Item, OwnDataOptions, data_set_name, usable_header, write_items
from fastm3ae.data.prepare.own_texts import read_headers, texts_of
from fastm3ae.data.prepare.tables import read_csv, require_columns
from fastm3ae.errors import UserError

__all__ = ["Columns", "prepare_csv", "prepare_jsonl"]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table mean what; those of JSON lines are keys.

    Args:
        image_column: Column of the images' paths.
        text_columns: Columns of texts. Empty cells are passed over; those of JSON lines may be absent or null, too, and
            be lists of strings.
        split_column: Column of the splits: train, val or test (or training, valid, validation, dev, ...). None: the
            splits are drawn at random.
        group_column: Column, such as the patient's id, whose equal values a random split keeps together.
    """

    image_column: str = "image"
    text_columns: Sequence[str] = ("caption",)
    split_column: str | None = None
    group_column: str | None = None


def prepare_csv(
    table: Path,
    output: Path,
    *,
    columns: Columns = Columns(),  # noqa: B008, it is immutable
    further: OwnDataOptions = OwnDataOptions(),  # noqa: B008, it is immutable
    image_root: Path | None = None,
    name: str | None = None,
    delimiter: str | None = None,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes {name}_{train,val,test}.arrow from a CSV table with a header, and one row per image or per text.

    Rows that name the same image are joined: its texts are in the order of the rows, then of the text columns.

    Args:
        table: The CSV file, in UTF-8.
        output: Folder of the arrow files.
        columns: Which columns mean what.
        further: What becomes of the images and the texts, and how splits are drawn.
        image_root: Folder from which the images' paths start. None: the table's folder.
        name: Name of the data set. None: the table's name.
        delimiter: Character between two cells. None: a tab in a .tsv file, otherwise a comma.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.

    Raises:
        UserError: The table cannot be read, lacks a column, or has a row with more or fewer cells than columns.
    """
    table = Path(table)
    names, rows = read_csv(table, delimiter or ("\t" if table.suffix.lower() == ".tsv" else ","))
    report = PrepareReport(data_set_name(name or table.stem))
    root = Path(image_root or table.parent)
    items = _table_items(table, names, list(rows), columns, root, further, report)
    return write_items(items, root, output, report, further, num_workers, progress)


def prepare_jsonl(
    table: Path,
    output: Path,
    *,
    columns: Columns = Columns(),  # noqa: B008, it is immutable
    further: OwnDataOptions = OwnDataOptions(),  # noqa: B008, it is immutable
    image_root: Path | None = None,
    name: str | None = None,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes {name}_{train,val,test}.arrow from a file with one JSON object per line.

    Lines that name the same image are joined: its texts are in the order of the lines, then of the text columns.

    Args:
        table: The file, in UTF-8. Its objects' keys are the columns.
        output: Folder of the arrow files.
        columns: Which columns mean what.
        further: What becomes of the images and the texts, and how splits are drawn.
        image_root: Folder from which the images' paths start. None: the table's folder.
        name: Name of the data set. None: the table's name.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.

    Raises:
        UserError: The file cannot be read, a line is no JSON object, no line has a key, or a value has another type.
    """
    table = Path(table)
    rows = list(read_json_lines(table))
    names = list(dict.fromkeys(key for _, row in rows for key in row))
    report = PrepareReport(data_set_name(name or table.stem))
    root = Path(image_root or table.parent)
    items = _table_items(table, names, rows, columns, root, further, report)
    return write_items(items, root, output, report, further, num_workers, progress)


def _table_items(
    table: Path,
    names: Sequence[str],
    rows: Sequence[tuple[int, Mapping[str, Any]]],
    columns: Columns,
    root: Path,
    options: OwnDataOptions,
    report: PrepareReport,
) -> list[Item]:
    """Returns the image and the texts of each row that has both."""
    wanted = (columns.image_column, *columns.text_columns, columns.split_column, columns.group_column)
    require_columns(table, names, [column for column in wanted if column is not None])
    images = [
        _image(row.get(columns.image_column) or "", columns.image_column, f"{table}, line {number}")
        for number, row in rows
    ]
    headers = read_headers(root, filter(None, images), options.text_tags, None)
    items = []
    for image, (number, row) in zip(images, rows, strict=True):
        where = f"line {number}"
        texts = [
            text
            for column in columns.text_columns
            for text in texts_of(row.get(column), f"{table}, {where}: {column!r}")
        ]
        split = _split(row, columns.split_column, f"{table}, {where}") if columns.split_column else None
        header = usable_header(headers, image, root, options, report)
        if not image:
            report.drop("row without an image", where)
        elif header and not (texts := texts + header.texts):
            report.drop("row without a text", where)
        elif header and (texts := keep_texts(texts, options.min_words, report, where, join=options.join)):
            group = row.get(columns.group_column) if columns.group_column else None
            items.append(Item(image, texts, split, None if group in (None, "") else str(group)))
    return items


def _image(value: Any, column: str, where: str) -> str:
    """Returns the path of a row's image, or ""."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {column!r} must be a path, got {value!r}.")
    return Path(value.strip()).as_posix() if value.strip() else ""


def _split(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    split = SPLIT_NAMES.get(str(value).strip().lower())
    if split is None:
        raise UserError(f"{where}: {column!r} must be one of {', '.join(SPLIT_NAMES)}, got {value!r}.")
    return split
