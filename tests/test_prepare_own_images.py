"""Own DICOM files, volumes and deep PNGs with texts of every kind: through `prepare` to what training sees."""

import io
import json
import re
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from prepared import SPLITS, image_bytes, left_out, rows, write
from radiographs import dicom_bytes
from test_dicom_window import with_fields
from volumes import volume_bytes

from fastm3ae.cli import main
from fastm3ae.data.arrow import ArrowTable
from fastm3ae.data.datasets import PairDataset
from fastm3ae.data.decode import decode_image
from fastm3ae.data.describe import describe_arrow
from fastm3ae.data.dicom import decode_dicom, open_dicom
from fastm3ae.data.prepare import (
    Columns,
    OwnDataOptions,
    prepare_csv,
    prepare_folder,
    prepare_jsonl,
    prepare_rsna,
    workers,
)
from fastm3ae.data.prepare.duplicates import perceptual_hash
from fastm3ae.errors import UserError

ALL = OwnDataOptions(val_frac=0, test_frac=0)
SPLIT = Columns(split_column="split")


def radiograph(seed=0, size=(40, 50)):
    """Blobs of 12 bits, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 4096, (20, 20)).astype(np.float32)
    levels = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.clip(np.asarray(levels), 0, 4095).astype(np.uint16)


def png16(pixels, **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", **options)
    return stream.getvalue()


def seen(output, name, split="train"):
    """What training sees of each image before it makes a square of it."""
    dataset = PairDataset([output / f"{name}_{split}.arrow"])
    return {dataset.image_id(i): np.asarray(dataset.image(i)) for i in range(len(dataset))}


def test_a_16_bit_png_keeps_its_grey_levels(tmp_path):
    """Two structures, of 16 of 40,000 levels: shifted to 8 bits they would be one grey, clipped both would be white."""
    pixels = np.full((16, 16), 40_000, np.uint16)
    pixels[:8] += np.arange(16, dtype=np.uint16)
    pixels[8:] += np.arange(16, dtype=np.uint16)[::-1]
    tiff = io.BytesIO()
    Image.fromarray(pixels).save(tiff, "TIFF")
    write(tmp_path / "own/deep.png", png16(pixels))
    write(tmp_path / "own/deep.tif", tiff.getvalue())
    write(tmp_path / "own/deep.txt", "Sixteen levels")
    prepare_folder(tmp_path / "own", tmp_path / "out", further=replace(ALL, on_duplicates="drop"))
    table = ArrowTable([tmp_path / "out/own_train.arrow"])
    assert (np.asarray(Image.open(io.BytesIO(table.image_bytes(0)))) == pixels).all()
    for image in seen(tmp_path / "out", "own").values():
        assert image[0].tolist() == [17 * i for i in range(16)] == image[8][::-1].tolist()


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA"])
def test_grey_colour_and_alpha(tmp_path, mode):
    levels = np.random.default_rng(0).integers(0, 256, (6, 8, len(mode)), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(levels.squeeze(), mode).save(stream, "PNG")
    write(tmp_path / "own/a.png", stream.getvalue())
    write(tmp_path / "own/a.txt", "A text")
    prepare_folder(tmp_path / "own", tmp_path / "out", further=ALL)
    (found,) = seen(tmp_path / "out", "own").values()
    colours, alpha = (levels[..., :-1], levels[..., -1:]) if mode.endswith("A") else (levels, 255)
    expected = (colours / 255.0 * alpha).squeeze()  # laid over black
    found = found if mode != "LA" or found.ndim == 2 else found[..., 0]
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 1


@pytest.fixture
def studies(tmp_path):
    """DICOM files of any name, volumes, and a PNG, with texts in every kind of file."""
    folder = tmp_path / "own"
    header = {"PatientName": "Doe^Jane", "PatientID": "7", "StudyDescription": "Chest PA", "BodyPartExamined": "CHEST"}
    for seed, name in enumerate(("a.dcm", "b/IM0001", "b/1.2.840.77")):
        data = with_fields(dicom_bytes(radiograph(seed), bits_stored=12), **(header | {"PatientID": str(seed // 2)}))
        write(folder / name, data)
    write(folder / "a.txt", "Text of a")
    write(folder / "b/IM0001.json", json.dumps({"findings": "Findings of b", "impression": "None"}))
    write(
        folder / "b/1.2.840.77.xml",
        '<r xmlns="urn:x"><Findings>One <b>bold</b></Findings><s name="impression">Two</s></r>',
    )
    write(
        folder / "c/v.nii.gz", volume_bytes(radiograph(9).reshape(40, 50, 1).repeat(8, 2).astype(np.int16), packed=True)
    )
    write(folder / "c/v.xml", '<r><AbstractText Label="FINDINGS">Brain</AbstractText></r>')
    write(folder / "d.png", image_bytes(3))
    write(folder / "DICOMDIR", bytes(128) + b"DICM")
    write(folder / "notes.csv", "not, read")
    return folder


KEYS = {"text_keys": ("findings", "impression")}


def test_folder_of_dicom_files_and_volumes(studies, tmp_path):
    report = prepare_folder(studies, tmp_path / "out", further=ALL, **KEYS)
    assert rows(tmp_path / "out", "own", "train") == {
        "a.dcm": ["Text of a"],
        "b/1.2.840.77": ["One bold", "Two"],
        "b/IM0001": ["Findings of b", "None"],
        "c/v.nii.gz": ["Brain"],
    }
    assert left_out(report) == {"image without a text in a .txt, .json or .xml file beside it": 1}
    assert any("3 x PatientName, 3 x PatientID" in warning for warning in report.warnings)
    bytes_ = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"Doe^Jane" not in bytes_ and b"Chest PA" not in bytes_
    images = seen(tmp_path / "out", "own")
    assert (images["a.dcm"].min(), images["a.dcm"].max()) == (0, 255) and images["c/v.nii.gz"].shape == (50, 40)


def test_header_values_become_texts(studies, tmp_path):
    options = replace(ALL, text_tags=["StudyDescription", "BodyPartExamined"], join=True)
    report = prepare_folder(studies, tmp_path / "out", further=options, **KEYS)
    found = rows(tmp_path / "out", "own", "train")
    assert found["a.dcm"] == ["Text of a Chest PA CHEST"] and found["b/IM0001"] == ["Findings of b None Chest PA CHEST"]
    assert found["c/v.nii.gz"] == ["Brain"] and sum(left_out(report).values()) == 1
    facts = describe_arrow(tmp_path / "out/own_train.arrow").options
    assert facts["text_tags"] == ["StudyDescription", "BodyPartExamined"] and facts["window"] == "tag"
    with pytest.raises(UserError, match="PatientName is a person's name that may say who the patient is"):
        prepare_folder(studies, tmp_path / "out", further=OwnDataOptions(text_tags=["PatientName"]))
    write(studies / "broken.dcm", b"no DICOM" * 100)
    options = replace(ALL, text_tags=["StudyDescription"])
    report = prepare_folder(studies, tmp_path / "out", further=options, **KEYS)
    assert [items for reason, items in report.dropped.items() if "DICOM" in reason] == [["broken.dcm"]]
    with pytest.raises(UserError, match=r"broken\.dcm: the DICOM file cannot be decoded"):
        prepare_folder(studies, tmp_path / "out", further=replace(options, on_bad_image="stop"), **KEYS)


def test_a_table_whose_texts_stand_in_headers(studies, tmp_path):
    write(studies / "t.csv", "image\na.dcm\nb/IM0001\nd.png\n")
    options = replace(ALL, text_tags=["StudyDescription"])
    report = prepare_csv(studies / "t.csv", tmp_path / "out", columns=Columns(text_columns=()), further=options)
    assert rows(tmp_path / "out", "t", "train") == {"a.dcm": ["Chest PA"], "b/IM0001": ["Chest PA"]}
    assert left_out(report) == {"row without a text": 1}


def test_texts_in_a_folder_of_their_own(studies, tmp_path):
    write(tmp_path / "reports/b/IM0001.txt", "From the other folder")
    write(tmp_path / "reports/e.txt", "Of no image")
    report = prepare_folder(studies, tmp_path / "out", text_root=tmp_path / "reports", further=ALL)
    assert rows(tmp_path / "out", "own", "train") == {"b/IM0001": ["From the other folder"]}
    assert report.dropped["text file without an image beside it"] == ["e.txt"]
    with pytest.raises(UserError, match="nowhere does not exist"):
        prepare_folder(studies, tmp_path / "out", text_root=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ('<!DOCTYPE r [<!ENTITY f SYSTEM "file:///etc/passwd">]><r><findings>&f;</findings></r>', "undefined entity"),
        ("<r><findings>", "no element found"),
        ('<?xml version="1.0" encoding="x-none"?><r/>', "unknown encoding"),
        ('<?xml version="1.0" encoding="utf-7"?><r/>', "encoding"),
    ],
)
def test_bad_xml_is_located(studies, tmp_path, xml, message):
    write(studies / "a.xml", xml)
    with pytest.raises(UserError, match=rf"a\.xml cannot be read as XML: .*{message}"):
        prepare_folder(studies, tmp_path / "out", **KEYS)


def test_deep_and_nested_xml(studies, tmp_path):
    deep = "<a>" * 50_000 + "<findings>Deep <impression>down</impression></findings>" + "</a>" * 50_000
    write(studies / "a.xml", deep)
    prepare_folder(studies, tmp_path / "out", further=ALL, **KEYS)
    assert rows(tmp_path / "out", "own", "train")["a.dcm"] == ["Text of a", "Deep down", "down"]


def test_slices_become_images_of_their_own(studies, tmp_path):
    options = replace(ALL, slice=(1, "middle"), axis="coronal")
    prepare_folder(studies, tmp_path / "out", further=options, **KEYS)
    found = rows(tmp_path / "out", "own", "train")
    assert found["c/v.nii.gz#1"] == found["c/v.nii.gz#middle"] == ["Brain"]
    assert seen(tmp_path / "out", "own")["c/v.nii.gz#1"].shape == (8, 40)
    report = prepare_folder(studies, tmp_path / "out", further=replace(ALL, slice=(0, 8)), **KEYS)
    assert "c/v.nii.gz#8 (it has no slice 8 of that axis: it has 8, counted from 0)" in str(report.dropped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (40, 0)}, r"a centre and a width greater than 0, got \(40, 0\)"),
        ({"window": (float("nan"), 1)}, "a centre and a width greater than 0"),
        ({"slice": ()}, r"one or more slices, each once, got \[\]"),
        ({"slice": (1, 1)}, r"one or more slices, each once, got \[1, 1\]"),
        ({"percentiles": (50, 50)}, "percentiles must be two of 0 to 100, the lower first"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(UserError, match=message):
        OwnDataOptions(**options)


def test_patients_stay_together_and_are_named_where_they_do_not(studies, tmp_path):
    for seed in range(3, 12):
        header = {"PatientID": f"secret{seed // 3}"}
        write(studies / f"p{seed}.dcm", with_fields(dicom_bytes(radiograph(seed), bits_stored=12), **header))
        write(studies / f"p{seed}.txt", f"Patient {seed // 3}")
    options = OwnDataOptions(val_frac=0.3, test_frac=0.3)
    prepare_folder(studies, tmp_path / "out", group_tag="PatientID", further=options, **KEYS)
    split_of = {}
    for split in SPLITS:
        for texts in rows(tmp_path / "out", "own", split).values():
            assert split_of.setdefault(texts[0], split) == split
    assert b"secret" not in b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    table = "image,caption,who,fold\np3.dcm,x,P1,train\np4.dcm,y,P1,test\np6.dcm,z,P2,test\n"
    write(studies / "t.csv", table)
    columns = Columns(group_column="who", split_column="fold")
    report = prepare_csv(studies / "t.csv", tmp_path / "out", columns=columns)
    assert report.warnings[0] == "1 of 2 groups are in several splits (p3.dcm of train and p4.dcm of test)."


# Duplicates


def copies(tmp_path):
    """Seven radiographs; of the first there is a smaller JPEG in test, of the second the same file in val."""
    lines = []
    for seed in range(7):
        write(tmp_path / f"{seed}.png", png16((radiograph(seed, (160, 200)) // 16).astype(np.uint8)))
        lines.append(
            {"image": f"{seed}.png", "caption": f"number {seed}", "split": ("train", "train", "val")[seed % 3]}
        )
    stream = io.BytesIO()
    Image.open(tmp_path / "0.png").resize((120, 96)).save(stream, "JPEG", quality=60)
    write(tmp_path / "copy.jpg", stream.getvalue())
    write(tmp_path / "same.png", (tmp_path / "1.png").read_bytes())
    lines += [
        {"image": "copy.jpg", "caption": "copy", "split": "test"},
        {"image": "same.png", "caption": "same", "split": "val"},
    ]
    return write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, lines)))


def test_duplicates_across_splits(tmp_path):
    table, out = copies(tmp_path), tmp_path / "out"
    found = (
        "2 pairs of images look the same in two splits (1.png of train and same.png of val; "
        "0.png of train and copy.jpg of test)"
    )
    report = prepare_jsonl(table, out, columns=SPLIT)
    assert report.warnings == [f"{found}."] and report.splits["train"].num_images == 5
    assert f"Warning: {found}." in report.render()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match=re.escape(f"{found}, so nothing was written")):
        prepare_jsonl(table, out, columns=SPLIT, further=OwnDataOptions(on_duplicates="stop"))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    report = prepare_jsonl(table, out, columns=SPLIT, further=OwnDataOptions(on_duplicates="drop"))
    assert list(rows(out, "t", "train")) == ["3.png", "4.png", "6.png"] and report.splits["train"].num_texts == 3
    assert report.dropped == {"image of train that looks like one of a later split": ["0.png", "1.png"]}
    assert list(rows(out, "t", "val")) == ["2.png", "5.png", "same.png"]
    assert describe_arrow(out / "t_train.arrow").num_images == 3


def test_hashes_tell_radiographs_apart():
    def bits(image):
        return np.unpackbits(np.frombuffer(perceptual_hash(image), np.uint8)).astype(int)

    images = [Image.fromarray((radiograph(seed, (300, 200)) // 16).astype(np.uint8)) for seed in range(8)]
    hashes = [bits(image) for image in images]
    least = min(abs(a - b).sum() for i, a in enumerate(hashes) for b in hashes[:i])
    most = max(
        abs(bits(image.resize((90, 130)).convert("RGB")) - h).sum() for image, h in zip(images, hashes, strict=True)
    )
    assert most <= 16 < 40 < least
    assert perceptual_hash(Image.new("L", (5, 9))) == perceptual_hash(Image.new("L", (500, 90), 255))


# Processes


def test_any_number_of_processes_gives_the_same_files(studies, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "ROWS_PER_PROCESS", 2)
    write(studies / "bad.dcm", bytes(128) + b"DICM")
    write(studies / "bad.txt", "Of a bad file")
    options = OwnDataOptions(val_frac=0.2, test_frac=0.2)
    reports, files = [], []
    for num in (0, 2):
        report = prepare_folder(studies, tmp_path / "out", num_workers=num, further=options, **KEYS)
        reports.append(report.render())
        files.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert reports[0] == reports[1] and files[0] == files[1] and len(files[0]) == 5
    assert "bad.dcm" in reports[0]
    with pytest.raises(UserError, match=r"bad\.dcm: the DICOM file cannot be decoded"):
        prepare_folder(studies, tmp_path / "out", num_workers=2, further=OwnDataOptions(on_bad_image="stop"), **KEYS)


def test_how_many_processes():
    assert [workers.num_processes(8, n) for n in (0, 99, 100, 150, 10_000)] == [0, 0, 2, 3, 8]
    assert workers.num_processes(1, 10_000) == workers.num_processes(0, 10_000) == 0


def test_a_process_that_dies_is_a_sentence(studies, tmp_path, monkeypatch):
    def die(*_):
        raise BrokenProcessPool
        yield

    monkeypatch.setattr("fastm3ae.data.prepare.common.map_ahead", die)
    with pytest.raises(
        UserError, match=r"A process that reads images was ended, .* at .*a\.dcm or an image soon after"
    ):
        prepare_folder(studies, tmp_path / "out", num_workers=2, further=ALL, **KEYS)


# The data card


def test_the_card_and_its_sheet(tmp_path):
    table, out = copies(tmp_path), tmp_path / "out"
    with table.open("a") as file:
        file.write('\n{"image": "none.png", "caption": "x", "split": "train"}\n')
    prepare_jsonl(table, out, columns=SPLIT)
    card = (out / "t.md").read_text()
    for line in ("# t", "| train | 5 | 5 | t\\_train.arrow |",
                 "| width in pixels | test | 120 | 120 | 120 | 120 | 120 | 120.0 |",
                 "| words per text | train | 2 | 2 | 2 | 2 | 2 | 2.0 |", "- 1: the image file is missing (`none.png`)",
                 "| on\\_duplicates | 'warn' |", "![samples](<t_samples.png>)"):  # fmt: skip
        assert line in card.splitlines(), card
    assert "Warning: 2 pairs of images look the same" in card
    sheet = np.asarray(Image.open(out / "t_samples.png").convert("L"))
    first = np.asarray(Image.open(tmp_path / "0.png").resize((224, 179)))
    assert np.abs(sheet[30:209, 8:232].astype(int) - first).mean() < 3  # in the middle of its tile
    assert sheet[236:250, 8:232].min() < 160  # its name and text below


def test_hostile_texts_and_names_are_shown_as_they_are(tmp_path):
    evil = "![x](http://x/y.png) <script>alert(1)</script> | a | `b` \x1b[31m \u202e # h\n\n- [ ] $\\LaTeX$"
    name = "a`|<img src=x>.png"
    write(tmp_path / "own" / name, image_bytes())
    write(tmp_path / "own" / name.replace(".png", ".txt"), evil)
    write(tmp_path / "own/`<b>x.png", b"no image")
    write(tmp_path / "own/`<b>x.txt", evil)
    prepare_folder(tmp_path / "own", tmp_path / "out", name="x<b>[y](z)", further=ALL)
    card = (tmp_path / "out/x<b>[y](z).md").read_text()
    assert "\x1b" not in card and "\u202e" not in card
    without_code = re.sub(r"`[^`\n]*`", "", card).replace("![samples](<x<b>[y](z)_samples.png>)", "")
    assert not re.search(r"(?<!\\)[<\[`]", without_code)
    assert "(`'<b>x.png (its 8 bytes are of no known format" in card


def test_preparations_of_releases_write_a_card_and_take_a_window(tmp_path):
    from test_prepare_rsna_siim import rsna_name, write_rsna

    write_rsna(tmp_path / "rsna", {3: ["1,1,2,2"]})
    path = tmp_path / "rsna/stage_2_train_images" / f"{rsna_name(3)}.dcm"
    path.write_bytes(with_fields(path.read_bytes(), WindowCenter=100, WindowWidth=100, VOILUTFunction="LINEAR_EXACT"))
    stored = np.asarray(decode_dicom(path.read_bytes(), "max"))
    masks = {}
    for window in ("max", "tag"):
        prepare_rsna(tmp_path / "rsna", tmp_path / window, window=window)
        tables = [ArrowTable([tmp_path / window / f"rsna_{split}.arrow"]) for split in SPLITS]
        (table, row), *_ = [
            (t, i) for t in tables for i, name in enumerate(t.column("image_id")) if rsna_name(3) in name
        ]
        levels = np.asarray(decode_image(table.image_bytes(row)))
        values = open_dicom(path.read_bytes()).pixel_array
        expected = stored if window == "max" else np.clip((values - 50.0) / 100, 0, 1) * 255
        assert np.abs(levels - expected).max() <= 0.5
        masks[window] = bytes(table.image_bytes(row, "mask"))
    assert masks["max"] == masks["tag"]
    assert "| images with | train | val | test |" in (tmp_path / "tag/rsna.md").read_text()


def test_the_command(studies, tmp_path, capsys):
    command = f"prepare folder {studies} {tmp_path}/out --text-keys findings --window 2000 4000 --slice 2 3"
    assert main([*command.split(), "--num-workers", "0", "--on-duplicates", "warn"]) == 0
    printed = capsys.readouterr()
    assert "Warning: Fields that may say who a patient is" in printed.out and "image/s" not in printed.err
    assert describe_arrow(tmp_path / "out/own_train.arrow").options["window"] == [2000.0, 4000.0]
    assert main([*command.split(), "--text-tags", "PatientID"]) == 2
    assert capsys.readouterr().err.startswith("error: PatientID is a name, a number or a place that may say who")
