"""CSV tables: their rows one after the other, and mistakes in them with file, line and column."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastm3ae.data.prepare.common import read_lines
from fastm3ae.errors import UserError, nearest

__all__ = ["read_csv", "read_unique_rows", "require_columns"]


def read_csv(table: Path, delimiter: str = ",") -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """Returns the column names, and each row with the number of its last line, read as it is asked for.

    Args:
        table: The file, in UTF-8; unpacked if its name ends in .gz. Its first row names the columns.
        delimiter: Character between two cells.

    Raises:
        UserError: The table cannot be read, or, when it is reached, a row has more or fewer cells than columns.
    """
    if len(delimiter) != 1:
        raise UserError(f"The delimiter must be one character, got {delimiter!r}.")
    reader = csv.reader((line for _, line in read_lines(table)), delimiter=delimiter, strict=True)

    def all_rows() -> Iterator[list[str]]:
        try:
            yield from reader
        except csv.Error as error:
            raise UserError(f"{table}, line {reader.line_num} is not valid CSV: {error}.") from None

    cells_of_rows = all_rows()
    names = next(cells_of_rows, [])

    def rows() -> Iterator[tuple[int, dict[str, str]]]:
        for cells in cells_of_rows:
            if cells and len(cells) != len(names):
                raise UserError(
                    f"{table}, line {reader.line_num}: the row has {len(cells)} cells, expected one for each of the "
                    f"{len(names)} columns; a text that holds {delimiter!r} must stand in double quotes."
                )
            if cells:
                yield reader.line_num, dict(zip(names, cells, strict=True))

    return names, rows()


def require_columns(table: Path, names: Sequence[str], columns: Sequence[str]) -> None:
    """Raises a UserError unless each of ``columns`` is exactly one of the table's columns ``names``."""
    for column in columns:
        if names.count(column) != 1:
            count = f"{names.count(column)} columns" if column in names else "no column"
            known = ", ".join(names) or "none: the table is empty"
            raise UserError(f"{table} has {count} {column!r}; its columns are {known}.{nearest(column, names)}")


def read_unique_rows(table: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields where each row of a CSV table stands ("train.csv, line 2"), and the row.

    Args:
        table: The file, as ``read_csv`` reads it.
        columns: Columns that it must have, of which the first one's values must differ.

    Raises:
        UserError: The table cannot be read or lacks a column, or a value of the first column repeats.
    """
    names, rows = read_csv(table)
    require_columns(table, names, columns)
    lines: dict[str, int] = {}
    for number, row in rows:
        key = row[columns[0]]
        if key in lines:
            raise UserError(
                f"{table}, line {number}: the {columns[0]} {key} is in line {lines[key]}, too; expected it in one row."
            )
        lines[key] = number
        yield f"{table}, line {number}", row
