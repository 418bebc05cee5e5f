"""Arrow files: what is written reads back, several files and batches read like one, and bad files are named."""

import itertools
import json
import os
import pickle
import random
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fastm3ae.data import arrow
from fastm3ae.data.arrow import (
    CAPTION_COLUMNS,
    MELINDA_COLUMNS,
    VQA_COLUMNS,
    ArrowTable,
    dataset_files,
    write_pairs,
)
from fastm3ae.errors import UserError

GOLDEN = Path(__file__).parent / "data" / "golden" / "data"
READ = {"image": "binary", "caption": "list<string>", "image_id": "string"}


def make_rows(count, seed=0):
    rng = random.Random(seed)
    return [
        {
            "image": rng.randbytes(rng.randint(0, 400)),
            "caption": [f"caption {i} {j} é" for j in range(rng.randint(0, 4))],
            "image_id": f"images/{i}.png",
            "split": "train",
        }
        for i in range(count)
    ]


def write_table(path, table, rows_per_batch=None):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)


def read_rows(table):
    names = ("caption", "image_id", "split")
    return [
        {"image": bytes(table.image_bytes(i))} | {name: table.row(i, name) for name in names} for i in range(len(table))
    ]


def test_written_rows_read_back(tmp_path):
    rows = make_rows(17)
    assert write_pairs(tmp_path / "a_train.arrow", iter(rows)) == 17
    table = ArrowTable.open([tmp_path / "a_train.arrow"], CAPTION_COLUMNS)
    assert read_rows(table) == rows
    assert table.column("caption") == [row["caption"] for row in rows]
    assert os.listdir(tmp_path) == ["a_train.arrow"]


@pytest.mark.parametrize(
    "name, columns",
    [
        ("roco_train", CAPTION_COLUMNS),
        ("vqa_vqa_rad_train", VQA_COLUMNS),
        ("cls_melinda_train", MELINDA_COLUMNS),
    ],
)
def test_the_originals_file_is_written_alike(tmp_path, name, columns):
    original = pa.ipc.open_file(GOLDEN / f"{name}.arrow").read_all()
    write_pairs(tmp_path / "ours.arrow", original.to_pylist(), columns)
    ours = pa.ipc.open_file(tmp_path / "ours.arrow").read_all()
    assert ours.equals(original) and ours.schema.equals(original.schema)
    written, expected = (json.loads(table.schema.metadata[b"pandas"])["columns"] for table in (ours, original))
    assert written == expected
    ArrowTable.open([GOLDEN / f"{name}.arrow"], columns)


def test_facts_are_read_back_and_change_nothing_else(tmp_path):
    facts = {"options": {"answers": "train"}, "classes": {"answer_labels": ["yes", "é"]}}
    write_pairs(tmp_path / "a.arrow", make_rows(3), facts=facts)
    write_pairs(tmp_path / "b.arrow", make_rows(0), facts=facts)
    write_pairs(tmp_path / "c.arrow", make_rows(3))
    table = ArrowTable([tmp_path / name for name in ("a.arrow", "b.arrow", "c.arrow")])
    assert table.facts() == {"a.arrow": facts, "b.arrow": facts, "c.arrow": {}}
    a, c = (pa.ipc.open_file(tmp_path / name).read_all() for name in ("a.arrow", "c.arrow"))
    assert a.equals(c) and a.schema.equals(c.schema)
    assert a.schema.metadata[b"pandas"] == c.schema.metadata[b"pandas"]
    assert ArrowTable([GOLDEN / "roco_train.arrow"]).facts() == {"roco_train.arrow": {}}


def test_damaged_facts_are_located(tmp_path):
    table = pa.table({"image": [b""]}).replace_schema_metadata({"fastm3ae": '{"options'})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=r"a\.arrow is damaged in its metadata 'fastm3ae'"):
        ArrowTable([tmp_path / "a.arrow"]).facts()


def test_pandas_metadata_restores_a_frame(tmp_path):
    pytest.importorskip("pandas")
    write_pairs(tmp_path / "a.arrow", make_rows(3))
    frame = pa.ipc.open_file(tmp_path / "a.arrow").read_all().to_pandas()
    assert list(frame.columns) == list(CAPTION_COLUMNS) and list(frame.index) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(12))
def test_files_and_batches_read_like_one_table(tmp_path, seed):
    """However the rows are cut into files, batches and column widths, the table is the list of rows."""
    rng = random.Random(seed)
    rows = make_rows(rng.randint(1, 60), seed)
    large = pa.schema(
        {"image": pa.large_binary(), "caption": pa.large_list(pa.large_string()), "image_id": pa.large_string()}
        | {"split": pa.large_string()}
    )
    paths, where, start = [], [], 0
    while start < len(rows) or not paths:
        stop = start + rng.randint(0, len(rows))
        path = tmp_path / f"part{len(paths)}.arrow"
        part = rows[start:stop]
        if rng.random() < 0.5:
            write_table(path, pa.Table.from_pylist(part, schema=large), rng.choice([None, 1, 2, 7]))
        else:
            write_pairs(path, part)
        paths.append(path)
        where += [(str(path), i) for i in range(len(part))]
        start = stop
    table = ArrowTable.open(paths, CAPTION_COLUMNS)
    assert read_rows(table) == rows
    assert [table.locate(i) for i in range(len(table))] == where
    again = pickle.loads(pickle.dumps(table))
    assert read_rows(again) == rows
    assert table.text_bytes("caption").tolist() == [len(text.encode()) for row in rows for text in row["caption"]]


def test_writer_starts_a_record_batch_before_it_grows_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow, "BATCH_BYTES", 100)
    rows = [{"image": bytes(n), "caption": ["x"], "image_id": str(n), "split": "val"} for n in (40, 40, 40, 250, 1, 99)]
    write_pairs(tmp_path / "a.arrow", rows)
    reader = pa.ipc.open_file(tmp_path / "a.arrow")
    sizes = [[len(v) for v in reader.get_batch(i)["image"].to_pylist()] for i in range(reader.num_record_batches)]
    assert sizes == [[40, 40], [40], [250], [1, 99]]
    assert [len(b) for b in ArrowTable([tmp_path / "a.arrow"]).column("image")] == [40, 40, 40, 250, 1, 99]


def test_failing_rows_leave_the_old_file(tmp_path):
    path = tmp_path / "a_val.arrow"
    write_pairs(path, make_rows(2))
    before = path.read_bytes()

    def rows():
        yield from make_rows(3, seed=1)
        raise RuntimeError("the disk of the images is gone")

    with pytest.raises(RuntimeError, match="disk"):
        write_pairs(path, rows())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_empty_split_has_the_schema_and_no_rows(tmp_path):
    assert write_pairs(tmp_path / "a_train.arrow", []) == 0
    table = ArrowTable.open([tmp_path / "a_train.arrow"], CAPTION_COLUMNS)
    assert len(table) == 0 and table.column("caption") == []
    with pytest.raises(IndexError):
        table.row(0, "caption")


def test_empty_split_of_the_original_opens(tmp_path):
    """pandas gives the columns of an empty frame the type null."""
    write_table(tmp_path / "a.arrow", pa.table({name: pa.nulls(0) for name in CAPTION_COLUMNS}))
    table = ArrowTable.open([tmp_path / "a.arrow"], CAPTION_COLUMNS)
    assert len(table) == 0 and table.text_bytes("caption").tolist() == []
    write_table(tmp_path / "b.arrow", pa.table({"caption": [[], []]}))  # of type list<null>
    write_table(tmp_path / "c.arrow", pa.table({"caption": [["é", "abc"], [], ["x"]]}))
    table = ArrowTable([tmp_path / name for name in ("a.arrow", "b.arrow", "c.arrow")])
    assert table.text_bytes("caption").tolist() == [2, 3, 1]


def test_images_are_not_copied(tmp_path):
    """Opening and reading allocate nothing of the images' size, and an image's bytes lie inside the mapped file."""
    image = random.Random(0).randbytes(2**20)
    rows = [{"image": image, "caption": ["a"], "image_id": str(i), "split": "train"} for i in range(100)]
    write_pairs(tmp_path / "a.arrow", rows)
    before = pa.total_allocated_bytes()
    table = ArrowTable.open([tmp_path / "a.arrow"], READ)
    views = [table.image_bytes(i) for i in range(len(table))]
    assert pa.total_allocated_bytes() - before < 2**16
    assert views[57] == image
    assert len(pickle.dumps(table)) < 500


def test_opening_reads_no_image(tmp_path):
    """A process's resident memory grows by far less than the file: validation looks at offsets and texts only."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")

    def resident_mib():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    rows = [{"image": bytes(2**20), "caption": ["a"], "image_id": str(i), "split": "train"} for i in range(160)]
    write_pairs(tmp_path / "a.arrow", rows)
    del rows
    before = resident_mib()
    table = ArrowTable.open([tmp_path / "a.arrow"], READ)
    assert table.column("caption")[-1] == ["a"]
    assert resident_mib() - before < 40


def test_missing_column_names_the_nearest(tmp_path):
    write_table(tmp_path / "a.arrow", pa.table({"image": [b""], "captions": [["x"]], "image_id": ["i"]}))
    with pytest.raises(UserError, match=r"a\.arrow has no column 'caption'; .*Did you mean 'captions'\?"):
        ArrowTable.open([tmp_path / "a.arrow"], READ)


@pytest.mark.parametrize(
    "column, values, message",
    [
        ("caption", ["x"], r"column 'caption' has type string, expected list<string>"),
        ("caption", [[1]], r"column 'caption' has type list<.*int64>, expected list<string>"),
        ("image", ["x"], r"column 'image' has type string, expected binary"),
        ("image_id", [None], r"row 0: column 'image_id' is null"),
        ("caption", [["x", None]], r"row 0: column 'caption' is null or holds a null"),
    ],
)
def test_unusable_column_is_named(tmp_path, column, values, message):
    good = {"image": [b""], "caption": [["x"]], "image_id": ["i"]}
    write_table(tmp_path / "a.arrow", pa.table(good | {column: values}))
    with pytest.raises(UserError, match=rf"a\.arrow.*{message}"):
        ArrowTable.open([tmp_path / "a.arrow"], READ)


def test_null_in_a_later_batch_is_located(tmp_path):
    captions = [["x"]] * 5 + [None]
    table = pa.table({"image": [b""] * 6, "caption": captions, "image_id": list("abcdef")})
    write_table(tmp_path / "a.arrow", table, rows_per_batch=2)
    with pytest.raises(UserError, match="row 5: column 'caption'"):
        ArrowTable.open([tmp_path / "a.arrow"], READ)


def test_null_image_is_a_bad_row(tmp_path):
    table = pa.table({"image": [b"x", None], "caption": [["x"]] * 2, "image_id": ["i", "j"]})
    write_table(tmp_path / "a.arrow", table)
    opened = ArrowTable.open([tmp_path / "a.arrow"], READ)
    assert opened.image_bytes(0) == b"x"
    with pytest.raises(ValueError, match="no image"):
        opened.image_bytes(1)


@pytest.mark.parametrize("fraction", [0.0001, 0.01, 0.3, 0.9, 0.9999])
def test_truncated_file_is_named(tmp_path, fraction):
    write_pairs(tmp_path / "whole.arrow", make_rows(200))
    whole = (tmp_path / "whole.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(whole[: max(7, int(len(whole) * fraction))])
    with pytest.raises(UserError, match=r"cut\.arrow is truncated or damaged"):
        ArrowTable.open([tmp_path / "cut.arrow"], READ)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n", b"image,caption\n" * 50], ids=["empty", "png", "csv"])
def test_other_file_is_named(tmp_path, content):
    (tmp_path / "a.arrow").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.arrow is not an Arrow IPC file"):
        ArrowTable.open([tmp_path / "a.arrow"], READ)


def test_missing_file_and_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.arrow does not exist"):
        ArrowTable.open([tmp_path / "none.arrow"], READ)
    with pytest.raises(UserError, match="cannot be opened"):
        ArrowTable.open([tmp_path], READ)


def test_overwritten_offsets_are_found(tmp_path):
    """A damaged file whose footer is intact must not reach the reader, which would follow wild offsets."""
    write_pairs(tmp_path / "a.arrow", make_rows(50))
    content = bytearray((tmp_path / "a.arrow").read_bytes())
    ends = itertools.accumulate((len(row["image"]) for row in make_rows(50)), initial=0)
    position = content.find(b"".join(end.to_bytes(4, "little") for end in ends))
    assert position > 0
    content[position + 16 : position + 20] = (2**31 - 1).to_bytes(4, "little")
    (tmp_path / "a.arrow").write_bytes(content)
    with pytest.raises(UserError, match="damaged in column 'image'"):
        ArrowTable.open([tmp_path / "a.arrow"], READ)


def test_dataset_files(tmp_path):
    for name in ("roco_train", "medicat_train", "roco_val"):
        write_pairs(tmp_path / f"{name}.arrow", [])
    assert dataset_files(tmp_path, ["medicat", "roco"], "train") == [
        tmp_path / "medicat_train.arrow",
        tmp_path / "roco_train.arrow",
    ]
    with pytest.raises(UserError, match=r"no medicat_val\.arrow .* roco_val\.arrow.*Did you mean"):
        dataset_files(tmp_path, ["roco", "medicat"], "val")
    with pytest.raises(UserError, match="does not exist"):
        dataset_files(tmp_path / "nowhere", ["roco"], "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="it holds no arrow file"):
        dataset_files(tmp_path / "empty", ["roco"], "train")


def test_a_damaged_column_name_is_a_sentence(tmp_path):
    path = tmp_path / "one.arrow"
    write_pairs(path, [{"image": b"x", "caption": ["a b c"], "image_id": "1", "split": "train"}])
    path.write_bytes(path.read_bytes().replace(b"caption", b"capt\xffon"))
    with pytest.raises(UserError, match="one.arrow"):
        ArrowTable.open([path], {"caption": "list<string>"})


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path, compression):
    """A gigabyte of zeros takes some kilobytes of the file."""
    size = 2**30
    offsets = pa.py_buffer(np.array([0, size], np.int32).tobytes())
    caption = pa.StringArray.from_buffers(1, offsets, pa.py_buffer(np.zeros(size, np.uint8)))
    table = pa.table({"image": [b"x"], "caption": pa.ListArray.from_arrays([0, 1], caption), "image_id": ["i"]})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema, options=options) as writer:
        writer.write_table(table)
    before = pa.total_allocated_bytes()
    with pytest.raises(UserError, match=r"a\.arrow is compressed, so that its rows cannot stay in the file"):
        ArrowTable.open([tmp_path / "a.arrow"], READ)
    assert pa.total_allocated_bytes() - before < 2**20
    dictionary = pa.table({"x": pa.array(["a"] * 100).dictionary_encode()})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), dictionary.schema, options=options) as writer:
        writer.write_table(dictionary)
    with pytest.raises(UserError, match="is compressed"):
        ArrowTable([tmp_path / "a.arrow"])


def test_a_file_cannot_claim_more_than_its_bytes(tmp_path):
    """Nulls take no place, so that a small file may hold any number of them."""
    path = tmp_path / "a.arrow"
    write_table(path, pa.table({"image": pa.nulls(10**9)}))
    with pytest.raises(UserError, match=r"a\.arrow is damaged: it claims 1000000000 rows in \d+ bytes"):
        ArrowTable([path])
    many = pa.ListArray.from_arrays([0, 10**9], pa.nulls(10**9))
    write_table(path, pa.table({"image": [b"x"], "caption": many, "image_id": ["i"]}))
    with pytest.raises(UserError, match="damaged in column 'caption': 1000000000 values in"):
        ArrowTable.open([path], READ)


def test_batches_that_share_their_bytes_are_refused(tmp_path):
    """The footer says where each batch is: it may name one place many times."""
    path = tmp_path / "a.arrow"
    with pa.ipc.new_file(str(path), pa.schema([("image", pa.binary())])) as writer:
        for _ in range(20):
            writer.write_batch(pa.record_batch({"image": [b"x" * 10**5]}))
    data = path.read_bytes()
    end = len(data) - 10
    start = end - int.from_bytes(data[end : end + 4], "little")
    footer = data[start:end]
    # A place is that of a message, which begins with ff ff ff ff, the length of its head, and that of its body.
    found = (footer[i : i + 24] for i in range(0, len(footer) - 23, 4))
    places = [place for place in found if data[struct.unpack("<q", place[:8])[0] :][:4] == b"\xff" * 4
              and 10**5 < struct.unpack("<q", place[16:])[0] < 2 * 10**5]  # fmt: skip
    assert len(places) == 20
    for place in places:
        footer = footer.replace(place, places[0])
    path.write_bytes(data[: struct.unpack("<q", places[1][:8])[0]] + footer + data[end:])
    assert pa.ipc.open_file(str(path)).read_all().num_rows == 20
    with pytest.raises(UserError, match=r"it claims 2000\d+ bytes of values in \d{6} bytes"):
        ArrowTable([path])


def test_an_empty_batch_with_wild_bounds_does_not_abort(tmp_path):
    """Arrow does not validate the bounds of no list at all, and ends the process where it is asked for its values."""
    bounds = pa.py_buffer(struct.pack("<i", 10**9))
    captions = pa.ListArray.from_buffers(pa.list_(pa.string()), 0, [None, bounds], children=[pa.array([], pa.string())])
    columns = {"image": pa.array([], pa.binary()), "caption": captions, "image_id": pa.array([], pa.string())}
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), pa.schema([(n, c.type) for n, c in columns.items()])) as writer:
        writer.write_batch(pa.record_batch(columns))
    data = (tmp_path / "a.arrow").read_bytes()
    assert bounds.to_pybytes() in data
    assert len(ArrowTable.open([tmp_path / "a.arrow"], READ)) == 0


@pytest.mark.parametrize(
    "facts",
    [
        "[]", "null", "5", "[" * 100_000, "9" * 5000, '{"classes": []}', '{"classes": {"labels": "ab"}}',
        '{"classes": {"labels": [1]}}', '{"classes": {"labels": ["\\ud800"]}}', '{"options": [1]}',
        '{"options": {"a": {"b": 1}}}',
    ],
)  # fmt: skip
def test_facts_of_another_form_are_refused(tmp_path, facts):
    table = pa.table({"image": [b""]}).replace_schema_metadata({"fastm3ae": facts})
    write_table(tmp_path / "a.arrow", table)
    with pytest.raises(UserError, match=r"a\.arrow is damaged in its metadata 'fastm3ae': ."):
        ArrowTable([tmp_path / "a.arrow"]).facts()
