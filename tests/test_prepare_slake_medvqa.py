"""SLAKE and MedVQA-2019, on made-up trees in their layouts, and counts of the real samples of all three sets."""

import json
import os
from pathlib import Path

import pytest
from corpus import SIZE, TOKENIZER
from prepared import SPLITS, left_out, write
from vqa_trees import SLAKE, column, facts, medvqa_lines, slake, write_official, write_originals_layout, write_slake

from fastm3ae.cli import main
from fastm3ae.data.collate import BatchRequest
from fastm3ae.data.collate_pairs import VqaBatches
from fastm3ae.data.datasets import VqaDataset
from fastm3ae.data.images import make_transform
from fastm3ae.data.prepare import prepare_medvqa_2019, prepare_slake, prepare_vqa_rad
from fastm3ae.errors import UserError

GOLDEN = Path(__file__).parent / "data" / "golden" / "data"
FILES = {"train": "train", "val": "validate", "test": "test"}


def test_recorded_files_come_out_again(tmp_path):
    """The original's recorded files of three splits, from answers that it writes as they stand there."""
    recorded = json.loads((GOLDEN / "data_pipeline.json").read_text())["arrow"]
    written_as = {"yes": "Yes.", "left side": "The left  side", "mri t2 weighted": "MRI - T2 weighted", "2": "two"}
    content = {split: recorded[f"vqa_vqa_rad_{split}.arrow"]["content"] for split in SPLITS}
    records = {split: [] for split in SPLITS}
    for split, rows in content.items():
        for image, *values in zip(
            *(rows[key] for key in ("image_id", "questions", "answers", "question_id", "answer_type")), strict=True
        ):
            for question, (answer,), qid, kind in zip(*values, strict=True):
                name, written = Path(image).stem, written_as.get(answer, answer)
                records[split].append(slake(qid, name, question, written, kind="OPEN" if kind else "CLOSED"))
    prepare_slake(write_slake(tmp_path, {FILES[split]: part for split, part in records.items()}), tmp_path / "out")
    for split, rows in content.items():
        for name, values in rows.items():
            got = column(tmp_path / "out", split, name, "vqa_slack")
            assert got == ([f"imgs/{Path(v).stem}/source.jpg" for v in values] if name == "image_id" else values), name


@pytest.mark.parametrize("folder", ["slake", "slack", "Slake1.0", "."])
def test_slake_is_the_originals(tmp_path, folder, capsys):
    write_slake(tmp_path / "data" / folder)
    command = "slack" if folder == "slack" else "slake"
    out = tmp_path / "out"
    assert main(["prepare", command, str(tmp_path / "data"), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Left out 2: question of language zh, not en (train.json, record 2 (qid 2); validate.json, rec" in printed
    assert "Answers without a word are a label, as in the original: 1 (train.json, record 3 (qid 3))" in printed
    assert column(out, "train", "questions", "vqa_slack") == [["Which organ?"], ["Is there liver?"]]
    assert column(out, "train", "image_id", "vqa_slack") == ["imgs/xmlab1/source.jpg", "imgs/xmlab2/source.jpg"]
    assert facts(out, data_set="vqa_slack")["classes"]["answer_labels"] == ["lung heart", "", "yes", "liver"]
    assert facts(out, data_set="vqa_slack")["options"]["languages"] == ["en"]
    assert [column(out, s, "answer_labels", "vqa_slack") for s in ("val", "test")] == [[[[2]]], [[[3]]]]


def test_slake_in_other_languages(tmp_path):
    source = write_slake(tmp_path / "slake")
    prepare_slake(source, tmp_path / "out", languages=["en", "zh"])
    assert column(tmp_path / "out", "train", "questions", "vqa_slack")[0] == ["Which organ?", "哪个器官?"]
    report = prepare_slake(source, tmp_path / "out", languages=["zh"], answers="train")
    assert facts(tmp_path / "out", data_set="vqa_slack")["classes"]["answer_labels"] == ["肺"]
    assert "The split test is empty." in report.render() and "count as answered wrongly: 1 of val" in report.render()
    with pytest.raises(UserError, match=r"no question of language 'eng'; its languages are en, zh\. Did you mean 'en'"):
        prepare_slake(source, tmp_path / "out", languages=["zh", "eng"])
    unlabelled = [{key: value for key, value in record.items() if key != "q_lang"} for record in SLAKE["test"]]
    write_slake(source, SLAKE | {"test": unlabelled})
    with pytest.raises(UserError, match=r"test\.json, record 1 lacks q_lang; its keys are qid, img_name"):
        prepare_slake(source, tmp_path / "out")


def test_incomplete_slake_is_named(tmp_path):
    source = write_slake(tmp_path / "slake")
    (source / "validate.json").unlink()
    with pytest.raises(UserError, match=r"lacks \S*validate\.json; expected SLAKE: train\.json, validate\.json"):
        prepare_slake(source, tmp_path / "out")


# MedVQA-2019


@pytest.mark.parametrize("layout", [write_official, write_originals_layout])
@pytest.mark.parametrize("folder", [".", "medvqa_2019"])
def test_medvqa_2019_is_the_originals(tmp_path, layout, folder):
    layout(tmp_path / "data" / folder, medvqa_lines())
    out = tmp_path / "out"
    report = prepare_medvqa_2019(tmp_path / "data", out)
    name = "vqa_medvqa_2019"
    assert [Path(i).name for i in column(out, "train", "image_id", name)] == ["t1.jpg", "t2.jpg"]
    assert column(out, "train", "questions", name)[0] == ["what is it?", "which organ?", "which plane?"]
    assert column(out, "train", "question_id", name) == [[0, 1, 2], [3]]
    assert column(out, "val", "question_id", name) == [[4, 5, 6]]
    assert column(out, "test", "question_id", name) == [[7], [8], [9]]
    assert column(out, "test", "questions", name) == [["what is it?"], ["which organ?"], ["which plane?"]]
    assert facts(out, data_set=name)["classes"]["answer_labels"] == [
        "ct noncontrast", "spine and contents", "axial", "sagittal", "yes", "breast", "xr#plain film", "lateral"
    ]  # fmt: skip
    assert column(out, "val", "answer_type", name) == [[1, 1, 1]]
    assert not report.dropped and "Questions on abnormalities are left out, as in the original." in report.render()
    data = VqaDataset([out / f"{name}_test.arrow"])
    batch = VqaBatches(data, TOKENIZER, make_transform("clip", SIZE), max_text_tokens=32)[BatchRequest(0, 0, [2, 0])]
    assert batch.answer_ids_BA.tolist() == [[7], [6]] and batch.is_open_B.all()
    prepare_medvqa_2019(tmp_path / "data", out, answers="train")
    assert column(out, "test", "answer_labels", name) == [[[]], [[]], [[]]]


def test_incomplete_medvqa_2019_is_named(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=r"x lacks .*; expected MedVQA-2019: either ImageClef-2019-VQA-Med-Training/"):
        prepare_medvqa_2019(tmp_path / "x", tmp_path / "out")
    official = write_official(tmp_path / "official", medvqa_lines())
    (official / "ImageClef-2019-VQA-Med-Validation/QAPairsByCategory/C2_Plane_val.txt").unlink()
    (official / "VQAMed2019Test/VQAMed2019_Test_Questions_w_Ref_Answers.txt").unlink()
    with pytest.raises(UserError, match=r"lacks \S*C2_Plane_val\.txt, \S*w_Ref_Answers\.txt; expected"):
        prepare_medvqa_2019(official, tmp_path / "out")
    layout = write_originals_layout(tmp_path / "layout", medvqa_lines())
    (layout / "test/QA/Organ.csv").unlink()
    with pytest.raises(UserError, match=r"layout lacks \S*test/QA/Organ\.csv; expected"):
        prepare_medvqa_2019(layout, tmp_path / "out")


@pytest.mark.parametrize(
    "line, message",
    [
        ("v1|which plane?|a|b", r"C2_Plane_val\.txt, line 1 must be image\|question\|answer, got 'v1\|which pl"),
        ("v1|which plane?", r"line 1 must be image\|question\|answer"),
        ("|which plane?|axial", r"line 1 must be image\|question\|answer"),
        ("v1||axial", r"line 1 must be image\|question\|answer"),
    ],
)  # fmt: skip
def test_damaged_line_is_located(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        prepare_medvqa_2019(write_official(tmp_path, medvqa_lines(val={"plane": [line]})), tmp_path / "out")


def test_test_questions_without_a_known_category_or_answer(tmp_path):
    official = write_official(tmp_path / "m", medvqa_lines())
    file = official / "VQAMed2019Test/VQAMed2019_Test_Questions_w_Ref_Answers.txt"
    text = file.read_text()
    write(file, text.replace("|organ|", "|organs|"))
    with pytest.raises(UserError, match=r"w_Ref_Answers\.txt, line 3: the category must be one of .*, got 'organs'"):
        prepare_medvqa_2019(official, tmp_path / "out")
    write(file, text.replace("|breast", "|"))
    report = prepare_medvqa_2019(official, tmp_path / "out", on_empty_answer="drop")
    place = "VQAMed2019Test/VQAMed2019_Test_Questions_w_Ref_Answers.txt, line 3"
    assert report.dropped == {"question whose answer has no word": [place]}


# The real samples, where a folder with them is at hand


def test_real_samples(tmp_path):
    if "FASTM3AE_SHARED" not in os.environ:
        pytest.skip("FASTM3AE_SHARED names no folder")
    data = Path(os.environ["FASTM3AE_SHARED"]) / "data"

    def counts(report):
        return {split: (part.num_images, part.num_texts) for split, part in report.splits.items()}

    report = prepare_vqa_rad(data / "vqa_rad", tmp_path)
    assert counts(report) == {"train": (265, 2568), "val": (203, 451), "test": (203, 451)} and not report.dropped
    report = prepare_slake(data / "slake", tmp_path)
    assert counts(report) == {"train": (90, 983), "val": (25, 274), "test": (25, 253)}
    assert left_out(report) == {"question of language zh, not en": 660 + 55 + 24}
    both = prepare_slake(data / "slake", tmp_path, languages=["en", "zh"])
    assert counts(both) == {"train": (90, 1643), "val": (25, 329), "test": (25, 277)} and not both.dropped
    with pytest.raises(UserError, match="lacks 371 of the 605 images that the questions name"):
        prepare_medvqa_2019(data / "vqa_med_2019", tmp_path)
    report = prepare_medvqa_2019(data / "vqa_med_2019", tmp_path, allow_missing=True)
    assert counts(report) == {"train": (180, 540), "val": (50, 150), "test": (4, 4)}
