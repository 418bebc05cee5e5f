"""CSV tables: their rows one after the other, and mistakes in them with file, line and column."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastm3ae.data.prepare.common import read_lines
from fastm3ae.errors import UserError, nearest

__all__ = ["read_csv", "require_columns"]


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
