"""RSNA and SIIM-ACR, on made-up trees in their layouts: masks by hand, labels, splits, what is refused."""

import io

import numpy as np
import pytest
from PIL import Image
from prepared import SPLITS, left_out, write
from radiographs import dicom_bytes

from fastm3ae.cli import main
from fastm3ae.data.arrow import SEGMENTATION_COLUMNS, ArrowTable
from fastm3ae.data.prepare import prepare_rsna, prepare_siim
from fastm3ae.errors import UserError

# Of 20 images, in the order of their names, those that scikit-learn's train_test_split(..., test_size=0.3,
# random_state=0), and then test_size=0.5 of the second part, put into val and test.
VAL, TEST = {1, 17, 19}, {8, 10, 18}


def rows_of(output, name):
    """Split, labels, image and mask of each row, by the image's name."""
    found = {}
    for split in SPLITS:
        table = ArrowTable.open([output / f"{name}_{split}.arrow"], SEGMENTATION_COLUMNS)
        for row in range(len(table)):
            image, mask = (
                np.asarray(Image.open(io.BytesIO(table.image_bytes(row, column)))) for column in ("image", "mask")
            )
            assert table.row(row, "split") == split and mask.dtype == image.dtype == np.uint8
            key = table.row(row, "image_id").rpartition("/")[2].removesuffix(".dcm")
            found[key] = (split, table.row(row, "labels"), image, mask)
    return found


def radiograph(number, shape=(5, 7), meaning="MONOCHROME2"):
    pixels = np.zeros(shape, np.uint16)
    pixels[0, :2] = 1000, 10 * number
    return dicom_bytes(pixels, meaning)


# RSNA


def rsna_name(number):
    return f"{number:08x}-aaaa-bbbb-cccc"


def write_rsna(root, boxes, num_images=20):
    """Radiographs of 7 x 5 pixels, with boxes by their number; their rows stand in another order than their names."""
    lines = ["patientId,x,y,width,height,Target"]
    for number in reversed(range(num_images)):
        write(root / f"stage_2_train_images/{rsna_name(number)}.dcm", radiograph(number))
        lines += [f"{rsna_name(number)},{box},1" for box in boxes.get(number, [])]
        if number not in boxes:
            lines.append(f"{rsna_name(number)},,,,,0")
    write(root / "stage_2_train_labels.csv", "\n".join(lines) + "\n")
    return root


BOXES = {
    0: ["2.0,1.0,3.0,2.0"],  # columns 2 to 4, rows 1 and 2
    1: ["0,0,1,1", "5.5,3.0,1.6,9"],  # columns 5 (of 5.5) to 6 (until 7.1), and over the lower edge
    17: ["0,0,3,3", "1,1,3,2"],  # that overlap
}
MASKS = {
    0: [".......", "..###..", "..###..", ".......", "......."],
    1: ["#......", ".......", ".......", ".....##", ".....##"],
    17: ["###....", "####...", "####...", ".......", "......."],
}


@pytest.fixture
def rsna(tmp_path):
    return write_rsna(tmp_path / "rsna", BOXES)


def test_rsna(rsna, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["prepare", "rsna", str(rsna), str(out)]) == 0
    said = capsys.readouterr().out
    found = rows_of(out, "rsna")
    for number in range(20):
        split, labels, image, mask = found[rsna_name(number)]
        assert split == ("val" if number in VAL else "test" if number in TEST else "train")
        assert labels == [int(number in BOXES)]
        drawn = MASKS.get(number, ["......."] * 5)
        assert mask.tolist() == [[255 * (mark == "#") for mark in line] for line in drawn]
        assert image[0, 0] == 255 and image[0, 1] == round(2.55 * number) and not image[1:].any()
    assert [line.split() for line in said.splitlines()[4:6]] == [
        ["images", "with", "train", "val", "test"],
        ["pneumonia", "1", "2", "0"],
    ]
    assert "70 : 15 : 15 (seed 0)" in said and "Nothing was left out." in said
    facts = ArrowTable([out / "rsna_val.arrow"]).facts()["rsna_val.arrow"]
    assert facts["classes"] == {"labels": ["pneumonia"]}
    assert facts["options"] == {"seed": 0, "allow_missing": False, "on_bad_image": "stop"}
    assert main(["inspect", str(out / "rsna_val.arrow")]) == 0
    said = capsys.readouterr().out
    assert (
        "prepared with seed=0, " in said and "labels: 1 classes ('pneumonia')\nimages with each label:\n  2 x p" in said
    )
    assert "3 images sampled:\n  3 x PNG, mode L\n  3 x mask: PNG, mode L\n" in said


def test_rsna_of_another_seed(rsna, tmp_path):
    prepare_rsna(rsna, tmp_path / "a", seed=5)
    prepare_rsna(rsna, tmp_path / "b", seed=5)
    splits = {name: row[0] for name, row in rows_of(tmp_path / "a", "rsna").items()}
    assert {name for name, split in splits.items() if split == "val"} != {rsna_name(number) for number in VAL}
    for split in SPLITS:
        file = f"rsna_{split}.arrow"
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    with pytest.raises(UserError, match="seed must be at least 0 and less than"):
        prepare_rsna(rsna, tmp_path / "out", seed=-1)


def test_inverted_radiograph_becomes_right(rsna, tmp_path):
    write(rsna / f"stage_2_train_images/{rsna_name(3)}.dcm", radiograph(3, meaning="MONOCHROME1"))
    prepare_rsna(rsna, tmp_path / "out")
    image = rows_of(tmp_path / "out", "rsna")[rsna_name(3)][2]
    assert image[0, 0] == 0 and image[0, 1] == 255 - 8 and (image[1:] == 255).all()


def test_what_is_left_out_of_rsna(rsna, tmp_path):
    images = rsna / "stage_2_train_images"
    write(images / "other.dcm", radiograph(0))
    (images / f"{rsna_name(1)}.dcm").unlink()
    with pytest.raises(UserError, match=rf"lacks 1 of the 20 images that the labels name; .*/{rsna_name(1)}\.dcm\."):
        prepare_rsna(rsna, tmp_path / "out")
    write(images / f"{rsna_name(2)}.dcm", b"no DICOM" * 99)
    with pytest.raises(UserError, match=rf"{rsna_name(2)}\.dcm: the DICOM file cannot be decoded: File is missing"):
        prepare_rsna(rsna, tmp_path / "out", allow_missing=True)
    write(images / f"{rsna_name(4)}.dcm", dicom_bytes(np.ones((4, 4, 3), np.uint8), "RGB"))
    write(images / f"{rsna_name(0)}.dcm", radiograph(0, shape=(3, 2)))
    report = prepare_rsna(rsna, tmp_path / "out", allow_missing=True, on_bad_image="drop")
    assert left_out(report) == {
        "image that stage_2_train_labels.csv does not name": 1,
        "the image file is missing": 1,
        "the DICOM file cannot be decoded": 1,
        "the DICOM file is not one grey image": 1,
        "a box lies beside the image": 1,
    }
    assert "starts at (2, 1) of 2 x 3" in report.render()
    found = rows_of(tmp_path / "out", "rsna")
    assert len(found) == 16 and all((row[0] == "val") == (int(name[:8], 16) in VAL) for name, row in found.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("width", "w"), r"has no column 'width'"),
        (("2.0,1.0,3.0,2.0,1", "2.0,1.0,3.0,2.0,2"), r"labels\.csv, line 23: Target must be 0 or 1, got '2'"),
        (("2.0,1.0,3.0,2.0,1", "2.0,1.0,3.0,2.0,0"), r"line 23: Target is 0, but the row has a box"),
        (("2.0,1.0,3.0,2.0,1", ",,,,1"), r"line 23: x, y, width, height must be numbers of at least 0, got '', ''"),
        (("2.0,1.0,3.0", "2.0,-1.0,3.0"), r"line 23: x, y, width, height must be numbers .* '-1\.0'"),
        (("2.0,1.0,3.0", "2.0,1.0,0.2"), r"line 23: the box of 0\.2 x 2\.0 pixels is empty"),
        (("2.0,1.0,3.0,2.0,1", "2.0,1.0,3.0,1"), r"line 23: the row has 5 cells"),
        ((rsna_name(0), "../" + rsna_name(0)), r"line 23: patientId must be letters, digits and dashes, got '\.\./0"),
        ((rsna_name(0), rsna_name(2)), rf"line 23: {rsna_name(2)} is there twice, not each time with a box"),
        ((rsna_name(2), rsna_name(17)), rf"line 20: {rsna_name(17)} is there twice, not each time with a box"),
    ],
)
def test_damaged_table_of_rsna(rsna, tmp_path, change, message):
    table = rsna / "stage_2_train_labels.csv"
    write(table, table.read_text().replace(*change, 1))
    with pytest.raises(UserError, match=message):
        prepare_rsna(rsna, tmp_path / "out")


def test_missing_files_of_rsna_are_all_named(tmp_path):
    (tmp_path / "rsna").mkdir()
    message = (
        r"lacks \S*stage_2_train_labels\.csv, the folder \S*stage_2_train_images; expected RSNA's challenge of 2018"
    )
    with pytest.raises(UserError, match=message):
        prepare_rsna(tmp_path / "rsna", tmp_path / "out")


# SIIM-ACR


def siim_name(number):
    return f"1.2.276.0.7230010.3.1.4.{number:04}"


def write_siim(root, outlines, num_images=20, column=" EncodedPixels"):
    """Radiographs, of 1024 x 1024 pixels where they have outlines, by their number, in folders of their own."""
    lines = [f"ImageId,{column}"]
    for number in reversed(range(num_images)):
        shape = (1024, 1024) if number in outlines else (5, 7)
        folder = f"dicom-images-train/1.2.276.{number}/1.2.276.{number + 1}"
        write(root / folder / f"{siim_name(number)}.dcm", radiograph(number, shape))
        lines += [f"{siim_name(number)}, {outline}" for outline in outlines.get(number, ["-1"])]
    write(root / "train-rle.csv", "\n".join(lines) + "\n")
    return root


OUTLINES = {
    0: ["3 2 1022 3"],  # rows 3 and 4 of column 0; 5 + 1022 = 1024 + 3: rows 3 to 5 of column 1
    1: ["0 1", "1048575 1"],  # the first and the last pixel
    8: ["1023 2", "1024 1"],  # the last row of column 0 and the first of column 1, and the latter again
}
FOUND = {  # (row, column)
    0: {(3, 0), (4, 0), (3, 1), (4, 1), (5, 1)},
    1: {(0, 0), (1023, 1023)},
    8: {(1023, 0), (0, 1)},
}


@pytest.fixture
def siim(tmp_path):
    return write_siim(tmp_path / "siim", OUTLINES)


def test_siim(siim, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["prepare", "siim", str(siim), str(out)]) == 0
    said = capsys.readouterr().out
    found = rows_of(out, "siim")
    for number in range(20):
        split, labels, image, mask = found[siim_name(number)]
        assert split == ("val" if number in VAL else "test" if number in TEST else "train")
        assert labels == [int(number in OUTLINES)] and image.shape == mask.shape
        assert {tuple(place) for place in np.argwhere(mask).tolist()} == FOUND.get(number, set())
        assert set(mask[mask > 0].tolist()) <= {255}
    assert [line.split() for line in said.splitlines()[5:6]] == [["pneumothorax", "1", "1", "1"]]
    names = ArrowTable([out / "siim_val.arrow"]).column("image_id")
    assert f"dicom-images-train/1.2.276.1/1.2.276.2/{siim_name(1)}.dcm" in names
    prepare_siim(write_siim(tmp_path / "other", OUTLINES, column="EncodedPixels"), tmp_path / "again")
    assert (tmp_path / "again/siim_train.arrow").read_bytes() == (out / "siim_train.arrow").read_bytes()


def test_what_is_left_out_of_siim(siim, tmp_path):
    folder = siim / "dicom-images-train"
    write(folder / "1/2/1.9.dcm", radiograph(0))
    next(folder.rglob(f"{siim_name(2)}.dcm")).unlink()
    with pytest.raises(
        UserError, match=rf"lacks 1 of the 20 images that the rows of train-rle.csv .*{siim_name(2)}\.dcm"
    ):
        prepare_siim(siim, tmp_path / "out")
    write(next(folder.rglob(f"{siim_name(1)}.dcm")), radiograph(1))
    with pytest.raises(UserError, match="the image is not of its mask's size: 7 x 5, expected 1024 x 1024"):
        prepare_siim(siim, tmp_path / "out", allow_missing=True)
    report = prepare_siim(siim, tmp_path / "out", allow_missing=True, on_bad_image="drop")
    assert left_out(report) == {
        "image that train-rle.csv does not name": 1,
        "the image file is missing": 1,
        "the image is not of its mask's size": 1,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("EncodedPixels", "Pixels"),
            r"train-rle\.csv has no column 'EncodedPixels'; its columns are ImageId,  Pixels",
        ),
        (("3 2 1022 3", "3 2 1022"), r"line 23: EncodedPixels must be -1 or pairs of whole numbers, got 3: '3 2 1022'"),
        (("3 2 1022 3", "3 2 1022 -3"), r"line 23: EncodedPixels must be -1 or pairs of whole numbers, got 4"),
        (("3 2 1022 3", ""), r"line 23: EncodedPixels must be -1 or pairs of whole numbers, got 0: ''"),
        (("3 2 1022 3", "3 0 1022 3"), r"line 23: EncodedPixels have a run of no pixel"),
        (("1048575 1", "1048575 2"), r"line 22: EncodedPixels end at pixel 1048577 of 1024 x 1024"),
        ((siim_name(0), "a/b"), r"line 23: ImageId must be digits and dots, got 'a/b'"),
        ((siim_name(0), siim_name(3)), rf"line 23: {siim_name(3)} is there twice, not each time with an outline"),
        ((siim_name(7), siim_name(8)), rf"line 15: {siim_name(8)} is there twice, not each time with an outline"),
    ],
)
def test_damaged_table_of_siim(siim, tmp_path, change, message):
    table = siim / "train-rle.csv"
    write(table, table.read_text().replace(*change, 1))
    with pytest.raises(UserError, match=message):
        prepare_siim(siim, tmp_path / "out")


def test_missing_files_of_siim_are_all_named(tmp_path):
    (tmp_path / "siim").mkdir()
    message = (
        r"lacks \S*train-rle\.csv, the folder \S*dicom-images-train; expected SIIM-ACR's challenge of 2019: train-rle"
    )
    with pytest.raises(UserError, match=message):
        prepare_siim(tmp_path / "siim", tmp_path / "out")
