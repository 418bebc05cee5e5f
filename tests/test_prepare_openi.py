"""Preparation of Open-i's chest X-rays: made-up reports in the real structure, images under all of their names."""

from xml.sax.saxutils import escape

import pytest
from prepared import SPLITS, image_bytes, left_out, rows, write

from fastm3ae.cli import main
from fastm3ae.data.datasets import PairDataset
from fastm3ae.data.prepare import prepare_openi
from fastm3ae.errors import UserError

REPORTS = "NLMCXR_reports/ecgen-radiology"
ALL_TRAIN = {"val_frac": 0, "test_frac": 0}


def write_report(source, number, images=("{}_IM-01-1001", "{}_IM-01-2001"), **sections):
    """Writes a report and its images' files; "{}" in an image's id is the report's number."""
    sections = {
        "COMPARISON": "",
        "INDICATION": "Cough and XXXX.",
        "FINDINGS": f"Heart & lungs of person {number}\n  look good on this XXXX.",
        "IMPRESSION": "No acute disease.",
    } | sections
    texts = "".join(f'<AbstractText Label="{name}">{escape(text)}</AbstractText>' for name, text in sections.items())
    ids = ["CXR" + image.format(number) for image in images]
    parents = "".join(f'<parentImage id="{i}"><figureId>F1</figureId></parentImage>' for i in ids)
    write(
        source / f"{REPORTS}/{number}.xml",
        f'<?xml version="1.0" encoding="utf-8"?>\n<eCitation><uId id="CXR{number}"/><MedlineCitation><Article>'
        f"<Abstract>{texts}</Abstract></Article></MedlineCitation>{parents}</eCitation>\n",
    )
    for i in ids:
        write(source / f"NLMCXR_png/{i}.png", image_bytes(number))


@pytest.fixture
def openi(tmp_path):
    for number in range(1, 21):
        write_report(tmp_path / "openi", number)
    return tmp_path / "openi"


def all_rows(output):
    return {split: rows(output, "openi", split) for split in SPLITS}


def reports_of(images):
    return {image.split("_")[0] for image in images}


def test_openi(openi, tmp_path):
    report = prepare_openi(openi, tmp_path / "out", **ALL_TRAIN)
    found = rows(tmp_path / "out", "openi", "train")
    assert list(found) == [f"CXR{number}_IM-01-{i}001.png" for number in range(1, 21) for i in (1, 2)]
    assert found["CXR12_IM-01-2001.png"] == [
        "No acute disease.",
        "Heart & lungs of person 12 look good on this XXXX.",
    ]
    assert not report.dropped


def test_openi_splits_keep_reports_together_and_follow_the_seed(openi, tmp_path):
    prepare_openi(openi, tmp_path / "a")
    reports = {split: reports_of(found) for split, found in all_rows(tmp_path / "a").items()}
    assert [len(names) for names in reports.values()] == [14, 2, 4]
    assert len(set().union(*reports.values())) == 20  # no report is in two splits
    assert [len(found) for found in all_rows(tmp_path / "a").values()] == [28, 4, 8]
    prepare_openi(openi, tmp_path / "b")
    prepare_openi(openi, tmp_path / "c", seed=1)
    a, b, c = ([(tmp_path / f / f"openi_{split}.arrow").read_bytes() for split in SPLITS] for f in "abc")
    assert a == b and a != c
    with pytest.raises(UserError, match=r"together less than 1, got 0\.5 and 0\.5"):
        prepare_openi(openi, tmp_path / "d", val_frac=0.5, test_frac=0.5)


def test_openi_sections_placeholders_and_words(openi, tmp_path):
    options = {"sections": ["findings", "indication"], "placeholders": "remove", "min_words": 2}
    prepare_openi(openi, tmp_path / "out", **options, **ALL_TRAIN)
    texts = rows(tmp_path / "out", "openi", "train")["CXR3_IM-01-1001.png"]
    assert texts == ["Heart & lungs of person 3 look good on this.", "Cough and."]
    prepare_openi(openi, tmp_path / "out", join=True, **ALL_TRAIN)
    texts = rows(tmp_path / "out", "openi", "train")["CXR3_IM-01-1001.png"]
    assert texts == ["No acute disease. Heart & lungs of person 3 look good on this XXXX."]
    with pytest.raises(UserError, match="of impression, findings, indication, comparison; got 'technique'"):
        prepare_openi(openi, tmp_path / "out", sections=["technique"])


def test_openi_comes_back_as_pairs(openi, tmp_path, capsys):
    assert main(["prepare", "openi", str(openi), str(tmp_path / "out"), "--val-frac", "0.3"]) == 0
    assert "The splits were drawn at random (seed 0)." in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out/openi_val.arrow")]) == 0
    assert "12 images" in capsys.readouterr().out
    pairs = PairDataset([tmp_path / "out/openi_val.arrow"])
    assert len(pairs) == 24 and pairs.text(0) == "No acute disease." and pairs.image(23).size == (8, 6)


def test_everything_of_openi_that_is_left_out_is_named(openi, tmp_path):
    images = openi / "NLMCXR_png"
    write_report(openi, 1, images=[])
    write_report(openi, 2, FINDINGS=" ", IMPRESSION="")
    write_report(openi, 3, FINDINGS="Good.", IMPRESSION="Normal.")
    write_report(openi, 4, FINDINGS="")
    write_report(openi, 5, IMPRESSION="Normal.")
    (images / "CXR6_IM-01-1001.png").unlink()
    for i in (1, 2):
        (images / f"CXR7_IM-01-{i}001.png").unlink()
    write(images / "CXR8_IM-01-1001.png", b"no image")
    report = prepare_openi(openi, tmp_path / "out", **ALL_TRAIN)
    assert left_out(report) == {
        "report that names no image": 1,
        "image that no report names": 2,
        "report without impression or findings": 1,
        "section findings, missing or empty": 1,
        "text of fewer than 3 words": 3,
        "image without a usable report": 4,
        "the image file is missing": 3,
        "report without a usable image": 1,
        "the image cannot be decoded": 1,
    }
    unused = 2 + 4 + 1  # of the 37 files that are there
    assert report.splits["train"].num_images == len(list(images.iterdir())) - unused == 30
    text = report.render()
    assert all(
        name in text for name in ("1.xml", "CXR1_IM-01-2001.png", "7.xml", "CXR6_IM-01-1001, of 6.xml", "'Good.'")
    )
    with pytest.raises(UserError, match=r"CXR8_IM-01-1001\.png: the image cannot be decoded"):
        prepare_openi(openi, tmp_path / "out", on_bad_image="stop")


def test_openi_projections_of_the_copy_on_kaggle(openi, tmp_path):
    """Its names lack CXR and end in .dcm.png, and a few of the XML's have the number twice."""
    write_report(openi, 1, images=["1_1_IM-01-1001", "1_1_IM-01-2001"])
    for i in (1, 2):
        (openi / f"NLMCXR_png/CXR1_IM-01-{i}001.png").unlink()
    lines = [
        f"{number},{number}_IM-01-{i}001.dcm.png,{view}"
        for number in range(1, 19)
        for i, view in ((1, "Frontal"), (2, "Lateral"))
    ]
    table = write(
        tmp_path / "p.csv", "\n".join(["uid,filename,projection", *lines, "99,99_IM-01-1001.dcm.png,Frontal"])
    )
    report = prepare_openi(openi, tmp_path / "out", projections=table, **ALL_TRAIN)
    first, *others = rows(tmp_path / "out", "openi", "train")
    assert first == "CXR1_1_IM-01-1001.png" and others == [f"CXR{n}_IM-01-1001.png" for n in range(2, 19)]
    assert left_out(report) == {
        "image of projection Lateral, not Frontal": 18,
        "image without a row in the projections": 4,
        "report without a usable image": 2,
        "row of the projections for an image that no report names": 1,
    }
    for path in (openi / "NLMCXR_png").iterdir():
        path.rename(path.with_name(path.name[3:].replace(".png", ".dcm.png")))
    report = prepare_openi(openi, tmp_path / "out", projections=table, views=["Frontal", "Lateral"])
    assert sum(part.num_images for part in report.splits.values()) == 36
    with pytest.raises(UserError, match=r"no image of projection 'frontal'; .* Frontal, Lateral\. Did you mean 'Fro"):
        prepare_openi(openi, tmp_path / "out", projections=table, views=["frontal"])
    write(table, table.read_text() + "\n1,CXR1_IM-01-1001.png,Lateral\n")
    with pytest.raises(UserError, match=r"p\.csv, line 39: CXR1_IM-01-1001\.png is there twice"):
        prepare_openi(openi, tmp_path / "out", projections=table)
    write(table, "uid,file_name,projection\n")
    with pytest.raises(UserError, match=r"no column 'filename'; .* Did you mean 'file_name'\?"):
        prepare_openi(openi, tmp_path / "out", projections=table)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<eCitation><a></eCitation>", r"21\.xml cannot be read as XML: mismatched tag: line 1"),
        (b"", r"21\.xml cannot be read as XML: no element found"),
        (b"<article/>", r"21\.xml is no report of Open-i: it is a <article>, expected an <eCitation>"),
        (b"<eCitation><parentImage/></eCitation>", r"21\.xml has a <parentImage> without an id"),
        (
            b'<eCitation><parentImage id="CXR4_IM-01-1001"/></eCitation>',
            r"21\.xml names the image CXR4_IM-01-1001, as 4\.xml does",
        ),
    ],
)
def test_damaged_report_of_openi_is_named(openi, tmp_path, content, message):
    write(openi / REPORTS / "21.xml", content)
    with pytest.raises(UserError, match=message):
        prepare_openi(openi, tmp_path / "out")


def test_folders_of_openi(openi, tmp_path):
    """The archives in one folder, unpacked anywhere, or unpacked without folders of their own."""
    prepare_openi(openi, tmp_path / "a")
    (openi / "NLMCXR_png").rename(tmp_path / "png")
    with pytest.raises(UserError, match=r"no \.png file in \S*openi/NLMCXR_png or \S*openi; expected NLMCXR_reports"):
        prepare_openi(openi, tmp_path / "b")
    prepare_openi(openi, tmp_path / "b", images=tmp_path / "png")
    (openi / REPORTS).rename(tmp_path / "png/ecgen-radiology")
    prepare_openi(tmp_path / "png", tmp_path / "c")
    prepare_openi(openi, tmp_path / "d", reports=tmp_path / "png/ecgen-radiology", images=tmp_path / "png")
    for split in SPLITS:
        assert len({(tmp_path / f / f"openi_{split}.arrow").read_bytes() for f in "abcd"}) == 1
    with pytest.raises(UserError, match=r"no \.xml file in \S*openi/ecgen-radiology or \S*openi; expected"):
        prepare_openi(tmp_path / "png", tmp_path / "out", reports=openi)
    with pytest.raises(UserError, match="nowhere does not exist; expected NLMCXR_reports"):
        prepare_openi(tmp_path / "nowhere", tmp_path / "out")
    write(tmp_path / "png/1_IM-01-1001.dcm.png", image_bytes())
    with pytest.raises(UserError, match=r"the same image as 1_IM-01-1001\.dcm\.png and as CXR1_IM-01-1001\.png"):
        prepare_openi(tmp_path / "png", tmp_path / "out")
    assert not (tmp_path / "out").exists()
