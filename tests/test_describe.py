"""What inspect says of an arrow file, and the hashes by which files are compared."""

import struct

import pyarrow as pa
import pytest
from prepared import image_bytes

from fastm3ae.data.arrow import CAPTION_COLUMNS, write_pairs
from fastm3ae.data.datasets import PairDataset
from fastm3ae.data.describe import describe_arrow
from fastm3ae.errors import UserError

TEXTS = ["one", "two words", "three"]


def test_description(tmp_path):
    lines = [
        {
            "image": image_bytes(i, "JPEG"),
            "caption": ["one", "two words", "three"][:n],
            "image_id": str(i),
            "split": "x",
        }
        for i, n in enumerate((3, 1, 2))
    ]
    write_pairs(tmp_path / "made.arrow", lines)
    described = describe_arrow(tmp_path / "made.arrow")
    assert described.num_images == 3 and described.texts_per_image == [3, 1, 2]
    assert (
        described.formats == {"JPEG, mode L": 3}
        and described.widths_px == [8, 8, 8]
        and described.heights_px == [6, 6, 6]
    )
    text = described.render()
    assert (
        "3 images" in text
        and "caption: list<item: string>" in text
        and described.fingerprint in text
        and described.content in text
    )
    assert "6 texts" in text and "3 x JPEG, mode L" in text


def test_fingerprint_is_of_the_content(tmp_path):
    lines = [{"image": image_bytes(i), "caption": ["x"] * i, "image_id": str(i), "split": "train"} for i in range(5)]
    write_pairs(tmp_path / "one.arrow", lines)
    write_pairs(tmp_path / "other_column_order.arrow", lines, dict(sorted(CAPTION_COLUMNS.items())))
    write_pairs(tmp_path / "other_order.arrow", lines[::-1])
    lines[2] = lines[2] | {"image": lines[2]["image"][:-1] + b"?"}
    write_pairs(tmp_path / "other_byte.arrow", lines)
    prints = [
        describe_arrow(tmp_path / f"{name}.arrow").content
        for name in ("one", "other_column_order", "other_order", "other_byte")
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_fingerprint_is_of_texts_ids_and_image_sizes(tmp_path):
    lines = [{"image": image_bytes(i), "caption": ["x"] * i, "image_id": str(i), "split": "train"} for i in range(5)]
    changed = {
        "same": {},
        "other_byte": {"image": lines[2]["image"][:-1] + b"?"},  # which would cost reading every image to see
        "other_size": {"image": lines[2]["image"] + b"?"},
        "other_text": {"caption": ["x", "y"]},
        "other_id": {"image_id": "2b"},
    }
    prints = {}
    for name, change in changed.items():
        write_pairs(tmp_path / f"{name}.arrow", [*lines[:2], lines[2] | change, *lines[3:]])
        prints[name] = describe_arrow(tmp_path / f"{name}.arrow").fingerprint
        dataset = PairDataset([tmp_path / f"{name}.arrow"])
        assert dataset.fingerprints() == {f"{name}.arrow": prints[name]}
    assert prints["same"] == prints["other_byte"] and len(set(prints.values())) == 4


def test_description_of_few_bad_and_no_images(tmp_path):
    lines = [{"image": b"?" * i, "caption": [], "image_id": str(i), "split": "val"} for i in range(50)]
    write_pairs(tmp_path / "bad.arrow", lines)
    described = describe_arrow(tmp_path / "bad.arrow", max_images=7)
    assert described.num_sampled == 7 and described.formats == {"unreadable": 7} and "unreadable" in described.render()
    write_pairs(tmp_path / "none.arrow", [])
    assert "0 images" in describe_arrow(tmp_path / "none.arrow").render()
    (tmp_path / "cut.arrow").write_bytes((tmp_path / "bad.arrow").read_bytes()[:-20])
    with pytest.raises(UserError, match="truncated"):
        describe_arrow(tmp_path / "cut.arrow")


def test_description_says_how_the_file_was_prepared(tmp_path):
    facts = {"options": {"answers": "train", "languages": ["en", "zh"]}, "classes": {"y": list("abcdef"), "z": ["g"]}}
    write_pairs(tmp_path / "made.arrow", [], facts=facts)
    described = describe_arrow(tmp_path / "made.arrow")
    assert described.options == facts["options"] and described.classes == facts["classes"]
    text = described.render()
    assert "prepared with answers=train, languages=en zh\n" in text
    assert "y: 6 classes ('a', 'b', 'c', 'd', 'e', ...)\nz: 1 classes ('g')\n" in text
    write_pairs(tmp_path / "other.arrow", [])
    assert "prepared" not in describe_arrow(tmp_path / "other.arrow").render()


# Real releases, where a folder with them is at hand


def test_columns_that_cannot_be_shown_are_refused(tmp_path):
    """A damaged column that nobody reads in training must not be read past its end either."""
    path = tmp_path / "a.arrow"
    good = {"image": [b"x"], "image_id": ["i"]}
    for name, values, message in (
        ("when", pa.array([1], pa.timestamp("s")), r"column 'when' has type timestamp\[s\], expected bytes, texts"),
        ("split", pa.array(["x" * 77777]), "damaged in column 'split'"),
        ("n", pa.ListArray.from_arrays([0, 10**9], pa.nulls(10**9)), "damaged in column 'n': 1000000000 values"),
    ):
        table = pa.table(good | {name: values})
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
        if name == "split":
            data = path.read_bytes()
            at = data.rindex(struct.pack("<ii", 0, 77777))  # the bounds of the text, behind the batch's description
            path.write_bytes(data[:at] + struct.pack("<ii", 0, 2**30) + data[at + 8 :])
        with pytest.raises(UserError, match=message):
            describe_arrow(path)
