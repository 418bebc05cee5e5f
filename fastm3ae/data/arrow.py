"""Arrow files of images and their texts: one row per image, read through a memory map, written as a stream.

The files are Arrow IPC files named ``{dataset}_{split}.arrow``, as the original's preprocessing writes them
(prepro/make_arrow.py). A column's *kind* is its type without the width: ``binary``, ``string``, ``int``, ``float``, or
``list<...>`` of a kind. Reading accepts every width of a kind (``string`` and ``large_string``, and so on).
"""

import hashlib
import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastm3ae.data.arrow_checks import (
    Batch,
    check_columns,
    check_plain,
    check_size,
    is_binary,
    is_compressed,
    read_facts,
)
from fastm3ae.errors import UserError, nearest

__all__ = [
    "CAPTION_COLUMNS",
    "IMAGE_LABEL_COLUMNS",
    "MELINDA_COLUMNS",
    "MIMIC_CXR_COLUMNS",
    "PATIENT_COLUMN",
    "SEGMENTATION_COLUMNS",
    "VQA_COLUMNS",
    "ArrowTable",
    "dataset_files",
    "write_pairs",
]

CAPTION_COLUMNS = {"image": "binary", "caption": "list<string>", "image_id": "string", "split": "string"}
"""Columns of a data set of images and captions, in the original's order."""
MIMIC_CXR_COLUMNS = {
    "image": "binary",
    "caption": "list<string>",
    "image_id": "string",
    "chexpert": "list<int>",
    "split": "string",
}
"""The same for MIMIC-CXR, with 14 labels (``fastm3ae.data.prepare.mimic_cxr.CHEXPERT_LABELS``) of 0 or 1."""

VQA_COLUMNS = {
    "image": "binary",
    "questions": "list<string>",
    "answers": "list<list<string>>",
    "answer_labels": "list<list<int>>",
    "answer_scores": "list<list<float>>",
    "image_id": "string",
    "question_id": "list<int>",
    "answer_type": "list<int>",
    "split": "string",
}
"""Columns of questions about images; the type of an answer is 0 for a closed question, 1 for an open one."""
MELINDA_COLUMNS = {
    "image": "binary",
    "caption": "list<string>",
    "image_id": "string",
    "i_meth": "list<int>",
    "p_meth": "list<int>",
    "i_meth_label": "list<int>",
    "p_meth_label": "list<int>",
    "split": "string",
}
"""Columns of MELINDA: captions with the experiments' methods as classes, in four ways."""

IMAGE_LABEL_COLUMNS = {"image": "binary", "labels": "list<int>", "image_id": "string", "split": "string"}
"""Columns of images with labels and without texts: 0 or 1 for every class, in the order of the file's ``facts``."""
SEGMENTATION_COLUMNS = {
    "image": "binary",
    "mask": "binary",
    "labels": "list<int>",
    "image_id": "string",
    "split": "string",
}
"""The same with a mask, a PNG of the image's size with the levels 0 and 255; all 0 where there is no finding."""
PATIENT_COLUMN = {"patient": "string"}
"""A column beside these where the source says whose an image is, and some patients have several."""

BATCH_BYTES = 64 * 2**20  # A binary column holds at most 2 GiB per record batch; a small batch keeps writing light.

FACTS_KEY = b"fastm3ae"  # in the schema's metadata, beside pandas'

_TYPES = {"binary": pa.binary(), "string": pa.string(), "int": pa.int64(), "float": pa.float64()}
_PANDAS_NAMES = {"binary": "bytes", "string": "unicode", "int": "int64", "float": "float64"}


class ArrowTable:
    """The rows of one or several arrow files, one after the other, left in the files until they are asked for.

    The files are memory-mapped: opening reads no image, and processes on one machine share what was read. Pickling
    takes only the paths along, so that a table travels to worker processes for nothing.

    Args:
        paths: The arrow files; each may hold any number of record batches.

    Raises:
        UserError: A file does not exist, is truncated, is not an Arrow IPC file, is a compressed one, or claims more
            than its bytes hold.
    """

    def __init__(self, paths: Sequence[Path | str]) -> None:
        self.paths = tuple(Path(path) for path in paths)
        self._batches = [batch for path in self.paths for batch in _open_file(path)]
        sizes = (batch.rows.num_rows for batch in self._batches)
        self._starts = list(itertools.accumulate(sizes, initial=0))

    @classmethod
    def open(cls, paths: Sequence[Path | str], columns: Mapping[str, str]) -> "ArrowTable":
        """Returns the table after checking the named columns and the integrity of their values; no image is read.

        Args:
            paths: The arrow files; each may have further columns.
            columns: Kind of each column that will be read, by name.

        Raises:
            UserError: A file cannot be read, a column is missing or of another kind, or a value that is no image is
                null. (A null image is a bad row, not a bad file: ``image_bytes`` reports it.)
        """
        table = cls(paths)
        for batch in table._batches:
            check_columns(batch, columns, batch.path.stat().st_size)
        return table

    def check_plain(self) -> None:
        """Checks every column, so that all that the files hold can be shown; no image is read.

        Raises:
            UserError: A column is damaged, has another's name, or values of another type than the kinds and lists.
        """
        for batch in self._batches:
            check_plain(batch, batch.path.stat().st_size)

    @property
    def batches(self) -> list[pa.RecordBatch]:
        """The record batches of all files, in order."""
        return [batch.rows for batch in self._batches]

    def __len__(self) -> int:
        return self._starts[-1]

    def __reduce__(self) -> tuple[type["ArrowTable"], tuple[tuple[Path, ...]]]:
        return ArrowTable, (self.paths,)

    def row(self, index: int, column: str) -> Any:
        """Returns one value as a Python object."""
        batch, row = self._find(index)
        return batch.rows.column(column)[row].as_py()

    def column(self, name: str) -> list[Any]:
        """Returns a whole column as Python objects, in the order of the rows."""
        return [value for batch in self._batches for value in batch.rows.column(name).to_pylist()]

    def text_bytes(self, name: str) -> np.ndarray:
        """Returns the lengths in bytes of all texts in a column of lists, row by row; the texts are not read."""
        texts = [batch.column(name).flatten() for batch in self.batches if batch.num_rows]
        lengths = [pc.binary_length(array).to_numpy() for array in texts if len(array)]
        return np.concatenate([np.zeros(0, np.int64), *lengths])

    def image_bytes(self, index: int, column: str = "image") -> memoryview:
        """Returns the encoded bytes of an image (or mask) where they lie in the mapped file, without a copy.

        Raises:
            ValueError: The row has no image.
        """
        batch, row = self._find(index)
        value = batch.rows.column(column)[row]
        if not value.is_valid:
            raise ValueError(f"the row has no {column} (null)")
        return memoryview(value.as_buffer()).cast("B")

    def fingerprint(self, columns: Iterable[str]) -> str:
        """Returns the SHA-256 of the columns' values, row by row, with the size of an image in its place.

        Equal rows give an equal fingerprint, however they are cut into record batches. No image is read.
        """
        digest, names = hashlib.sha256(), sorted(columns)
        for batch in self.batches:
            arrays = (batch.column(name) for name in names)
            values = (pc.binary_length(array) if is_binary(array.type) else array for array in arrays)
            for row in zip(*(array.to_pylist() for array in values), strict=True):
                digest.update(json.dumps(row).encode())
        return digest.hexdigest()

    def facts(self) -> dict[str, dict[str, Any]]:
        """Returns for each file, by name, what its preparation wrote down; nothing for a file of another origin.

        Of questions and of classes that is ``options``, by name, and ``classes``: for each column of labels what the
        label 0, 1, ... (in a column of one 0 or 1 for every class, the first, second, ... of them) stands for.

        Raises:
            UserError: What is written down cannot be read, or is of another form.
        """
        facts = {}
        for batch in self._batches:
            written = (batch.rows.schema.metadata or {}).get(FACTS_KEY, b"{}")
            try:
                facts[batch.path.name] = read_facts(written)
            except ValueError as error:
                raise UserError(f"{batch.path} is damaged in its metadata {FACTS_KEY.decode()!r}: {error}.") from None
        return facts

    def locate(self, index: int) -> tuple[str, int]:
        """Returns the file that holds a row, and the row's number in that file, from 0."""
        batch, row = self._find(index)
        return str(batch.path), batch.first_row + row

    def _find(self, index: int) -> tuple["Batch", int]:
        """Returns the batch that holds a row, and the row's number in the batch."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a table of {len(self)} rows")
        batch = bisect_right(self._starts, index) - 1
        return self._batches[batch], index - self._starts[batch]


def dataset_files(root: Path | str, datasets: Iterable[str], split: str) -> list[Path]:
    """Returns ``{root}/{dataset}_{split}.arrow`` for each data set.

    Raises:
        UserError: The folder or one of the files does not exist.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"The data folder {root} does not exist; `fastm3ae prepare` writes one.")
    present = sorted(path.name for path in root.glob("*.arrow"))
    names = [f"{dataset}_{split}.arrow" for dataset in datasets]
    for name in names:
        if name not in present:
            found = f"it holds {', '.join(present)}" if present else "it holds no arrow file"
            raise UserError(f"There is no {name} in the data folder {root}; {found}.{nearest(name, present)}")
    return [root / name for name in names]


def write_pairs(
    path: Path | str,
    rows: Iterable[Mapping[str, Any]],
    columns: Mapping[str, str] = CAPTION_COLUMNS,
    facts: Mapping[str, Any] | None = None,
) -> int:
    """Writes rows into an arrow file with the original's schema, as a stream, in memory for one record batch.

    The file appears under its name only when it is complete; an exception leaves what was there before.

    Args:
        path: The file to write; its folder must exist.
        rows: One mapping per image, with a value for every column.
        columns: Kind of each column, in the file's order.
        facts: What ``ArrowTable.facts`` will return, of types that JSON knows.

    Returns:
        The number of rows.

    Deviation: The pandas metadata names no index (as ``pa.Table.from_pandas(..., preserve_index=False)`` does), because
    a range index states the number of rows, which a stream does not know beforehand.
    """
    path = Path(path)
    metadata = _pandas_metadata(columns) | ({FACTS_KEY: json.dumps(facts)} if facts else {})
    schema = pa.schema([(name, _arrow_type(kind)) for name, kind in columns.items()], metadata)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            num_rows = 0
            for chunk in _chunks(rows):
                arrays = [pa.array([row[name] for row in chunk], schema.field(name).type) for name in columns]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
                num_rows += len(chunk)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return num_rows


def _chunks(rows: Iterable[Mapping[str, Any]]) -> Iterable[list[Mapping[str, Any]]]:
    """Yields consecutive rows whose images add up to about ``BATCH_BYTES``; one empty list when there are none."""
    chunk: list[Mapping[str, Any]] = []
    num_bytes = num_chunks = 0
    for row in rows:
        if chunk and num_bytes + len(row["image"]) > BATCH_BYTES:
            yield chunk
            chunk, num_bytes, num_chunks = [], 0, num_chunks + 1
        chunk.append(row)
        num_bytes += len(row["image"])
    if chunk or not num_chunks:
        yield chunk


def _arrow_type(kind: str) -> pa.DataType:
    return pa.list_(_arrow_type(kind[5:-1])) if kind.startswith("list<") else _TYPES[kind]


def _pandas_metadata(columns: Mapping[str, str]) -> dict[str | bytes, str]:
    """Returns the schema metadata from which pandas restores a frame of these columns."""

    def pandas_name(kind: str) -> str:
        return f"list[{pandas_name(kind[5:-1])}]" if kind.startswith("list<") else _PANDAS_NAMES[kind]

    fields = [
        {"name": name, "field_name": name, "pandas_type": pandas_name(kind), "numpy_type": "object", "metadata": None}
        for name, kind in columns.items()
    ]
    creator = {"library": "pyarrow", "version": pa.__version__}
    return {"pandas": json.dumps({"index_columns": [], "column_indexes": [], "columns": fields, "creator": creator})}


def _open_file(path: Path) -> list[Batch]:
    """Returns the record batches of one arrow file, mapped into memory; one without rows if the file has none."""
    try:
        source = pa.memory_map(str(path))
    except FileNotFoundError:
        raise UserError(f"The arrow file {path} does not exist.") from None
    except OSError as error:
        raise UserError(f"The arrow file {path} cannot be opened: {error}.") from None
    try:
        reader = pa.ipc.open_file(source)
        check_size(reader.num_record_batches, 0, 0, source.size())
        if is_compressed(source):
            raise UserError(
                f"{path} is compressed, so that its rows cannot stay in the file until they are asked for; write it "
                "without compression."
            )
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        num_rows = sum(batch.num_rows for batch in batches)
        check_size(len(batches), num_rows, sum(batch.get_total_buffer_size() for batch in batches), source.size())
    except (pa.ArrowException, OSError, EOFError) as error:
        source.seek(0)
        if source.read(6) == b"ARROW1":
            raise UserError(
                f"{path} is truncated or damaged: it starts as an Arrow file but does not end as one ({error})."
            ) from None
        raise UserError(f"{path} is not an Arrow IPC file, as `fastm3ae prepare` writes them: {error}.") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    _check_names(reader.schema, path)
    batches = batches or [_no_rows(reader.schema)]
    first_rows = itertools.accumulate((batch.num_rows for batch in batches), initial=0)
    return [Batch(batch, path, first_row) for batch, first_row in zip(batches, first_rows, strict=False)]


def _check_names(schema: pa.Schema, path: Path) -> None:
    try:
        schema.names  # noqa: B018
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged in the name of a column: {error}.") from None


def _no_rows(schema: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch([pa.array([], field.type) for field in schema], schema=schema)
