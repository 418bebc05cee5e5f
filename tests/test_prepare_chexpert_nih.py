"""CheXpert and ChestX-ray14, on made-up trees in their layouts: labels, splits, what is left out, what is refused."""

import csv
import io

import pytest
from prepared import SPLITS, image_bytes, left_out, write

from fastm3ae.cli import main
from fastm3ae.data.arrow import IMAGE_LABEL_COLUMNS, ArrowTable
from fastm3ae.data.datasets import ImageDataset
from fastm3ae.data.prepare import prepare_chexpert, prepare_nih
from fastm3ae.errors import UserError

FINDINGS = (  # in the order of the release
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
COMPETITION = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]


def table_of(output, name, split):
    return ArrowTable.open([output / f"{name}_{split}.arrow"], IMAGE_LABEL_COLUMNS)


def labels_of(output, name, split):
    table = table_of(output, name, split)
    return dict(zip(table.column("image_id"), table.column("labels"), strict=True))


def bytes_of(output, name):
    return [(output / f"{name}_{split}.arrow").read_bytes() for split in SPLITS]


def csv_of(lines):
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()


# CheXpert


def write_chexpert(root, num_patients=12, **findings):
    """Each patient has two studies of a frontal radiograph, one also a lateral one; patient 1 has the findings."""
    for folder, patients in (("train", range(1, num_patients + 1)), ("valid", range(64541, 64544))):
        lines = [("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *FINDINGS)]
        for patient in patients:
            for study, view in ((1, "frontal"), (1, "lateral"), (2, "frontal")):
                image = f"{folder}/patient{patient:05}/study{study}/view1_{view}.jpg"
                write(root / image, image_bytes(patient, "JPEG"))
                values = [findings.get(f.replace(" ", "_"), "") if patient == patients[0] else "" for f in FINDINGS]
                side = ("Frontal", "AP") if view == "frontal" else ("Lateral", "")
                lines.append((f"CheXpert-v1.0-small/{image}", "Female", "68", *side, *values))
        write(root / f"{folder}.csv", csv_of(lines))
    return root


@pytest.fixture
def chexpert(tmp_path):
    return write_chexpert(tmp_path / "chexpert")


def test_chexpert(chexpert, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["prepare", "chexpert", str(chexpert), str(out), "--num-val", "5"]) == 0
    said = capsys.readouterr().out
    assert [len(table_of(out, "chexpert", split)) for split in SPLITS] == [19, 5, 6]
    assert "Left out 15: lateral image (train/patient00001/study1/view1_lateral.jpg; " in said
    assert "val was drawn from train.csv by image (seed 0), as in MGCA, so that train and val share patients" in said
    test = labels_of(out, "chexpert", "test")
    assert set(test) == {f"valid/patient{p}/study{s}/view1_frontal.jpg" for p in (64541, 64542, 64543) for s in (1, 2)}
    table = table_of(out, "chexpert", "val")
    name = table.row(0, "image_id")
    assert bytes(table.image_bytes(0)) == (chexpert / name).read_bytes() and table.row(0, "split") == "val"
    assert table.facts()["chexpert_val.arrow"] == {
        "options": {
            "classes": "competition",
            "views": ["Frontal"],
            "num_val": 5,
            "val_by": "image",
            "seed": 0,
            "allow_missing": False,
            "on_bad_image": "stop",
        },
        "classes": {"labels": COMPETITION},
    }
    assert not labels_of(out, "chexpert", "train").keys() & labels_of(out, "chexpert", "val").keys()
    images = ImageDataset([out / "chexpert_test.arrow"])
    assert images.unit == "patient" and images.groups == [images.image_id(i).split("/")[1] for i in range(6)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1.0", [1] * 5), ("0.0", [0] * 5), ("", [0] * 5), ("-1.0", [1, 0, 0, 1, 1]), ("-1", [1, 0, 0, 1, 1])],
)
def test_chexpert_labels(tmp_path, value, expected):
    root = write_chexpert(tmp_path / "c", **{name.replace(" ", "_"): value for name in FINDINGS})
    report = prepare_chexpert(root, tmp_path / "out", num_val=0)
    assert labels_of(tmp_path / "out", "chexpert", "train")["train/patient00001/study2/view1_frontal.jpg"] == expected
    assert [report.splits["train"].kinds[name] for name in COMPETITION] == [2 * label for label in expected]
    assert ("Uncertain findings in train.csv: 2 x Atelectasis as 1, 2 x Cardiomegaly as 0, " in report.render()) == (
        value.startswith("-1")
    )
    assert "The split val is empty." in report.render()


def test_chexpert_all_classes_and_views(tmp_path):
    root = write_chexpert(tmp_path / "c", Fracture="1.0", Pneumonia="-1.0", Edema="-1.0")
    report = prepare_chexpert(root, tmp_path / "out", classes="all", views=["Lateral"], num_val=0)
    names = table_of(tmp_path / "out", "chexpert", "train").facts()["chexpert_train.arrow"]["classes"]["labels"]
    assert names == sorted(FINDINGS)
    train = labels_of(tmp_path / "out", "chexpert", "train")
    assert set(train) == {f"train/patient{patient:05}/study1/view1_lateral.jpg" for patient in range(1, 13)}
    found = dict(zip(names, train["train/patient00001/study1/view1_lateral.jpg"], strict=True))
    assert {name for name, label in found.items() if label} == {"Fracture", "Edema"}
    text = report.render()
    assert "Pneumonia" in text and "1 x Edema as 1" in text and "1 x Pneumonia as 0" in text
    assert left_out(report) == {"frontal image": 2 * 15}
    with pytest.raises(UserError, match="views must name at least one of Frontal, Lateral; got none"):
        prepare_chexpert(root, tmp_path / "out", views=[])


def test_chexpert_draws_by_image_or_by_patient(chexpert, tmp_path):
    def patients(folder, split):
        return {name.split("/")[1] for name in labels_of(tmp_path / folder, "chexpert", split)}

    prepare_chexpert(chexpert, tmp_path / "image", num_val=9)
    assert patients("image", "train") & patients("image", "val")
    report = prepare_chexpert(chexpert, tmp_path / "patient", num_val=9, val_by="patient")
    assert not patients("patient", "train") & patients("patient", "val")
    assert len(labels_of(tmp_path / "patient", "chexpert", "val")) == 10  # 5 patients of 2 images each
    assert "by patient (seed 0); test is valid.csv." in report.render()
    prepare_chexpert(chexpert, tmp_path / "again", num_val=9, val_by="patient")
    prepare_chexpert(chexpert, tmp_path / "other", num_val=9, val_by="patient", seed=1)
    assert bytes_of(tmp_path / "patient", "chexpert") == bytes_of(tmp_path / "again", "chexpert")
    assert patients("patient", "val") != patients("other", "val")
    for num_val in (24, 1000, -1):
        with pytest.raises(UserError, match=rf"leave some to train on; got {num_val} of 24 images \(24 groups"):
            prepare_chexpert(chexpert, tmp_path / "out", num_val=num_val)
    with pytest.raises(UserError, match=r"got 23 of 24 images \(12 groups"):
        prepare_chexpert(chexpert, tmp_path / "out", num_val=23, val_by="patient")


def test_missing_images_of_chexpert_do_not_change_the_draw(chexpert, tmp_path):
    prepare_chexpert(chexpert, tmp_path / "all", num_val=6)
    gone = sorted(labels_of(tmp_path / "all", "chexpert", "val"))[:2]
    for name in gone:
        (chexpert / name).unlink()
    with pytest.raises(UserError, match=f"lacks 2 of the 30 images that the tables name; --allow-.*{', '.join(gone)}"):
        prepare_chexpert(chexpert, tmp_path / "out", num_val=6)
    report = prepare_chexpert(chexpert, tmp_path / "out", num_val=6, allow_missing=True)
    assert left_out(report) == {"lateral image": 15, "the image file is missing": 2}
    for split in SPLITS:
        kept = set(labels_of(tmp_path / "all", "chexpert", split)) - set(gone)
        assert set(labels_of(tmp_path / "out", "chexpert", split)) == kept


def test_corrupt_image_of_chexpert(chexpert, tmp_path):
    bad = write(chexpert / "train/patient00002/study1/view1_frontal.jpg", b"no image")
    with pytest.raises(UserError, match=f"{bad}: the image cannot be decoded"):
        prepare_chexpert(chexpert, tmp_path / "out", num_val=1)
    assert not list((tmp_path / "out").glob("*"))
    report = prepare_chexpert(chexpert, tmp_path / "out", num_val=1, on_bad_image="drop")
    assert left_out(report)["the image cannot be decoded"] == 1
    assert sum(part.num_images for part in report.splits.values()) == 29


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("Frontal/Lateral,", "View,"), r"train\.csv has no column 'Frontal/Lateral'"),
        (("Edema", "Oedema"), r"train\.csv has no column 'Edema'; .*Did you mean 'Oedema'"),
        (("Frontal,AP", "Front,AP"), r"train\.csv, line 2: Frontal/Lateral must be Frontal or Lateral, got 'Front'"),
        (("AP,,,", "AP,,,2.0"), r"train\.csv, line 2: Cardiomegaly must be 1, 0, -1 or empty, got '2\.0'"),
        (("AP,,", "AP,"), r"train\.csv, line 2: the row has 18 cells, expected one for each of the 19 columns"),
        (("small/train/", "small/../train/"), r"train\.csv, line 2: Path must be as CheXpert-v1\.0/train/patient00001"),
        (("small/train/", "small/valid/"), r"train\.csv, line 2: Path must be as CheXpert-v1\.0/train/patient00001"),
        (("study2/view1_frontal", "study1/view1_frontal"), r"train\.csv, line 4: the Path \S+ is in line 2, too"),
    ],
)
def test_damaged_table_of_chexpert(chexpert, tmp_path, change, message):
    write(chexpert / "train.csv", (chexpert / "train.csv").read_text().replace(*change, 1))
    with pytest.raises(UserError, match=message):
        prepare_chexpert(chexpert, tmp_path / "out", num_val=1)


def test_missing_files_of_chexpert_are_all_named(chexpert, tmp_path):
    (chexpert / "valid.csv").unlink()
    (chexpert / "train").rename(chexpert / "trains")
    message = (
        r"lacks \S*valid\.csv, the folder \S*chexpert/train; expected CheXpert-v1\.0 or CheXpert-v1\.0-small: train"
    )
    with pytest.raises(UserError, match=message):
        prepare_chexpert(chexpert, tmp_path / "out")
    with pytest.raises(UserError, match=r"The folder \S*nowhere does not exist; expected CheXpert"):
        prepare_chexpert(tmp_path / "nowhere", tmp_path / "out")


# ChestX-ray14

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)


def write_nih(root, folder="images", table="Data_Entry_2017.csv", findings="Cardiomegaly|Effusion"):
    """Patients 1 to 12 have two radiographs each, patients 9 to 12 are for testing; patient 1 has the findings."""
    lines, lists = [HEADER], {"train_val": [], "test": []}
    for patient in range(1, 13):
        for visit in range(2):
            name = f"{patient:08}_{visit:03}.png"
            write(root / folder.format(1 + visit) / name, image_bytes(patient))
            found = findings if patient == 1 else "No Finding"
            lines.append(f"{name},{found},{visit},{patient},058Y,M,PA,2682,2749,0.143,0.143,")
            lists["train_val" if patient < 9 else "test"].append(name)
    write(root / table, "\n".join(lines) + "\n")
    for name, images in lists.items():
        write(root / f"{name}_list.txt", "\r\n".join(images))  # the release's lists have no line break at their end
    return root


def test_nih(tmp_path, capsys):
    root, out = write_nih(tmp_path / "nih"), tmp_path / "out"
    assert main(["prepare", "nih", str(root), str(out), "--val-frac", "0.25"]) == 0
    said = capsys.readouterr().out
    train, val, test = (labels_of(out, "nih", split) for split in SPLITS)
    assert [len(train), len(val), len(test)] == [12, 4, 8]
    assert {name[7:15] for name in test} == {f"{patient:08}" for patient in range(9, 13)}
    assert not {name[7:15] for name in train} & {name[7:15] for name in val}
    labels = (train | val)["images/00000001_001.png"]
    assert labels == [0, 1, 1] + [0] * 11 and sum(map(sum, (train | val | test).values())) == 4
    assert "val was drawn from train_val_list.txt by patient (seed 0); test is test_list.txt." in said
    assert "Pleural_Thickening" in said and "Nothing was left out." in said
    prepare_nih(root, tmp_path / "none", val_frac=0)
    assert not labels_of(tmp_path / "none", "nih", "val")
    with pytest.raises(UserError, match="val_frac must be at least 0 and less than 1, got 1"):
        prepare_nih(root, tmp_path / "none", val_frac=1)


def test_nih_layouts(tmp_path):
    prepare_nih(write_nih(tmp_path / "a"), tmp_path / "out/a")
    several = write_nih(tmp_path / "b", "images_{:03}/images", "Data_Entry_2017_v2020.csv")
    prepare_nih(several, tmp_path / "out/b")
    a, b = (labels_of(tmp_path / "out" / folder, "nih", "train") for folder in "ab")
    assert {name.split("/")[-1]: labels for name, labels in a.items()} == {
        name.split("/")[-1]: labels for name, labels in b.items()
    }
    assert {name.rpartition("/")[0] for name in b} == {"images_001/images", "images_002/images"}


def test_what_is_left_out_of_nih(tmp_path):
    root = write_nih(tmp_path / "nih")
    write(root / "test_list.txt", (root / "test_list.txt").read_text().replace("00000012_001.png", "\n"))
    write(root / "images/00000099_000.png", image_bytes())
    (root / "images/00000002_000.png").unlink()
    with pytest.raises(
        UserError, match=r"lacks 1 of the 23 images that the lists name; .*: images/00000002_000\.png\."
    ):
        prepare_nih(root, tmp_path / "out")
    report = prepare_nih(root, tmp_path / "out", allow_missing=True)
    assert report.dropped == {
        "image that Data_Entry_2017.csv does not name": ["00000099_000.png"],
        "image that neither train_val_list.txt nor test_list.txt names": ["00000012_001.png"],
        "the image file is missing": ["images/00000002_000.png"],
    }


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("Data_Entry_2017.csv", ("Effusion", "Efusion"), r"line 2: Finding Labels must be No F.* mean 'Effusion'\?"),
        ("Data_Entry_2017.csv", ("|Effusion", "|No Finding"), r"line 2: Finding Labels has No Finding beside findings"),
        ("Data_Entry_2017.csv", ("Cardiomegaly|Effusion", ""), r"line 2: Finding Labels must be .*, got ''"),
        ("Data_Entry_2017.csv", ("00000001_001", "00000001_000"), r"line 3: the Image Index 00000001_000\.png is in"),
        ("Data_Entry_2017.csv", ("00000001_000", "../1"), r"line 2: Image Index must be as 00000001_000\.png"),
        ("Data_Entry_2017.csv", (",0,1,", ",0,,"), r"line 2: Patient ID is empty"),
        ("Data_Entry_2017.csv", ("Patient ID", "Patient"), r"has no column 'Patient ID'"),
        ("test_list.txt", ("00000009_000", "00000077_000"), r"test_list\.txt, line 1: '00000077_000\.png' has no row"),
        ("test_list.txt", ("00000009_001", "00000009_000"), r"test_list\.txt, line 2 names 00000009_000\.png twice"),
        ("test_list.txt", ("00000009_001", "00000001_000"), r"line 2 names 00000001_000\.png, as train_val_list"),
    ],
)  # fmt: skip
def test_damaged_files_of_nih(tmp_path, file, change, message):
    root = write_nih(tmp_path / "nih")
    write(root / file, (root / file).read_text().replace(*change, 1))
    with pytest.raises(UserError, match=message):
        prepare_nih(root, tmp_path / "out")


def test_missing_files_of_nih_are_all_named(tmp_path):
    root = write_nih(tmp_path / "nih", folder="pictures")
    with pytest.raises(UserError, match=r"neither the folder images nor images_001/images; expected ChestX-ray14"):
        prepare_nih(root, tmp_path / "out")
    for path in root.glob("*.*"):
        path.unlink()
    message = (
        r"lacks \S*Data_Entry_2017_v2020\.csv, \S*train_val_list\.txt, \S*test_list\.txt; expected ChestX-ray14: Data"
    )
    with pytest.raises(UserError, match=message):
        prepare_nih(root, tmp_path / "out")
