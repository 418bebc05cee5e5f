"""Preparation of radiology reports: their sections, MIMIC-CXR in its official layout, and Open-i's XML."""

import csv
import gzip
import io

import pytest
from prepared import SPLITS, image_bytes, left_out, rows, write

from fastm3ae.cli import main
from fastm3ae.data.arrow import MIMIC_CXR_COLUMNS, ArrowTable
from fastm3ae.data.datasets import PairDataset
from fastm3ae.data.prepare import Columns, OwnDataOptions, PrepareReport, prepare_csv, prepare_jsonl, prepare_mimic_cxr
from fastm3ae.data.prepare.mimic_cxr import CHEXPERT_LABELS
from fastm3ae.data.prepare.reports import SECTIONS, TextChoice, choose_texts, find_sections
from fastm3ae.errors import UserError

USUAL = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  History: ___F with cough  // pneumonia?

 COMPARISON:  None. No significant findings: see below.

 FINDINGS:

 Both lungs are clear, without focal
 opacity.  LINES AND TUBES: none.
 HEART:  Of normal size.

 IMPRESSION:

 No acute process.

 NOTIFICATION:  Told to Dr. ___ by phone.
"""
WET_READ = """ WET READ: ___ ___ ___ 8:19 PM
  IMPRESSION: Perhaps something at the left base.
 ______________________________________________________________________________
"""


def texts_of(text, *sections, min_words=1, placeholders="keep", join=False):
    report = PrepareReport("x")
    texts = choose_texts(find_sections(text), TextChoice(sections, min_words, placeholders, join), report, "r")
    return texts if not report.dropped else (texts, report.dropped)


BODY = ("impression", "findings")
CLEAR = "Both lungs are clear, without focal opacity. LINES AND TUBES: none. HEART: Of normal size."
REPORTS = {
    "usual": (USUAL, ["No acute process.", CLEAR]),
    "CRLF": (USUAL.replace("\n", "\r\n"), ["No acute process.", CLEAR]),
    "capitalised": (
        USUAL.replace("FINDINGS:", "Findings:").replace("IMPRESSION", "Impression"),
        ["No acute process.", CLEAR],
    ),
    "lower case": ("comparison: none\n\nfindings: all clear\n\nimpression: normal", ["normal", "all clear"]),
    "a word of a sentence": (
        "FINDINGS: All clear, and no\nfindings: none seen. The impression: good.\nIMPRESSION: Fine.",
        ["Fine.", "All clear, and no findings: none seen. The impression: good."],
    ),
    "misspelt": (USUAL.replace("FINDINGS", "FINDNGS").replace("IMPRESSION", "IMPRESSON"), ["No acute process.", CLEAR]),
    "alone on a line": (
        USUAL.replace("FINDINGS:", "FINDINGS").replace("IMPRESSION:", "  **IMPRESSION**"),
        ["No acute process.", CLEAR],
    ),
    "one line": ("COMPARISON: None FINDINGS: Good lungs. IMPRESSION: Normal.", ["Normal.", "Good lungs."]),
    "one line, capitalised": ("Findings: Good lungs. Impression: Normal.", ["Normal.", "Good lungs."]),
    "conclusion": ("FINDINGS: Good lungs.\nCONCLUSION: Normal.", ["Normal.", "Good lungs."]),
    "joint": (
        "COMPARISON: None.\n FINDINGS AND IMPRESSION:  Good lungs.\n Normal heart.",
        ["Good lungs. Normal heart."],
    ),
    "joint by a slash": ("FINDINGS/IMPRESSION: Good lungs.", ["Good lungs."]),
    "joint and misspelt": ("FINDINGS AND IMPRESION: Good lungs.", ["Good lungs."]),
    "joint and one more": ("FINDINGS & IMPRESSION: Good lungs.\nIMPRESSION: Normal.", ["Good lungs. Normal."]),
    "several": (
        "FINDINGS: Good lungs.\nTECHNIQUE: CT\nFINDINGS: Good liver.\nIMPRESSION: Normal.",
        ["Normal.", "Good lungs. Good liver."],
    ),
    "title": (
        "CHEST, PA AND LATERAL:\n\n INDICATION: Cough.\n FINDINGS: Good lungs.\n IMPRESSION: Normal.",
        ["Normal.", "Good lungs."],
    ),
    "views for findings": (
        "INDICATION: Cough.\n\n CHEST, TWO VIEWS: Good lungs.\n\n IMPRESSION: Normal.",
        ["Normal.", "Good lungs."],
    ),
    "views inside findings": (
        "FINDINGS: Two studies.\nCHEST, TWO VIEWS: Good lungs.\nIMPRESSION: Normal.",
        ["Normal.", "Two studies. CHEST, TWO VIEWS: Good lungs."],
    ),
    "wet read": (WET_READ + USUAL, ["No acute process.", CLEAR]),
    "addendum first": (
        " FINAL ADDENDUM\n ADDENDUM  FINDINGS: A rib is broken.\n____________\n" + USUAL,
        ["No acute process.", CLEAR],
    ),
    "addendum last": (USUAL + "\n ADDENDUM: The side was corrected.\n", ["No acute process.", CLEAR]),
    "a part before the final report": (
        "INDICATION: Cough.\nFINDINGS: Good lungs.\nFINAL REPORT\nIMPRESSION: Normal.",
        ["Normal.", "Good lungs."],
    ),
    "wet read without a final report": (
        WET_READ + " FINDINGS: Good lungs.",
        ["Perhaps something at the left base.", "Good lungs."],
    ),
}


@pytest.mark.parametrize("text, expected", REPORTS.values(), ids=REPORTS)
def test_sections_of_a_report(text, expected):
    assert texts_of(text, *BODY) == expected


def test_other_sections_and_their_order():
    report = WET_READ + USUAL + " ADDENDUM: The side was corrected.\n"
    assert texts_of(report, "indication", "wet read", "addendum", "comparison", "examination", "notification") == [
        "History: ___F with cough // pneumonia?",
        "___ ___ ___ 8:19 PM IMPRESSION: Perhaps something at the left base.",
        "The side was corrected.",
        "None. No significant findings: see below.",
        "CHEST (PA AND LAT)",
        "Told to Dr. ___ by phone.",
    ]
    assert texts_of(USUAL, "findings", "impression", join=True) == [f"{CLEAR} No acute process."]
    assert "final report" not in SECTIONS


def test_what_is_missing_or_short_is_reported():
    assert texts_of("IMPRESSION: Normal.\nFINDINGS:\n\n", *BODY) == (
        ["Normal."],
        {"section findings, missing or empty": ["r"]},
    )
    neither = {"report without impression or findings": ["r"]}
    assert texts_of("INDICATION: Cough.", *BODY) == texts_of("No heading at all.", *BODY) == ([], neither)
    short = {"text of fewer than 3 words": ["r 'Normal.'"]}
    assert texts_of("IMPRESSION: Normal.", "impression", min_words=3, join=True) == ([], short)
    both = "IMPRESSION: Normal.\nFINDINGS: Both lungs clear."
    assert texts_of(both, *BODY, min_words=3, join=True) == (["Both lungs clear."], short)


def test_placeholders_leave_with_their_words_and_their_punctuation_stays():
    text = "IMPRESSION: ___ year old. Compared to ___, ___. XXXX-year-old chest x-XXXX. Dr. ___\nin (XXXX) clear XXXX."
    assert texts_of(text, "impression", placeholders="remove") == ["year old. Compared to, chest. Dr. in clear."]
    assert "XXXX-year-old" in texts_of(text, "impression")[0]
    assert texts_of("IMPRESSION: ___ ___.", "impression", placeholders="remove") == (
        [],
        {"text of fewer than 1 words": ["r ''"]},
    )


def test_texts_of_a_row_are_joined_for_tables_too(tmp_path):
    write(tmp_path / "a.png", image_bytes())
    write(tmp_path / "t.csv", "image,findings,impression\na.png,Good lungs.,Normal.\na.png,,Again.\n")
    write(tmp_path / "t.jsonl", '{"image": "a.png", "findings": ["Good", "lungs."], "impression": "Normal."}\n')
    options = {
        "columns": Columns(text_columns=("impression", "findings")),
        "further": OwnDataOptions(join=True, val_frac=0, test_frac=0),
    }
    prepare_csv(tmp_path / "t.csv", tmp_path / "out", **options)
    assert rows(tmp_path / "out", "t", "train") == {"a.png": ["Normal. Good lungs.", "Again."]}
    prepare_jsonl(tmp_path / "t.jsonl", tmp_path / "out", **options)
    assert rows(tmp_path / "out", "t", "train") == {"a.png": ["Normal. Good lungs."]}


# MIMIC-CXR

IMAGES = [  # subject, study, view, split, image
    ("10000032", "50414267", "PA", "train", "aa-01"),
    ("10000032", "50414267", "LATERAL", "train", "aa-02"),
    ("10000032", "53189527", "LATERAL", "train", "bb-01"),
    ("11000033", "50000001", "AP", "validate", "cc-01"),
    ("11000033", "50000001", "AP", "validate", "cc-02"),
    ("12000034", "50000002", "AP", "test", "dd-01"),
    ("12000034", "50000003", "", "test", "dd-02"),
    ("13000035", "50000004", "PA", "train", "ee-01"),
    ("14000036", "50000005", "PA", "train", "ff-01"),
]
LABELS = {study: [""] * 13 + ["1.0"] for _, study, *_ in IMAGES} | {
    "50414267": ["1.0", "0.0", "-1.0", ""] + [""] * 4 + ["1.0"] + [""] * 5
}


def path_of(subject, study):
    return f"files/p{subject[:2]}/p{subject}/s{study}"


def write_table(path, names, table):
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([names, *table])
    content = stream.getvalue().encode()
    return write(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def write_mimic(root, images=IMAGES, labels=LABELS, suffix=".csv.gz", reports="mimic-cxr-reports", split=None):
    metadata = [(image, "CHEST", view, subject, study) for subject, study, view, _, image in images]
    names = ("dicom_id", "PerformedProcedureStepDescription", "ViewPosition", "subject_id", "study_id")
    write_table(root / f"mimic-cxr-2.0.0-metadata{suffix}", names, metadata)
    split = [(image, study, subject, split) for subject, study, _, split, image in images] if split is None else split
    write_table(root / f"mimic-cxr-2.0.0-split{suffix}", ("dicom_id", "study_id", "subject_id", "split"), split)
    names = ("subject_id", "study_id", *CHEXPERT_LABELS)
    write_table(
        root / f"mimic-cxr-2.0.0-chexpert{suffix}", names, [("1", study, *row) for study, row in labels.items()]
    )
    for number, (subject, study, *_, image) in enumerate(images):
        write(root / path_of(subject, study) / f"{image}.jpg", image_bytes(number, "JPEG"))
        write(root / reports / f"{path_of(subject, study)}.txt", USUAL.replace("normal", f"normal {study}"))
    return root


def texts_of_study(study):
    return ["No acute process.", CLEAR.replace("normal", f"normal {study}")]


@pytest.fixture
def mimic(tmp_path):
    return write_mimic(tmp_path / "mimic-cxr-jpg")


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_mimic_cxr(mimic, tmp_path):
    out = tmp_path / "out"
    report = prepare_mimic_cxr(mimic, out)
    images = {split: rows(out, "mimic_cxr", split) for split in SPLITS}
    folder = path_of("11000033", "50000001")
    assert images["val"] == {f"{folder}/cc-0{i}.jpg": texts_of_study("50000001") for i in (1, 2)}
    assert images["test"] == {path_of("12000034", "50000002") + "/dd-01.jpg": texts_of_study("50000002")}
    assert [image[-9:] for image in images["train"]] == ["aa-01.jpg", "ee-01.jpg", "ff-01.jpg"]
    table = ArrowTable.open([out / "mimic_cxr_train.arrow"], MIMIC_CXR_COLUMNS)
    assert table.batches[0].schema.names == ["image", "caption", "image_id", "chexpert", "split"]
    assert str(table.batches[0].schema.field("chexpert").type) in ("list<item: int64>", "list<element: int64>")
    assert table.column("chexpert") == [[1] + [0] * 7 + [1] + [0] * 5, *([[0] * 13 + [1]] * 2)]
    assert table.column("split") == ["train"] * 3
    assert bytes(table.image_bytes(0)) == (mimic / table.row(0, "image_id")).read_bytes()
    assert left_out(report) == {
        "image of view LATERAL, not PA or AP": 2,
        "image of view (empty), not PA or AP": 1,
        "report without a usable image": 2,
    }
    assert "p10/p10000032/s53189527.txt" in report.render()


def test_mimic_cxr_comes_back_as_pairs(mimic, tmp_path, capsys):
    assert main(["prepare", "mimic-cxr", str(mimic), str(tmp_path / "out")]) == 0
    assert "Left out 2: report without a usable image" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out/mimic_cxr_val.arrow")]) == 0
    assert "2 images" in capsys.readouterr().out
    pairs = PairDataset([tmp_path / "out/mimic_cxr_train.arrow", tmp_path / "out/mimic_cxr_val.arrow"])
    assert len(pairs) == 10 and pairs.text(0) == "No acute process." and pairs.image(9).size == (8, 6)


def test_mimic_cxr_of_other_files_is_the_same(mimic, tmp_path):
    """Unpacked tables, and reports elsewhere, among the images, or next to the images' folder."""
    prepare_mimic_cxr(mimic, tmp_path / "a")
    prepare_mimic_cxr(write_mimic(tmp_path / "plain", suffix=".csv", reports="."), tmp_path / "b")
    (mimic / "mimic-cxr-reports").rename(tmp_path / "elsewhere")
    prepare_mimic_cxr(mimic, tmp_path / "c", reports=tmp_path / "elsewhere")
    prepare_mimic_cxr(mimic, tmp_path / "d", reports=tmp_path / "elsewhere/files")
    (tmp_path / "elsewhere").rename(tmp_path / "mimic-cxr-reports")
    prepare_mimic_cxr(mimic, tmp_path / "e")
    first, *others = (bytes_of(tmp_path / name) for name in "abcde")
    assert all(other == first for other in others)


def test_mimic_cxr_views_sections_and_words(mimic, tmp_path):
    options = {"views": ["LATERAL"], "sections": ["indication"], "placeholders": "remove", "min_words": 4}
    prepare_mimic_cxr(mimic, tmp_path / "out", **options)
    assert [text for texts in rows(tmp_path / "out", "mimic_cxr", "train").values() for text in texts] == [
        "History: with cough // pneumonia?"
    ] * 2
    with pytest.raises(UserError, match=r"no image of view 'LATERL'; its views are AP, LATERAL, PA\. Did you mean 'LA"):
        prepare_mimic_cxr(mimic, tmp_path / "out", views=["PA", "LATERL"])
    with pytest.raises(UserError, match="got 'finding'. Did you mean 'findings'"):
        prepare_mimic_cxr(mimic, tmp_path / "out", sections=["finding"])
    with pytest.raises(UserError, match="at least one of impression, findings, .*; got none"):
        prepare_mimic_cxr(mimic, tmp_path / "out", sections=[])


def test_everything_of_mimic_cxr_that_is_left_out_is_named(tmp_path):
    labels = {study: row for study, row in LABELS.items() if study != "50000004"}
    split = [(image, study, subject, split) for subject, study, _, split, image in IMAGES if image != "cc-02"]
    mimic = write_mimic(tmp_path / "m", labels=labels, split=[*split, ("zz-99", "1", "2", "test")])
    (mimic / "mimic-cxr-reports" / f"{path_of('14000036', '50000005')}.txt").unlink()
    write(mimic / "mimic-cxr-reports" / f"{path_of('12000034', '50000002')}.txt", "IMPRESSION: Fine.\n")
    (mimic / path_of("11000033", "50000001") / "cc-01.jpg").unlink()
    report = prepare_mimic_cxr(mimic, tmp_path / "out")
    assert [part.num_images for part in report.splits.values()] == [1, 0, 0]
    assert left_out(report) == {
        "row of the split table for an image that the metadata lack": 1,
        "image of view LATERAL, not PA or AP": 2,
        "image without a row in the split table": 1,
        "image of view (empty), not PA or AP": 1,
        "image of a study without a row in the chexpert table": 1,
        "report without a usable image": 3,
        "section findings, missing or empty": 1,
        "text of fewer than 3 words": 1,
        "image without a usable report": 2,
        "the report file is missing": 1,
        "the image file is missing": 1,
    }
    lost = sum(len(items) for reason, items in report.dropped.items() if "image" in reason.split()[:2])
    assert lost + sum(part.num_images for part in report.splits.values()) == len(IMAGES)
    text = report.render()
    assert all(name in text for name in ("zz-99", "cc-02.jpg", "p14/p14000036/s50000005.txt", "dd-01.jpg", "'Fine.'"))


def test_patient_in_two_splits_is_refused(tmp_path):
    leaking = [*IMAGES, ("10000032", "50000009", "LATERAL", "test", "aa-09")]
    mimic = write_mimic(tmp_path / "m", images=leaking, labels=LABELS | {"50000009": [""] * 14})
    with pytest.raises(UserError, match=r"puts patient 10000032 into train \(image aa-01\) and test \(image aa-09\)"):
        prepare_mimic_cxr(mimic, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "table, change, message",
    [
        ("metadata", ("ViewPosition", "View"), r"metadata\.csv has no column 'ViewPosition'; its columns are dicom"),
        ("metadata", ("aa-02", "aa-01"), r"metadata\.csv, line 3: the dicom_id aa-01 is in line 2, too"),
        ("metadata", ("aa-02", "../aa"), r"line 3: dicom_id must be letters, digits and dashes, got '\.\./aa'"),
        ("metadata", ("10000032", "10000032.0"), r"line 2: subject_id must be digits, got '10000032\.0'"),
        ("split", ("validate", "dev"), r"split\.csv, line 5: split must be one of train, validate, test, got 'dev'"),
        ("chexpert", ("No Finding", "Nothing"), r"chexpert\.csv has no column 'No Finding'"),
        ("chexpert", ("-1.0", "2.0"), r"chexpert\.csv, line 2: Consolidation must be 1, 0, -1 or empty, got '2\.0'"),
        ("chexpert", ("53189527", "50414267"), r"line 3: the study_id 50414267 is in line 2, too"),
    ],
)  # fmt: skip
def test_damaged_table_of_mimic_cxr_is_located(tmp_path, table, change, message):
    mimic = write_mimic(tmp_path / "m", suffix=".csv")
    file = mimic / f"mimic-cxr-2.0.0-{table}.csv"
    write(file, file.read_text().replace(*change))
    with pytest.raises(UserError, match=message):
        prepare_mimic_cxr(mimic, tmp_path / "out")


def test_missing_and_unreadable_files_of_mimic_cxr_are_named(mimic, tmp_path):
    def refused(message, **options):
        with pytest.raises(UserError, match=message):
            prepare_mimic_cxr(mimic, tmp_path / "out", **options)

    file = mimic / "mimic-cxr-reports" / f"{path_of('10000032', '50414267')}.txt"
    write(file, b"FINDINGS: caf\xe9 au lait\n")
    refused(r"s50414267\.txt cannot be read as UTF-8")
    for report in (mimic / "mimic-cxr-reports").rglob("*.txt"):
        report.unlink()
    refused(r"no report in \S*mimic-cxr-reports/files; expected p10/p10000032/s50414267\.txt .* --reports names")
    refused("nowhere does not exist; expected the reports", reports=tmp_path / "nowhere")
    table = mimic / "mimic-cxr-2.0.0-split.csv.gz"
    whole = table.read_bytes()
    for damaged in (whole[:-9], b"dicom_id,split\n", whole[:20] + b"\0\0\0" + whole[23:]):
        write(table, damaged)
        refused(r"split\.csv\.gz cannot be read as UTF-8 text")
    table.unlink()
    (mimic / "mimic-cxr-2.0.0-chexpert.csv.gz").unlink()
    refused(r"lacks \S*split\.csv\.gz, \S*chexpert\.csv\.gz; expected MIMIC-CXR-JPG: files/ and")
    write_mimic(tmp_path / "mimic-cxr-jpg")
    (mimic / "files").rename(mimic / "images")
    refused(r"lacks the folder files; expected MIMIC-CXR-JPG")
    with pytest.raises(UserError, match="nothing does not exist; expected MIMIC-CXR-JPG"):
        prepare_mimic_cxr(tmp_path / "nothing", tmp_path / "out")
