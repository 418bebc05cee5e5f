"""MELINDA, on a made-up tree in its layout: classes, splits, what is left out, and what is refused."""

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from corpus import SIZE, TOKENIZER
from prepared import SPLITS, image_bytes, left_out, write

from fastm3ae.cli import main
from fastm3ae.data.arrow import MELINDA_COLUMNS, ArrowTable
from fastm3ae.data.collate import BatchRequest
from fastm3ae.data.collate_pairs import ClassificationBatches
from fastm3ae.data.datasets import ClassificationDataset
from fastm3ae.data.images import make_transform
from fastm3ae.data.prepare import prepare_melinda
from fastm3ae.errors import UserError

CLASSES = ("i_meth", "p_meth", "i_meth_label", "p_meth_label")
TABLES = {  # figure, caption, then the classes
    "train.csv": [
        ("1_A.jpg", "Flag-tagged  protein,\nby Western blot", "pull down", "western blot", "biochemical", "blot"),
        ("2_B.jpg", "Two cells", "microscopy", "not determined", "imaging", "none"),
        ("1_A.jpg", "The same panel again", "anti tag", "western blot", "biochemical", "blot"),
    ],
    "dev.csv": [("3.jpg", "A gel", "two hybrid", "sequence", "genetic", "other")],
    "test.csv": [("4.jpg", "Another gel", "pull down", "sequence", "biochemical", "other")],
}


def write_melinda(root, tables=TABLES, missing=()):
    for name, rows in tables.items():
        stream = io.StringIO()
        csv.writer(stream).writerows([("", "figure_file", "caption", *CLASSES), *((i, *r) for i, r in enumerate(rows))])
        write(root / name, stream.getvalue())
        for figure, *_ in rows:
            if figure not in missing:
                write(root / "melinda_images" / figure, image_bytes(sum(map(ord, figure)), "JPEG"))
    return root


@pytest.fixture
def melinda(tmp_path):
    return write_melinda(tmp_path / "melinda")


def content_of(output, split, column):
    return ArrowTable.open([output / f"cls_melinda_{split}.arrow"], MELINDA_COLUMNS).column(column)


def test_melinda_is_the_originals(melinda, tmp_path):
    out = tmp_path / "out"
    report = prepare_melinda(melinda, out)
    assert content_of(out, "train", "image_id") == ["melinda_images/1_A.jpg", "melinda_images/2_B.jpg"]
    assert content_of(out, "train", "caption") == [
        ["Flag-tagged  protein,\nby Western blot", "The same panel again"],
        ["Two cells"],
    ]
    assert content_of(out, "train", "i_meth") == [[2, 0], [1]] and content_of(out, "val", "i_meth") == [[3]]
    assert content_of(out, "test", "p_meth") == [[1]] and content_of(out, "train", "p_meth") == [[2, 2], [0]]
    assert [content_of(out, split, "i_meth_label") for split in SPLITS] == [[[0, 0], [2]], [[1]], [[0]]]
    assert [content_of(out, split, "p_meth_label") for split in SPLITS] == [[[0, 0], [1]], [[2]], [[2]]]
    assert "4 i_meth, 3 p_meth, 3 i_meth_label, 3 p_meth_label" in report.render()
    assert "captions" in report.render() and "Nothing was left out." in report.render()
    schema = pa.ipc.open_file(out / "cls_melinda_train.arrow").schema
    assert schema.names == list(MELINDA_COLUMNS) and b"pandas" in schema.metadata


def test_recorded_files_come_out_again(tmp_path):
    """The original's recorded files, from classes whose order is that of their recorded numbers."""
    golden = Path(__file__).parent / "data/golden/data/data_pipeline.json"
    recorded = json.loads(golden.read_text())["arrow"]
    content = {split: recorded[f"cls_melinda_{split}.arrow"]["content"] for split in SPLITS}
    tables = {}
    for split, rows in content.items():
        columns = (rows[name] for name in ("image_id", "caption", *CLASSES))
        tables[f"{'dev' if split == 'val' else split}.csv"] = [
            (Path(image).name, caption, *(f"method {label}" for label in labels))
            for image, captions, *classes in zip(*columns, strict=True)
            for caption, *labels in zip(captions, *classes, strict=True)
        ]
    prepare_melinda(write_melinda(tmp_path, tables), tmp_path / "out")
    for split, rows in content.items():
        for name, values in rows.items():
            got = content_of(tmp_path / "out", split, name)
            assert got == ([f"melinda_images/{Path(v).name}" for v in values] if name == "image_id" else values), name


def test_classes_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    """As pandas, by which the original reads, makes numbers of them."""
    tables = {
        name: [(f"{name}{value}.jpg", "A gel", value, f"c{value}", "x", "y") for value in values]
        for name, values in {"train.csv": ("10", "9"), "dev.csv": ("2",), "test.csv": ("-1",)}.items()
    }
    prepare_melinda(write_melinda(tmp_path, tables), tmp_path / "out")
    assert content_of(tmp_path / "out", "train", "i_meth") == [[3], [2]]
    assert content_of(tmp_path / "out", "train", "p_meth") == [[1], [3]]  # c-1, c10, c2, c9


def test_figure_in_several_splits_goes_to_the_last(tmp_path):
    tables = TABLES | {"test.csv": [("2_B.jpg", "Two other cells", "pull down", "sequence", "biochemical", "other")]}
    report = prepare_melinda(write_melinda(tmp_path, tables), tmp_path / "out")
    assert content_of(tmp_path / "out", "test", "caption") == [["Two cells", "Two other cells"]]
    assert content_of(tmp_path / "out", "test", "i_meth_label") == [[2, 0]]
    assert "Named in several splits and put into the last: 1 (melinda_images/2_B.jpg)" in report.render()


def test_melinda_comes_back_as_classes(melinda, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["prepare", "melinda", str(melinda.parent), str(out)]) == 0
    assert "cls_melinda" in capsys.readouterr().out
    file = out / "cls_melinda_train.arrow"
    assert main(["inspect", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "i_meth: 4 classes ('anti tag', 'microscopy', 'pull down', 'two hybrid')" in printed
    assert "prepared with allow_missing=False, on_bad_image=stop" in printed
    data = ClassificationDataset([file], "i_meth")
    batches = ClassificationBatches(data, TOKENIZER, make_transform("clip", SIZE), max_text_tokens=32)
    batch = batches[BatchRequest(0, 0, [2, 0, 1])]
    assert batch.label_B.tolist() == [1, 2, 0] and batch.texts[0] == "Two cells" and batch.bad_samples == []
    assert batch.image_BCHW.shape == (3, 3, SIZE, SIZE) and not torch.equal(batch.image_BCHW[0], batch.image_BCHW[1])
    classes = ArrowTable([file]).facts()[file.name]["classes"]
    assert [classes["i_meth"][label] for label in batch.label_B] == ["microscopy", "pull down", "anti tag"]


def test_melinda_twice_is_the_same(melinda, tmp_path):
    prepare_melinda(melinda, tmp_path / "a")
    prepare_melinda(melinda, tmp_path / "b")
    for split in SPLITS:
        name = f"cls_melinda_{split}.arrow"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_missing_figures_are_all_named(tmp_path):
    melinda = write_melinda(tmp_path / "m", missing=("1_A.jpg", "4.jpg"))
    message = r"lacks 2 of the 4 images that the tables name; --allow-missing .*: \S*1_A\.jpg, melinda_images/4\.jpg\."
    with pytest.raises(UserError, match=message):
        prepare_melinda(melinda, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = prepare_melinda(melinda, tmp_path / "out", allow_missing=True)
    assert left_out(report) == {"the image file is missing": 2} and "The split test is empty." in report.render()
    assert content_of(tmp_path / "out", "train", "i_meth") == [[1]]  # classes are those of all rows
    write(melinda / "melinda_images/3.jpg", "no image")
    with pytest.raises(UserError, match=r"3\.jpg: the image cannot be decoded"):
        prepare_melinda(melinda, tmp_path / "out", allow_missing=True)
    report = prepare_melinda(melinda, tmp_path / "out", allow_missing=True, on_bad_image="drop")
    assert left_out(report)["the image cannot be decoded"] == 1
    (melinda / "melinda_images/2_B.jpg").unlink()
    (melinda / "melinda_images/3.jpg").unlink()
    with pytest.raises(UserError, match="lacks 4 of the 4 images that the tables name: melinda"):
        prepare_melinda(melinda, tmp_path / "out", allow_missing=True)


def test_row_without_a_caption_is_left_out(melinda, tmp_path):
    write(melinda / "dev.csv", (melinda / "dev.csv").read_text().replace("A gel", " "))
    report = prepare_melinda(melinda, tmp_path / "out")
    assert left_out(report) == {"row without a caption": 1} and "dev.csv, line 2" in report.render()


@pytest.mark.parametrize(
    "change, message",
    [
        (("figure_file", "figure"), r"dev\.csv has no column 'figure_file'; .*Did you mean 'figure'"),
        (("two hybrid", " "), r"dev\.csv, line 2: i_meth is empty; expected a value"),
        (("3.jpg", ""), r"dev\.csv, line 2: figure_file is empty"),
        (("A gel", "A gel, b"), r"dev\.csv, line 2: the row has 8 cells"),
    ],
)
def test_damaged_table_is_located(melinda, tmp_path, change, message):
    write(melinda / "dev.csv", (melinda / "dev.csv").read_text().replace(*change))
    with pytest.raises(UserError, match=message):
        prepare_melinda(melinda, tmp_path / "out")


def test_missing_tables_are_all_named(melinda, tmp_path):
    (melinda / "dev.csv").unlink()
    (melinda / "test.csv").unlink()
    with pytest.raises(UserError, match=r"lacks \S*dev\.csv, \S*test\.csv; expected MELINDA: train\.csv, dev\.csv"):
        prepare_melinda(melinda, tmp_path / "out")
    with pytest.raises(UserError, match="nowhere does not exist; expected MELINDA"):
        prepare_melinda(tmp_path / "nowhere", tmp_path / "out")
