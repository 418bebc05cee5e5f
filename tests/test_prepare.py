"""Preparation: the original's rows from the releases' layouts, everything left out is reported, mistakes are named."""

import gzip
import json
import os
import random
from pathlib import Path

import pytest
from prepared import REFERENCES, SPLITS, ids, image_bytes, left_out, rows, write

from fastm3ae.data.arrow import CAPTION_COLUMNS, ArrowTable
from fastm3ae.data.prepare import (
    SOURCES,
    OwnDataOptions,
    common,
    prepare_irtr_roco,
    prepare_jsonl,
    prepare_medicat,
    prepare_roco,
    workers,
)
from fastm3ae.data.prepare.common import PrepareReport, Sample, write_splits
from fastm3ae.errors import UserError


@pytest.fixture
def roco(tmp_path):
    return write_roco(tmp_path / "pretrain_data")


def write_roco(root):
    """A small pretrain_data folder with the releases' quirks."""
    captions = {
        "train": "ROCO_1\t A first   caption here.\nROCO_2\t Two words\n\nROCO_3\t  three\u00a0nice words \nROCO_4\n"
        "ROCO_5\ta\tb c d\n"
        "ROCO_6\t An image that is missing\nROCO_1\t A second caption of ROCO_1\n",
        "val": "ROCO_7\t A caption for validation\n",
        "test": "ROCO_8\t A caption for testing\r\nROCO_9\t Another caption for testing",
    }
    for split, text in captions.items():
        write(root / f"roco/{split}/radiology/captions.txt", text)
    numbers = {"train": (1, 2, 3, 4, 5), "val": (7,), "test": (8, 9)}
    for split, roco_ids in numbers.items():
        for n in roco_ids:
            write(root / f"roco/{split}/radiology/images/ROCO_{n}.jpg", image_bytes(n, "JPEG"))
        links = "".join(
            f"ROCO_{n}\twget -r ftp://ftp.example/oa/0{n}/PMC{n}00.tar.gz -P /path/to/Dir\tfig-{n}.jpg\n"
            for n in roco_ids
        )
        write(root / f"roco/{split}/radiology/dlinks.txt", links)
    references = {
        "train": [
            {
                "roco_image_id": "PMC300_fig-3.jpg",
                "gorc_references": ["  See the\tfigure for   more ", "Too short", "Again see figure three"],
            },
            {"roco_image_id": "PMC200_fig-2.jpg", "gorc_references": ["The second figure shows it"]},
            {"roco_image_id": "PMC100_fig-1.jpg", "gorc_references": None},
            {"roco_image_id": "PMC999_fig-9.jpg", "gorc_references": ["A figure that nobody knows"]},
        ],
        "val": [{"roco_image_id": "PMC700_fig-7.jpg", "gorc_references": []}],
        "test": [{"roco_image_id": "PMC900_fig-9.jpg", "gorc_references": ["Nine is referred to first"]}],
    }
    for split, records in references.items():
        write(root / REFERENCES / f"roco_{split}_references.jsonl", "\n".join(map(json.dumps, records)) + "\n")
    return root


def test_roco_is_the_originals(roco, tmp_path):
    """References come before captions, in the order of the references, then of captions.txt; image ids are relative."""
    report = prepare_roco(roco, tmp_path / "out")
    images = "train/radiology/images"
    assert list(rows(tmp_path / "out", "roco", "train").items()) == [
        (f"{images}/ROCO_3.jpg", ["See the figure for more", "Again see figure three", "three nice words"]),
        (f"{images}/ROCO_2.jpg", ["The second figure shows it"]),
        (f"{images}/ROCO_1.jpg", ["A first caption here.", "A second caption of ROCO_1"]),
    ]
    assert ids(tmp_path / "out", "roco", "test") == [f"test/radiology/images/ROCO_{n}.jpg" for n in (9, 8)]
    assert rows(tmp_path / "out", "roco", "test")["test/radiology/images/ROCO_9.jpg"] == [
        "Nine is referred to first",
        "Another caption for testing",
    ]
    assert left_out(report) == {
        "text of fewer than 3 words": 2,
        "references to a figure that no dlinks.txt names": 1,
        "line without an id and one caption, separated by one tab": 2,
        "the image file is missing": 1,
    }
    assert report.splits["train"].num_images == 3 and report.splits["train"].num_texts == 6
    text = report.render()
    assert "ROCO_6.jpg" in text and "train captions.txt line 5" in text and "'Too short'" in text


def test_image_bytes_are_stored_unchanged(roco, tmp_path):
    prepare_roco(roco, tmp_path / "out")
    table = ArrowTable([tmp_path / "out" / "roco_train.arrow"])
    for row in range(len(table)):
        assert table.image_bytes(row) == (roco / "roco" / table.row(row, "image_id")).read_bytes()
        assert table.row(row, "split") == "train"


def test_roco_folder_itself_gives_the_same_files(roco, tmp_path, monkeypatch):
    prepare_roco(roco, tmp_path / "a")
    prepare_roco(roco / "roco", tmp_path / "b")
    monkeypatch.chdir(roco / "roco")
    prepare_roco(Path("."), tmp_path / "c")
    for split in SPLITS:
        a, b, c = ((tmp_path / folder / f"roco_{split}.arrow").read_bytes() for folder in "abc")
        assert a == b == c


def test_release_that_says_validation(roco, tmp_path):
    (roco / "roco/val").rename(roco / "roco/validation")
    prepare_roco(roco, tmp_path / "out")
    assert ids(tmp_path / "out", "roco", "val") == ["validation/radiology/images/ROCO_7.jpg"]


def test_roco_without_references(roco, tmp_path):
    (roco / REFERENCES).rename(tmp_path / "elsewhere")
    report = prepare_roco(roco, tmp_path / "out")
    assert "Captions are the only texts" in report.render()
    images = "train/radiology/images"
    assert ids(tmp_path / "out", "roco", "train") == [f"{images}/ROCO_1.jpg", f"{images}/ROCO_3.jpg"]
    report = prepare_roco(roco, tmp_path / "out", references=tmp_path / "elsewhere")
    assert report.splits["train"].num_texts == 6 and not report.notes


@pytest.mark.parametrize("min_words, num_texts", [(1, 8), (4, 5), (5, 3)])
def test_min_words(roco, tmp_path, min_words, num_texts):
    assert prepare_roco(roco, tmp_path / "out", min_words=min_words).splits["train"].num_texts == num_texts


def test_missing_files_are_all_named(roco, tmp_path):
    (roco / "roco/train/radiology/captions.txt").unlink()
    (roco / "roco/test/radiology/captions.txt").unlink()
    with pytest.raises(
        UserError, match=r"train/radiology/captions\.txt, .*test/radiology/captions\.txt; expected a ROCO"
    ):
        prepare_roco(roco, tmp_path / "out")
    with pytest.raises(UserError, match="nowhere does not exist"):
        prepare_roco(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_references_and_links_are_named(roco, tmp_path):
    (roco / "roco/val/radiology/dlinks.txt").unlink()
    with pytest.raises(UserError, match=r"val/radiology/dlinks\.txt; expected .* joins MediCaT's references"):
        prepare_roco(roco, tmp_path / "out")
    (roco / REFERENCES / "roco_test_references.jsonl").unlink()
    with pytest.raises(UserError, match=r"roco_test_references\.jsonl; expected MediCaT's"):
        prepare_roco(roco, tmp_path / "out")


def test_bad_json_is_located(roco, tmp_path):
    file = roco / REFERENCES / "roco_val_references.jsonl"
    write(file, '{"roco_image_id": "x", "gorc_references": []}\n{"roco_image_id": \n')
    with pytest.raises(UserError, match=r"roco_val_references\.jsonl, line 2 is not valid JSON"):
        prepare_roco(roco, tmp_path / "out")
    write(file, "[1, 2]\n")
    with pytest.raises(UserError, match=r"line 1 must be a JSON object, got '\[1, 2\]'"):
        prepare_roco(roco, tmp_path / "out")


def test_file_that_is_not_text_is_named(roco, tmp_path):
    write(roco / "roco/val/radiology/captions.txt", b"ROCO_7\t caf\xe9 au lait\n")
    with pytest.raises(UserError, match=r"val/radiology/captions\.txt cannot be read as UTF-8 text"):
        prepare_roco(roco, tmp_path / "out")


def test_irtr_roco_is_the_originals(roco, tmp_path):
    """The lines of train, val and test are shuffled by one stream; captions keep the space before them."""
    rng = random.Random(42)
    expected = {}
    for split in SPLITS:
        text = (roco / f"roco/{split}/radiology/captions.txt").read_text()
        lines = text.replace("\r\n", "\n").strip().split("\n")
        rng.shuffle(lines)
        expected[split] = [line.strip().split("\t")[0] for line in lines]
    report = prepare_irtr_roco(roco, tmp_path / "out", num_test=1)
    usable = {"train": ("ROCO_1", "ROCO_3"), "val": ("ROCO_7",), "test": ("ROCO_8", "ROCO_9")}
    for split in SPLITS:
        kept = dict.fromkeys(line for line in expected[split] if line in usable[split])
        kept = list(kept)[:1] if split == "test" else list(kept)
        assert [Path(i).stem for i in ids(tmp_path / "out", "irtr_roco", split)] == kept
    train = rows(tmp_path / "out", "irtr_roco", "train")
    assert sorted(train["train/radiology/images/ROCO_1.jpg"]) == [
        " A first caption here.",
        " A second caption of ROCO_1",
    ]
    assert train["train/radiology/images/ROCO_3.jpg"] == [" three nice words"]
    assert left_out(report)["the image file is missing"] == 1


# MediCaT


def write_medicat(root, count, **changes):
    records = []
    for i in range(count):
        record = {
            "pdf_hash": f"h{i}",
            "fig_uri": "1-Figure1-1.png",
            "radiology": True,
            "s2_caption": f"Caption of figure {i}",
        }
        record["s2orc_references"] = [f"A text  about figure {i}", "short"] if i % 3 == 0 else None
        records.append(record | changes.get(f"figure{i}", {}))
        write(root / f"release/figures/h{i}_1-Figure1-1.png", image_bytes(i))
    name = "s2_full_figures_oa_nonroco_combined_medical_top4_public.jsonl"
    write(root / "release" / name, "\n".join(map(json.dumps, records)))
    return root


def test_medicat_is_the_originals(tmp_path):
    changes = {"figure4": {"radiology": False}, "figure6": {"s2_caption": None}, "figure7": {"s2_caption": "Two words"}}
    root = write_medicat(tmp_path / "medicat", 20, **changes)
    report = prepare_medicat(root, tmp_path / "out", num_val=3, num_test=5)
    figures = [i for i in range(20) if i != 4]
    random.Random(42).shuffle(figures)
    order = {"train": figures[:-8], "val": figures[-8:-5], "test": figures[-5:]}
    for split in SPLITS:
        names = [f"release/figures/h{i}_1-Figure1-1.png" for i in order[split] if i != 7]
        assert ids(tmp_path / "out", "medicat", split) == names
    texts = {}
    for split in SPLITS:
        texts |= rows(tmp_path / "out", "medicat", split)
    assert texts["release/figures/h3_1-Figure1-1.png"] == ["Caption of figure 3", "A text about figure 3"]
    assert texts["release/figures/h6_1-Figure1-1.png"] == ["A text about figure 6"]
    assert texts["release/figures/h5_1-Figure1-1.png"] == ["Caption of figure 5"]
    assert left_out(report) == {"text of fewer than 3 words": 8}


def test_sample_of_medicat_says_why_train_is_empty(tmp_path):
    root = write_medicat(tmp_path / "medicat", 6)
    report = prepare_medicat(tmp_path, tmp_path / "out")
    assert [part.num_images for part in report.splits.values()] == [0, 0, 6]
    assert "6 radiology figures are no more than num_val + num_test = 1000 + 1000" in report.render()
    assert "The split train is empty." in report.render()
    assert len(ArrowTable.open([tmp_path / "out/medicat_train.arrow"], CAPTION_COLUMNS)) == 0
    report = prepare_medicat(root, tmp_path / "out", num_val=2, num_test=3)
    assert [part.num_images for part in report.splits.values()] == [1, 2, 3] and not report.notes
    report = prepare_medicat(root, tmp_path / "out", num_val=0, num_test=0)
    assert [part.num_images for part in report.splits.values()] == [6, 0, 0]
    with pytest.raises(UserError, match="must not be negative"):
        prepare_medicat(root, tmp_path / "out", num_val=-1)


def test_figure_in_two_splits_goes_to_the_last(tmp_path):
    """One figure, listed twice, must not be trained and tested on."""
    root = write_medicat(tmp_path / "medicat", 12, **{f"figure{i}": {"pdf_hash": "h0"} for i in range(12)})
    report = prepare_medicat(root, tmp_path / "out", num_val=4, num_test=4)
    assert [part.num_images for part in report.splits.values()] == [0, 0, 1]
    assert report.splits["test"].num_texts == 16
    assert "Named in several splits and put into the last: 2 (release/figures/h0_1-Figure1-1.png" in report.render()


def test_medicat_that_is_incomplete_is_named(tmp_path):
    (tmp_path / "release").mkdir()
    with pytest.raises(UserError, match=r"lacks .*top4_public\.jsonl; expected a MediCaT release"):
        prepare_medicat(tmp_path, tmp_path / "out")
    write_medicat(tmp_path, 2)
    file = next((tmp_path / "release").glob("*.jsonl"))
    write(file, '{"pdf_hash": "a", "radiology": true, "uri": "b"}')
    with pytest.raises(UserError, match=r"line 1 lacks fig_uri; its keys are pdf_hash, radiology, uri"):
        prepare_medicat(tmp_path, tmp_path / "out")


# Images that cannot be used, and what a failure leaves behind


def test_bad_images_are_counted_or_stop(roco, tmp_path):
    images = roco / "roco/train/radiology/images"
    whole = (images / "ROCO_3.jpg").read_bytes()
    write(images / "ROCO_3.jpg", whole[:-20])
    write(images / "ROCO_2.jpg", "<html>404</html>")
    report = prepare_roco(roco, tmp_path / "out")
    assert ids(tmp_path / "out", "roco", "train") == ["train/radiology/images/ROCO_1.jpg"]
    assert left_out(report)["the image cannot be decoded"] == 2
    text = report.render()
    assert "ROCO_3.jpg (image file is truncated" in text and "ROCO_2.jpg" in text
    with pytest.raises(UserError, match=r"ROCO_3\.jpg: the image cannot be decoded: image file is truncated"):
        prepare_roco(roco, tmp_path / "out", on_bad_image="stop")


def test_failure_leaves_the_old_files_alone(roco, tmp_path):
    out = tmp_path / "out"
    prepare_roco(roco, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    write(roco / "roco/train/radiology/captions.txt", "ROCO_1\t Something else than before\n")
    write(roco / "roco/test/radiology/images/ROCO_8.jpg", "no image")
    with pytest.raises(UserError, match="ROCO_8"):
        prepare_roco(roco, out, on_bad_image="stop")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_release_without_any_image_writes_nothing(roco, tmp_path):
    for image in roco.rglob("*.jpg"):
        image.unlink()
    with pytest.raises(
        UserError, match=r"Not one image .* nothing was written: .*7 x the image file is missing \(train/"
    ):
        prepare_roco(roco, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []
    for name in ("train", "val", "test"):
        write(roco / f"roco/{name}/radiology/captions.txt", "")
    (roco / REFERENCES).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="nothing was written: no text at all"):
        prepare_roco(roco, tmp_path / "out")


def test_progress_and_order_with_many_images(tmp_path, monkeypatch):
    """Images are read ahead in threads, yet stay in order; progress counts each once."""
    monkeypatch.setattr(workers, "READ_AHEAD", 3)
    lines = [{"image": f"{i}.png", "caption": f"number {i}"} for i in range(40)]
    for i in range(40):
        write(tmp_path / f"{i}.png", image_bytes(i) if i != 11 else b"broken")
    write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, lines)))
    calls = []
    options = OwnDataOptions(val_frac=0, test_frac=0)
    prepare_jsonl(tmp_path / "t.jsonl", tmp_path / "out", further=options, progress=lambda *call: calls.append(call))
    assert calls == [(i, 40) for i in range(1, 41)]
    table = ArrowTable([tmp_path / "out/t_train.arrow"])
    assert [table.row(i, "image_id") for i in range(39)] == [f"{i}.png" for i in range(40) if i != 11]
    assert all(table.image_bytes(i) == (tmp_path / table.row(i, "image_id")).read_bytes() for i in range(39))


# Tables


@pytest.fixture
def shared():
    if "FASTM3AE_SHARED" not in os.environ:
        pytest.skip("FASTM3AE_SHARED names no folder")
    return Path(os.environ["FASTM3AE_SHARED"])


def test_real_layouts(shared, tmp_path):
    roco = prepare_roco(shared / "data/roco_layout_from_medpix/pretrain_data", tmp_path)
    assert [part.num_images for part in roco.splits.values()] == [120, 30, 30] and not roco.dropped
    medicat = prepare_medicat(shared / "data/medicat", tmp_path, num_val=1, num_test=1)
    assert [part.num_images for part in medicat.splits.values()] == [4, 1, 1] and not medicat.dropped
    with pytest.raises(UserError, match=r"lacks \S*data/train/radiology/captions\.txt; expected a ROCO release"):
        prepare_irtr_roco(shared / "data/roco_text", tmp_path)


def test_sources_name_every_function():
    pretraining = {"roco", "medicat", "irtr-roco", "mimic-cxr", "openi"}
    downstream = {"vqa-rad", "slake", "slack", "medvqa-2019", "melinda"}
    uni_modal = {"chexpert", "nih", "rsna", "siim"}
    assert set(SOURCES) == pretraining | downstream | uni_modal | {"csv", "jsonl", "folder"}
    assert SOURCES["slack"] is SOURCES["slake"] and len(set(SOURCES.values())) == len(SOURCES) - 1
    assert all(source.__doc__ for source in SOURCES.values())


@pytest.mark.parametrize("image", ["../b.png", "x/../../b.png", "/etc/b.png", "../train_2/b.png"])
def test_images_outside_of_the_folder_are_not_read(tmp_path, image):
    """A release's table comes from others: it must not take a private image into a file that is passed on."""
    root = tmp_path / "train"
    root.mkdir()
    with pytest.raises(UserError, match="lies outside of .*train, from where nothing is read"):
        write_splits([Sample("train", image, ["a text"])], root, tmp_path / "out", PrepareReport("made"))
    assert not (tmp_path / "out").exists()


def test_packed_tables_and_lines_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "LONGEST_LINE", 100)
    monkeypatch.setattr(common, "LONGEST_UNPACKED", 1000)
    (tmp_path / "a.csv").write_text("x" * 100)
    assert [len(line) for _, line in common.read_lines(tmp_path / "a.csv")] == [100]
    (tmp_path / "a.csv").write_text("a\n" + "x" * 101)
    with pytest.raises(UserError, match=r"a\.csv, line 2 is longer than 100 characters"):
        list(common.read_lines(tmp_path / "a.csv"))
    with gzip.open(tmp_path / "a.csv.gz", "wt") as packed:
        packed.write(("x" * 49 + "\n") * 10**5)
    with pytest.raises(UserError, match=r"a\.csv\.gz unpacks to more than 1000 characters"):
        list(common.read_lines(tmp_path / "a.csv.gz"))


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_json_that_python_has_no_room_for(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(UserError, match=r"a\.jsonl, line 1 is not valid JSON: "):
        list(common.read_json_lines(tmp_path / "a.jsonl"))
