"""Arrow files, to ``fastm3ae.data.arrow``, every data set made of its rows, and ``fastm3ae inspect``."""

import io
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from fastm3ae.data.arrow import (
    CAPTION_COLUMNS,
    FACTS_KEY,
    MELINDA_COLUMNS,
    SEGMENTATION_COLUMNS,
    VQA_COLUMNS,
    ArrowTable,
    write_pairs,
)
from fastm3ae.data.datasets import ClassificationDataset, ImageDataset, PairDataset, RowsOfImages, VqaDataset
from fastm3ae.data.describe import describe_arrow
from fastm3ae.errors import BadSample, UserError
from fastm3ae.tasks.labels import read_labels
from fuzz.mutate import EXTREMES, mutate, odd_json

__all__ = ["ArrowTarget"]

BOMB_BYTES = 2**28
MOST_ITEMS = 5

DATA_SETS: tuple[Callable[[list[Path]], RowsOfImages], ...] = (
    PairDataset,
    VqaDataset,
    lambda files: ClassificationDataset(files, "p_meth_label"),
    ImageDataset,
)


def png(mode: str = "L") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.eye(4, dtype=np.uint8) * 255).convert(mode).save(stream, "PNG")
    return stream.getvalue()


def rows(columns: dict[str, str], num: int) -> list[dict[str, Any]]:
    """Rows of two texts each."""
    row = {
        "image": png(), "mask": png(), "caption": ["a nodule", "é"], "questions": ["is it?", "where?"],
        "answers": [["yes"], ["left", "lung"]], "answer_labels": [[0], [1, 2]], "answer_scores": [[1.0], [0.5, 0.5]],
        "question_id": [1, 2], "answer_type": [0, 1], "i_meth": [0, 1], "p_meth": [1, 0], "i_meth_label": [0, 0],
        "p_meth_label": [0, 1], "labels": [1, 0], "split": "train", "patient": "p1",
    }  # fmt: skip
    return [{name: row.get(name, f"images/{i}.png") for name in columns} for i in range(num)]


def written(table: pa.Table, rows_per_batch: int | None = 2, **options: Any) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)
    return sink.getvalue()


def bomb(compression: str) -> bytes:
    """A small file with a caption that unpacks to much."""
    offsets = pa.py_buffer(np.array([0, BOMB_BYTES], np.int32).tobytes())
    text = pa.StringArray.from_buffers(1, offsets, pa.py_buffer(np.zeros(BOMB_BYTES, np.uint8)))
    captions = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), text)
    table = pa.table({"image": [png()], "caption": captions, "image_id": ["i"], "split": ["train"]})
    return written(table, compression=compression)


def values_of_type(rng: random.Random, depth: int = 0) -> tuple[pa.DataType, Any]:
    """A type that an arrow file may have, and one value of it."""
    if depth < 6 and rng.random() < 0.5:
        inner, value = values_of_type(rng, depth + 1)
        kinds = (pa.list_, pa.large_list, lambda t: pa.list_(t, 2), pa.list_view, lambda t: pa.struct({"a": t}))
        made = rng.choice(kinds)(inner)
        if pa.types.is_struct(made):
            return made, rng.choice(({"a": value}, {"a": None}))
        return made, [value, None] if pa.types.is_fixed_size_list(made) else rng.choice(([], [value] * 3, [None]))
    return rng.choice(
        (
            (pa.null(), None), (pa.string(), "a"), (pa.large_string(), "é"), (pa.binary(), png()), (pa.bool_(), True),
            (pa.large_binary(), png("RGBA")), (pa.string_view(), "a" * 20), (pa.binary_view(), b"x"), (pa.int8(), 1),
            (pa.uint64(), 2**64 - 1), (pa.int64(), -1), (pa.int64(), 2**62), (pa.float64(), float("nan")),
            (pa.float16(), 1.0), (pa.timestamp("ns"), 2**62), (pa.date32(), 2**31 - 1), (pa.duration("s"), 2**62),
            (pa.dictionary(pa.int8(), pa.string()), "x"), (pa.decimal128(38, 0), 1), (pa.binary(3), b"abc"),
            (pa.map_(pa.string(), pa.int8()), [("k", 1)]), (pa.time64("ns"), 2**60), (pa.int64(), 10**9),
        )
    )  # fmt: skip


class ArrowTarget:
    """Arrow files."""

    name, documented, limit_s, limit_mib = "arrow", (UserError,), 10.0, 128.0

    def __init__(self) -> None:
        self.tables, self.seeds = [], []
        classes = {"answer_labels": ["yes", "left", "lung"], "p_meth_label": ["a", "b"], "labels": ["a", "b"]}
        for columns in (CAPTION_COLUMNS, VQA_COLUMNS, MELINDA_COLUMNS, SEGMENTATION_COLUMNS | {"patient": "string"}):
            for num in (3, 0):
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder, "seed.arrow")
                    write_pairs(path, rows(columns, num), columns, {"options": {"seed": 0}, "classes": classes})
                    self.seeds.append(path.read_bytes())
                self.tables.append(pa.ipc.open_file(pa.py_buffer(self.seeds[-1])).read_all())
        self.seeds += [written(self.tables[0], compression=compression) for compression in ("lz4", "zstd")]
        self.bombs = [bomb(compression) for compression in ("lz4", "zstd")]

    def begin(self) -> None:
        """There is nothing to prepare."""

    def make(self, rng: random.Random) -> bytes:
        way = rng.random()
        if way < 0.02:
            return rng.choice(self.seeds)
        if way < 0.04:
            data = rng.choice(self.bombs)
            return data if rng.getrandbits(1) else mutate(data, rng)
        if way < 0.5:
            return mutate(rng.choice(self.seeds), rng, self.seeds)
        if way < 0.55:
            return written(self.with_many_nulls(rng), rows_per_batch=None)
        table = rng.choice(self.tables[::2])
        for _ in range(rng.randint(1, 3)):
            table = self.change(table, rng)
        options = {"compression": rng.choice((*[None] * 9, "lz4"))}
        try:
            data = written(table, **options)
        except pa.ArrowException:  # of a type that is not written to files
            return mutate(rng.choice(self.seeds), rng, self.seeds)
        return data if rng.random() < 0.7 else mutate(data, rng, self.seeds)

    def with_many_nulls(self, rng: random.Random) -> pa.Table:
        """Values that take no place in the file, as many as one likes."""
        num = rng.choice((10**6, 2**31 - 2))
        nulls = pa.nulls(num)
        table = rng.choice(self.tables[::2])
        column = rng.choice(table.schema.names)
        if rng.random() < 0.5:
            arrays = {name: nulls for name in rng.choice((table.schema.names, ["image"], ["image", "x"]))}
            return pa.table(arrays)
        lists = pa.ListArray.from_arrays(pa.array([0, num], pa.int32()), nulls)
        return table.slice(0, 1).set_column(table.schema.get_field_index(column), column, lists)

    def change(self, table: pa.Table, rng: random.Random) -> pa.Table:
        """A table with an odd column, an odd value, or odd facts."""
        name = rng.choice(table.schema.names)
        at, way = table.schema.get_field_index(name), rng.randrange(6)
        if at < 0:  # of two columns of one name
            return table
        if way == 0:
            return table.replace_schema_metadata({FACTS_KEY: odd_json(rng).encode(errors="surrogatepass")})
        if way == 1:
            return table.remove_column(at) if table.num_columns > 1 else table
        if way == 2:
            other = rng.choice((name, "", "image", name.upper(), "é", "a" * 10_000, "mask", "\x1b"))
            return table.append_column(other, table.column(at))
        if way == 3:
            kind, value = values_of_type(rng)
            return table.set_column(at, name, pa.array([value] * table.num_rows, kind))
        try:
            values = table.column(at).to_pylist()
        except (OverflowError, ValueError):  # a date that Python has none for, a time of nanoseconds
            return table
        if not values:
            return table
        values[rng.randrange(len(values))] = self.odd_like(values[0], rng)
        try:
            return table.set_column(at, name, pa.array(values))
        except (pa.ArrowException, OverflowError, TypeError, ValueError):  # a value of another kind
            return table

    def odd_like(self, value: Any, rng: random.Random) -> Any:
        if isinstance(value, list):
            return rng.choice((None, [], value * 2, [self.odd_like(value[0], rng)] if value else [], value[:1]))
        if isinstance(value, bytes):
            return rng.choice((None, b"", b"x", png("RGB"), png()[:40], mutate(png(), rng)))
        if isinstance(value, str):
            return rng.choice((None, "", "../../../x", "a\0b", "\ud7ff\u202e", "x" * 100_000))
        return rng.choice((None, *EXTREMES[:-1], float("nan"), float("inf"), -1, 0.5))

    def read(self, data: bytes, folder: Path) -> str:
        path = folder / "made_train.arrow"
        path.write_bytes(data)
        outcome, refusal = "", None
        try:
            describe_arrow(path).render()
        except UserError as error:
            refusal = error
        for data_set in DATA_SETS:
            try:
                self.read_items(data_set([path]))
                outcome = "accepted"
            except UserError as error:
                refusal = error
        if not outcome:
            raise refusal
        return outcome

    def read_items(self, dataset: RowsOfImages) -> None:
        """Asks for everything that training, evaluation and inspection ask for."""
        assert len(dataset.fingerprints()) == 1 and dataset.notes is not None
        json.dumps(ArrowTable(dataset.table.paths).facts())
        for item in [*range(len(dataset))[:MOST_ITEMS], *range(len(dataset))[-1:]]:
            assert isinstance(dataset.image_id(item), str)
            readers = [dataset.image, *([dataset.text] if isinstance(dataset, PairDataset) else [])]
            readers += [dataset.mask] if getattr(dataset, "has_masks", False) else []
            for reader in readers:
                try:
                    reader(item)
                except BadSample as error:
                    assert str(error)
        if not isinstance(dataset, PairDataset) or isinstance(dataset, VqaDataset | ClassificationDataset):
            assert all(isinstance(name, str) for name in read_labels([dataset]))
