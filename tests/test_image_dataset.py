"""Images with labels and masks as a data set: what comes out, and which files and rows are refused."""

import pickle

import numpy as np
import pytest
from image_models import png

from fastm3ae.data.arrow import IMAGE_LABEL_COLUMNS, SEGMENTATION_COLUMNS, write_pairs
from fastm3ae.data.datasets import ImageDataset
from fastm3ae.data.describe import describe_arrow
from fastm3ae.errors import BadSample, UserError

CLASSES = ["edema", "mass"]


def row(number, labels=(0, 1), **changes):
    image = {"image": png([[number, 2, 3], [4, 5, 6]]), "labels": list(labels), "image_id": f"{number}.png"}
    return image | {"split": "train"} | changes


def write_file(path, rows, classes=CLASSES):
    columns = SEGMENTATION_COLUMNS if rows and "mask" in rows[0] else IMAGE_LABEL_COLUMNS
    write_pairs(path, rows, columns, {"classes": {"labels": classes}} if classes else None)
    return path


def test_images_with_labels(tmp_path):
    files = [
        write_file(tmp_path / "a.arrow", [row(7, (1, 0)), row(8, (1, 1))]),
        write_file(tmp_path / "empty.arrow", []),
        write_file(tmp_path / "b.arrow", [row(9, (0, 0))]),
    ]
    data = ImageDataset(files)
    assert len(data) == 3 and data.class_names == CLASSES and not data.has_masks
    assert data.labels.tolist() == [[1, 0], [1, 1], [0, 0]]
    assert [data.image_id(i) for i in range(3)] == ["7.png", "8.png", "9.png"]
    assert [data.image(i).getpixel((0, 0)) for i in range(3)] == [7, 8, 9]
    assert data.notes == [f"{tmp_path / 'empty.arrow'} holds no image."]
    copy = pickle.loads(pickle.dumps(data))
    assert copy.image_id(2) == "9.png" and len(pickle.dumps(data)) < 3000


def test_masks(tmp_path):
    masks = [[[0, 255, 0], [0, 0, 255]], [[0, 0, 0], [0, 0, 0]], [[255] * 3] * 2]
    file = write_file(tmp_path / "a.arrow", [row(i, mask=png(mask)) for i, mask in enumerate(masks)])
    data = ImageDataset([file])
    assert data.has_masks and [np.asarray(data.mask(i)).tolist() for i in range(3)] == masks
    assert all(data.mask(i).mode == "L" and data.mask(i).size == data.image(i).size for i in range(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": None}, "the mask cannot be used: the row has no mask (null)"),
        ({"mask": b"?"}, "the mask cannot be used: the image cannot be decoded: its 1 bytes are of no known format"),
        ({"mask": png([[0, 255, 1], [0, 0, 0]])}, "the mask has other levels than 0 and 255, or colours (mode L)"),
        ({"mask": png([[1, 1, 1], [1, 1, 1]])}, "the mask has other levels than 0 and 255, or colours (mode L)"),
        ({"mask": png([[[255, 0, 0]] * 3] * 2)}, "the mask has other levels than 0 and 255, or colours (mode RGB)"),
        ({"mask": png([[0, 255]])}, "the mask is not of the image's size: 2 x 1, not 3 x 2"),
        ({"image": b"?"}, "the image cannot be used: cannot identify image file"),
    ],
)
def test_bad_mask_is_a_bad_sample(tmp_path, changes, message):
    good = {"mask": png([[0, 255, 0]] * 2)}
    write_file(tmp_path / "a.arrow", [row(1, **good)])
    file = write_file(tmp_path / "b.arrow", [row(2, **good), row(3, **good | changes)])
    data = ImageDataset([tmp_path / "a.arrow", file])
    assert data.mask(0).size == data.mask(1).size == (3, 2)
    with pytest.raises(BadSample) as caught:
        data.mask(2)
    assert (caught.value.file, caught.value.row, caught.value.image_id) == (str(file), 1, "3.png")
    assert caught.value.reason.startswith(message)


def test_bad_image_is_a_bad_sample(tmp_path):
    data = ImageDataset([write_file(tmp_path / "a.arrow", [row(1, image=b""), row(2, image=b"?")])])
    for i in range(2):
        with pytest.raises(
            BadSample, match=rf"a\.arrow, row {i} \(image_id '{i + 1}\.png'\): the image cannot be used"
        ):
            data.image(i)


@pytest.mark.parametrize("labels", [(0,), (0, 1, 0), (), (0, 2), (-1, 0)])
def test_labels_that_do_not_fit_the_classes(tmp_path, labels):
    files = [write_file(tmp_path / "a.arrow", [row(1)]), write_file(tmp_path / "b.arrow", [row(2), row(3, labels)])]
    with pytest.raises(UserError) as caught:
        ImageDataset(files)
    expected = f"the labels are {list(labels)}, expected a 0 or 1 for each of the 2 classes (edema, mass)."
    assert str(caught.value) == f"{files[1]}, row 1: {expected}"


def test_files_that_do_not_fit(tmp_path):
    a = write_file(tmp_path / "a.arrow", [row(1)])
    other = write_file(tmp_path / "b.arrow", [row(1)], ["mass", "edema"])
    with pytest.raises(UserError, match=r"b\.arrow has the classes mass, edema, but a\.arrow has edema, mass\."):
        ImageDataset([a, other])
    unnamed = write_file(tmp_path / "c.arrow", [row(1)], None)
    with pytest.raises(UserError, match=r"c\.arrow does not name the classes of its labels"):
        ImageDataset([a, unnamed])
    masked = write_file(tmp_path / "d.arrow", [row(1, mask=png([[0]]))])
    with pytest.raises(UserError, match=r"a\.arrow has no column 'mask'"):
        ImageDataset([masked, a])
    empty = write_file(tmp_path / "e.arrow", [])
    with pytest.raises(UserError, match=r"There is no image in \S*e\.arrow; expected at least one\."):
        ImageDataset([empty])


def test_fingerprint_is_of_ids_labels_and_sizes(tmp_path):
    mask, other_mask = png([[0, 255, 0], [0, 0, 0]]), png([[0, 255, 0], [0, 0, 0]]) + b"?"
    base = row(1, mask=mask)
    changes = {
        "same": {},
        "labels": {"labels": [1, 1]},
        "id": {"image_id": "2.png"},
        "image": {"image": base["image"] + b"?"},
        "mask": {"mask": other_mask},
    }
    prints = {}
    for name, change in changes.items():
        file = write_file(tmp_path / f"{name}.arrow", [base | change, row(5, mask=None)])
        prints[name] = describe_arrow(file).fingerprint
        assert ImageDataset([file]).fingerprints() == {f"{name}.arrow": prints[name]}
    assert len(set(prints.values())) == 5


def test_description(tmp_path):
    rows = [row(1, (1, 0), mask=png([[0]])), row(2, (1, 1), mask=None), row(3, (1, 0), mask=b"?")]
    described = describe_arrow(write_file(tmp_path / "a.arrow", rows))
    assert described.num_with_label == {"edema": 3, "mass": 1} and not described.texts_per_image
    assert described.mask_formats == {"PNG, mode L": 1, "unreadable": 2}
    text = described.render()
    assert "labels: 2 classes ('edema', 'mass')\nimages with each label:\n  3 x edema\n  1 x mass\n" in text
    assert "texts;" not in text and "  2 x mask: unreadable\n" in text
    plain = describe_arrow(write_file(tmp_path / "b.arrow", [row(1)]))
    assert not plain.mask_formats and "mask:" not in plain.render()
    foreign = describe_arrow(write_file(tmp_path / "c.arrow", [row(1)], None))  # whose labels may mean anything
    assert not foreign.num_with_label and "each label" not in foreign.render()
