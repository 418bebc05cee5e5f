"""Preparation of a user's own tables and folders: what is read, what is left out, and how mistakes are named."""

import json

import pytest
from prepared import SPLITS, ids, image_bytes, left_out, rows, write

from fastm3ae.data.prepare import (
    Columns,
    OwnDataOptions,
    prepare_csv,
    prepare_folder,
    prepare_jsonl,
)
from fastm3ae.errors import UserError


@pytest.fixture
def table(tmp_path):
    for name in "abcd":
        write(tmp_path / f"images/{name}.png", image_bytes(ord(name)))
    text = (
        "path,findings,impression,fold\n"
        'images/a.png,"Large effusion, left.\nNo pneumothorax.",Effusion,train\n'
        "images/b.png,,Normal chest,Validation\n"
        "./images/a.png,Again a,,train\n"
        "images/c.png,,  ,test\n"
        ",Text alone,,test\n"
        "\n"
        "images/d.png,d,D again,testing\n"
    )
    return write(tmp_path / "My reports.csv", text)


def test_csv(table, tmp_path):
    out = tmp_path / "out"
    columns = Columns(image_column="path", text_columns=["impression", "findings"], split_column="fold")
    report = prepare_csv(table, out, name="mine", columns=columns)
    assert rows(out, "mine", "train") == {
        "images/a.png": ["Effusion", "Large effusion, left. No pneumothorax.", "Again a"]
    }
    assert rows(out, "mine", "val") == {"images/b.png": ["Normal chest"]}
    assert rows(out, "mine", "test") == {"images/d.png": ["D again", "d"]}
    assert left_out(report) == {"row without a text": 1, "row without an image": 1}
    assert "line 6" in report.render() and "line 7" in report.render()
    prepare_csv(table, out, columns=columns, further=OwnDataOptions(min_words=2))
    assert rows(out, "My reports", "train") == {"images/a.png": ["Large effusion, left. No pneumothorax.", "Again a"]}


def test_csv_without_the_column_names_the_nearest(table, tmp_path):
    with pytest.raises(UserError, match=r"has no column 'finding'; its columns are path, .*Did you mean 'findings'\?"):
        prepare_csv(table, tmp_path / "out", columns=Columns(image_column="path", text_columns=["finding"]))
    with pytest.raises(UserError, match="has no column 'image'"):
        prepare_csv(table, tmp_path / "out")
    with pytest.raises(UserError, match="'fold' must be one of train, .* got 'xtrain'"):
        write(table, table.read_text().replace(",train", ",xtrain"))
        columns = Columns(image_column="path", text_columns=["findings"], split_column="fold")
        prepare_csv(table, tmp_path / "out", columns=columns)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", r"no column 'image'; its columns are none: the table is empty"),
        ("image,caption\na.png,one, two\n", r"line 2: the row has 3 cells, expected .* 2 columns; .* double quotes"),
        ("image,caption\na.png,ok\nb.png\n", r"line 3: the row has 1 cells"),
        ('image,caption\na.png,"open\n', r"line 2 is not valid CSV"),
        ("image,image,caption\na,b,c\n", r"has 2 columns 'image'"),
        (b"image,caption\na.png,caf\xe9\n", r"cannot be read as UTF-8"),
    ],
)
def test_malformed_csv_is_located(tmp_path, content, message):
    file = write(tmp_path / "t.csv", content)
    with pytest.raises(UserError, match=message):
        prepare_csv(file, tmp_path / "out")


def test_missing_table_is_named(tmp_path):
    for prepare in (prepare_csv, prepare_jsonl):
        with pytest.raises(UserError, match=r"none\.csv cannot be read"):
            prepare(tmp_path / "none.csv", tmp_path / "out")


def test_tabs_semicolons_and_byte_order_marks(tmp_path):
    write(tmp_path / "a.png", image_bytes())
    write(tmp_path / "t.tsv", "\ufeffimage\tcaption\na.png\tone, two; three\n")
    write(tmp_path / "s.csv", "image;caption\r\na.png;one, two\r\n")
    train_alone = OwnDataOptions(val_frac=0, test_frac=0)
    prepare_csv(tmp_path / "t.tsv", tmp_path / "out", further=train_alone)
    prepare_csv(tmp_path / "s.csv", tmp_path / "out", further=train_alone, delimiter=";")
    assert rows(tmp_path / "out", "t", "train") == {"a.png": ["one, two; three"]}
    assert rows(tmp_path / "out", "s", "train") == {"a.png": ["one, two"]}


def test_random_splits_keep_groups_together_and_follow_the_seed(tmp_path):
    lines = [{"image": f"{i}.png", "caption": f"image {i}", "patient": i % 20} for i in range(60)]
    for i in range(60):
        write(tmp_path / f"{i}.png", image_bytes(i))
    file = write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, lines)))

    def split_of_patients(seed):
        options = OwnDataOptions(val_frac=0.2, test_frac=0.1, seed=seed)
        prepare_jsonl(file, tmp_path / "out", columns=Columns(group_column="patient"), further=options)
        found = {}
        for split in SPLITS:
            for image in ids(tmp_path / "out", "t", split):
                found.setdefault(int(image[:-4]) % 20, set()).add(split)
        assert all(len(splits) == 1 for splits in found.values())
        return {patient: splits.pop() for patient, splits in sorted(found.items())}

    first = split_of_patients(1)
    assert [list(first.values()).count(split) for split in SPLITS] == [14, 4, 2]
    assert first == split_of_patients(1) != split_of_patients(2)


def test_every_wanted_split_of_a_small_set_gets_an_image(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.png", image_bytes(i))
        write(tmp_path / f"{i}.txt", f"text {i}")
    report = prepare_folder(tmp_path, tmp_path / "out", name="few")
    assert [part.num_images for part in report.splits.values()] == [2, 1, 1]
    assert "drawn at random (seed 0)" in report.render()
    with pytest.raises(UserError, match="together less than 1, got 0.5 and 0.5"):
        prepare_folder(tmp_path, tmp_path / "out", name="few", further=OwnDataOptions(val_frac=0.5, test_frac=0.5))


def test_jsonl(tmp_path):
    write(tmp_path / "x/a.png", image_bytes())
    records = [
        {"file": "a.png", "texts": ["First text", " ", "Second  text"], "title": None, "split": "dev"},
        {"file": "a.png", "title": "A title", "split": "dev"},
        {"file": str(tmp_path / "x/a.png"), "title": "By its whole path", "split": "test"},
    ]
    file = write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, records)) + "\n\n")
    columns = Columns(image_column="file", text_columns=("title", "texts"), split_column="split")
    prepare_jsonl(file, tmp_path / "out", image_root=tmp_path / "x", columns=columns)
    assert rows(tmp_path / "out", "t", "val") == {"a.png": ["First text", "Second text", "A title"]}
    assert list(rows(tmp_path / "out", "t", "test").values()) == [["By its whole path"]]


@pytest.mark.parametrize(
    "line, message",
    [
        ({"image": "a.png", "captions": "x"}, r"no column 'caption'; its columns are image, captions\. Did you mean"),
        ({"image": "a.png", "caption": 3}, r"line 1: 'caption' must be a string or a list of strings, got 3"),
        ({"image": "a.png", "caption": ["x", None]}, r"line 1: 'caption' must be a string or a list"),
        ({"image": ["a.png"], "caption": "x"}, r"line 1: 'image' must be a path, got \['a\.png'\]"),
    ],
)
def test_jsonl_of_other_types_is_located(tmp_path, line, message):
    file = write(tmp_path / "t.jsonl", json.dumps(line))
    with pytest.raises(UserError, match=message):
        prepare_jsonl(file, tmp_path / "out")


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "a\\b"])
def test_name_must_be_part_of_a_file_name(table, tmp_path, name):
    with pytest.raises(UserError, match="becomes a part of file names"):
        prepare_csv(table, tmp_path / "out", columns=Columns(image_column="path", text_columns=["findings"]), name=name)


# Folders


def test_folder_with_splits(tmp_path):
    source = tmp_path / "own"
    for path in (
        "train/1/b.jpg",
        "train/a.png",
        "valid/c.PNG",
        "test/d.tiff",
        "loose.png",
        "test/alone.png",
        ".cache/x.png",
    ):
        format = {"jpg": "JPEG", "tiff": "TIFF"}.get(path.rsplit(".")[-1], "PNG")
        write(source / path, image_bytes(len(path), format))
    write(source / "train/1/b.txt", "A report\nof two lines.\n")
    write(source / "train/a.json", '["One text", "Another text"]')
    write(source / "valid/c.json", '{"report": "The report", "caption": ["C one", "C two"], "age": 7}')
    write(source / "test/d.json", '"A lone string"')
    write(source / "test/d.txt", "Plain text first")
    write(source / "test/orphan.txt", "No image")
    report = prepare_folder(source, tmp_path / "out")
    assert list(rows(tmp_path / "out", "own", "train").items()) == [
        ("train/1/b.jpg", ["A report of two lines."]),
        ("train/a.png", ["One text", "Another text"]),
    ]
    assert rows(tmp_path / "out", "own", "val") == {"valid/c.PNG": ["C one", "C two", "The report"]}
    assert rows(tmp_path / "out", "own", "test") == {"test/d.tiff": ["Plain text first", "A lone string"]}
    assert {reason: items for reason, items in report.dropped.items()} == {
        "image outside of the split folders": ["loose.png"],
        "image without a text in a .txt, .json or .xml file beside it": ["test/alone.png"],
        "text file without an image beside it": ["test/orphan.txt"],
    }


def test_folder_follows_links_and_names_what_is_no_file(tmp_path):
    write(tmp_path / "disk/train/a.png", image_bytes())
    write(tmp_path / "disk/train/a.txt", "A text")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/train").symlink_to(tmp_path / "disk/train")
    (tmp_path / "disk/train/b.png").mkdir()
    write(tmp_path / "disk/train/b.txt", "A text")
    report = prepare_folder(tmp_path / "own", tmp_path / "out")
    assert ids(tmp_path / "out", "own", "train") == ["train/a.png"]
    assert left_out(report) == {"the image file cannot be read": 1}


def test_folder_without_images_says_what_there_is(tmp_path):
    for i in range(3):
        write(tmp_path / f"videos/{i}.mp4", b"ftyp")
    with pytest.raises(UserError, match=r"holds no image \(\.bmp, .*\.dcm, .*\.nii\.gz\); it holds 3 x \.mp4"):
        prepare_folder(tmp_path / "videos", tmp_path / "out")
    with pytest.raises(UserError, match="nowhere does not exist"):
        prepare_folder(tmp_path / "nowhere", tmp_path / "out")


def test_folder_with_bad_texts_is_located(tmp_path):
    write(tmp_path / "own/a.png", image_bytes())
    write(tmp_path / "own/a.json", '{"caption": 1}')
    with pytest.raises(UserError, match=r"a\.json: 'caption' must be a string or a list of strings, got 1"):
        prepare_folder(tmp_path / "own", tmp_path / "out")
    write(tmp_path / "own/a.json", "{")
    with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
        prepare_folder(tmp_path / "own", tmp_path / "out")


# Description of an arrow file
