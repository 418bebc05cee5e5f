"""Whether an arrow file is what it says: no larger than its bytes, its columns whole and of the expected kinds.

Arrow itself sees that nothing is read past the end of a damaged file. It leaves a file free to be compressed, to name
the same bytes many times, and to hold any number of nulls in no bytes: a small file that takes any amount of memory.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from fastm3ae.config.files import parse_json
from fastm3ae.errors import UserError, is_text, listed, nearest, shown

__all__ = ["Batch", "check_columns", "check_plain", "check_size", "is_binary", "is_compressed", "read_facts"]

LEAST_BATCH_BYTES = 100
"""A record batch takes more than these for its description alone."""
VALUES_PER_BYTE = 8
"""At most: booleans are the smallest values."""


def is_binary(found: pa.DataType) -> bool:
    """Returns whether a type is of the kind binary."""
    return pa.types.is_binary(found) or pa.types.is_large_binary(found)


_IS_KIND = {
    "binary": is_binary,
    "string": lambda t: pa.types.is_string(t) or pa.types.is_large_string(t),
    "int": pa.types.is_integer,
    "float": pa.types.is_floating,
    "bool": pa.types.is_boolean,
}


class Batch(NamedTuple):
    """A record batch, its file, and the number of its first row in that file."""

    rows: pa.RecordBatch
    path: Path
    first_row: int


def check_size(num_batches: int, num_rows: int, batch_bytes: int, file_bytes: int) -> None:
    """Raises a ValueError, whose message is a part of a sentence, if record batches have more than their file holds."""
    for claimed, held in (
        (f"{num_batches} record batches", num_batches * LEAST_BATCH_BYTES),
        (f"{num_rows} rows", num_rows),
        (f"{batch_bytes} bytes of values", batch_bytes),
    ):
        if held > file_bytes:
            raise ValueError(f"it claims {claimed} in {file_bytes} bytes")


def is_compressed(source: pa.NativeFile) -> bool:
    """Returns whether any batch of an arrow file, whose footer Arrow has verified, is compressed."""
    # The file ends in its footer, the footer's length and "ARROW1"; see format/File.fbs and Message.fbs of Arrow.
    end = source.size() - 10
    source.seek(end)
    length = int.from_bytes(source.read(4), "little")
    source.seek(end - length)
    footer = _FlatTable.root(source.read(length))
    for blocks in (footer.vector(2, 24), footer.vector(3, 24)):  # dictionaries and record batches
        for block in blocks:
            source.seek(int.from_bytes(block[:8], "little"))
            message = _FlatTable.root(pa.ipc.read_message(source).metadata)
            batch = message.table(2)
            if message.number(1, 1) == 2:  # a dictionary's values
                batch = batch.table(1)
            if batch.has(3):
                return True
    return False


class _FlatTable(NamedTuple):
    """A table of a flatbuffer: its fields have numbers, and stand where a table of offsets says."""

    data: bytes
    at: int

    @classmethod
    def root(cls, data: bytes) -> "_FlatTable":
        return cls(bytes(data), int.from_bytes(data[:4], "little"))

    def table(self, field: int) -> "_FlatTable":
        place = self._place(field)
        return _FlatTable(self.data, place + self._read(place, 4))

    def vector(self, field: int, size: int) -> list[bytes]:
        """Returns a vector's elements of ``size`` bytes."""
        if not self.has(field):
            return []
        place = self._place(field)
        start = place + self._read(place, 4)
        num = self._read(start, 4)
        return [self.data[start + 4 + i * size : start + 4 + (i + 1) * size] for i in range(num)]

    def number(self, field: int, size: int) -> int:
        return self._read(self._place(field), size) if self.has(field) else 0

    def has(self, field: int) -> bool:
        return self._place(field) > self.at

    def _place(self, field: int) -> int:
        """Returns where a field stands; the table's own place if it does not."""
        offsets = self.at - int.from_bytes(self.data[self.at : self.at + 4], "little", signed=True)
        entry = 4 + 2 * field
        return self.at + (self._read(offsets + entry, 2) if entry < self._read(offsets, 2) else 0)

    def _read(self, place: int, size: int) -> int:
        return int.from_bytes(self.data[place : place + size], "little")


def check_columns(batch: Batch, columns: Mapping[str, str], file_bytes: int) -> None:
    """Raises a UserError unless a batch has the columns, of their kinds, intact and (but for images) not null.

    Args:
        batch: The batch.
        columns: Kind of each column, by name.
        file_bytes: Size of its file.
    """
    rows, path, first_row = batch
    for name, kind in columns.items():
        _check_once(batch, name)
        array = rows.column(name)
        if not _is_of_kind(array.type, kind):
            raise UserError(f"{path}: column {shown(name)} has type {array.type}, expected {kind}.")
        _check_values(path, name, array, file_bytes)
        if kind != "binary" and _has_nulls(array):
            row = first_row + next(i for i, value in enumerate(array.to_pylist()) if _is_or_holds_none(value))
            raise UserError(f"{path}, row {row}: column {shown(name)} is null or holds a null; expected {kind}.")


def check_plain(batch: Batch, file_bytes: int) -> None:
    """Raises a UserError unless all columns are of kinds that can be shown in full, intact and of different names."""
    for name, array in zip(batch.rows.schema.names, batch.rows.columns, strict=True):
        _check_once(batch, name)
        if not _is_plain(array.type):
            expected = "bytes, texts, numbers, or lists of them"
            raise UserError(f"{batch.path}: column {shown(name)} has type {array.type}, expected {expected}.")
        _check_values(batch.path, name, array, file_bytes)


def _is_of_kind(found: pa.DataType, kind: str) -> bool:
    if pa.types.is_null(found):  # What pandas makes of a column without a single value, as in an empty split.
        return True
    if kind.startswith("list<"):
        return _is_list(found) and _is_of_kind(found.value_type, kind[5:-1])
    return _IS_KIND[kind](found)


def read_facts(written: bytes) -> dict[str, Any]:
    """Returns the facts of a file's preparation.

    Raises:
        ValueError: They are not JSON, or of another form than ``write_pairs`` is given. The message is a part of a
            sentence.
    """
    facts = parse_json(written)
    form = 'expected "options" with plain values and "classes" with lists of names'
    if not isinstance(facts, dict):
        raise ValueError(form)
    options, classes = facts.get("options", {}), facts.get("classes", {})
    if not isinstance(options, dict) or not isinstance(classes, dict):
        raise ValueError(form)
    scalars = [item for value in options.values() for item in (value if isinstance(value, list) else [value])]
    if any(isinstance(item, (list, dict)) for item in scalars):
        raise ValueError(form)
    for names in classes.values():
        if not isinstance(names, list) or not all(isinstance(name, str) and is_text(name) for name in names):
            raise ValueError(form)
    return facts


def _check_once(batch: Batch, name: str) -> None:
    names = batch.rows.schema.names
    if names.count(name) != 1:
        count = f"{names.count(name)} columns" if name in names else "no column"
        raise UserError(
            f"{batch.path} has {count} {shown(name)}; its columns are {listed(names)}.{nearest(name, names)}"
        )


def _check_values(path: Path, name: str, array: pa.Array, file_bytes: int) -> None:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is damaged in column {shown(name)}: {error}.") from None
    inner = array
    while len(inner) and _is_list(inner.type):  # where there is no list, the bounds of its values were not validated
        inner = inner.flatten()
        if len(inner) > file_bytes * VALUES_PER_BYTE:
            raise UserError(f"{path} is damaged in column {shown(name)}: {len(inner)} values in {file_bytes} bytes.")


def _is_plain(found: pa.DataType) -> bool:
    if _is_list(found):
        return _is_plain(found.value_type)
    return pa.types.is_null(found) or any(is_kind(found) for is_kind in _IS_KIND.values())


def _is_list(found: pa.DataType) -> bool:
    return pa.types.is_list(found) or pa.types.is_large_list(found)


def _has_nulls(array: pa.Array) -> bool:
    return array.null_count > 0 or (len(array) > 0 and _is_list(array.type) and _has_nulls(array.flatten()))


def _is_or_holds_none(value: Any) -> bool:
    return value is None or (isinstance(value, list) and any(_is_or_holds_none(item) for item in value))
