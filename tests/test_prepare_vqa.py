"""VQA-RAD on a made-up tree, and what all sets of questions share: labels, splits, what is left out or refused."""

import pyarrow as pa
import pytest
import torch
from corpus import SIZE, TOKENIZER
from prepared import SPLITS, left_out, write
from vqa_trees import column, facts, rad, rad_splits, write_images, write_rad

from fastm3ae.cli import main
from fastm3ae.data.arrow import VQA_COLUMNS, ArrowTable
from fastm3ae.data.collate import BatchRequest
from fastm3ae.data.collate_pairs import VqaBatches
from fastm3ae.data.datasets import VqaDataset
from fastm3ae.data.images import make_transform
from fastm3ae.data.prepare import prepare_vqa_rad
from fastm3ae.errors import UserError


@pytest.fixture
def vqa_rad(tmp_path):
    return write_rad(tmp_path / "vqa_rad", rad_splits())


def test_vqa_rad_is_the_originals(vqa_rad, tmp_path):
    out = tmp_path / "out"
    report = prepare_vqa_rad(vqa_rad, out)
    assert column(out, "train", "image_id") == ["images/a.jpg", "images/b.jpg", "images/c.jpg"]
    assert column(out, "train", "questions") == [
        ["Is it clear?", "How many?"],
        ["Which side? ", "Which lobe?"],
        ["Is it large?"],
    ]
    assert column(out, "train", "answers") == [[["yes"], ["3"]], [["left side"], ["lobe upper"]], [["no"]]]
    assert column(out, "train", "answer_labels") == [[[0], [2]], [[1], [4]], [[3]]]
    assert column(out, "train", "answer_scores") == [[[1.0], [1.0]], [[1.0], [1.0]], [[1.0]]]
    assert column(out, "train", "question_id") == [[1, 3], [2, 5], [4]]
    assert column(out, "train", "answer_type") == [[0, 1], [1, 1], [0]]
    assert column(out, "test", "answer_labels") == [[[0]], [[5], [3]]]
    for name in VQA_COLUMNS:
        if name not in ("image", "split"):
            assert column(out, "val", name) == column(out, "test", name)
    assert column(out, "val", "split") == ["val"] * 2
    table = ArrowTable([out / "vqa_vqa_rad_train.arrow"])
    assert bytes(table.image_bytes(1)) == (vqa_rad / "images/b.jpg").read_bytes()
    labels = ["yes", "left side", "3", "no", "lobe upper", "silhouette"]
    for split in SPLITS:
        assert facts(out, split)["classes"] == {"answer_labels": labels}
        assert facts(out, split)["options"] == {
            "answers": "all", "on_empty_answer": "keep", "allow_missing": False, "on_bad_image": "stop", "val": "test"
        }  # fmt: skip
    assert [part.kinds for part in report.splits.values()] == [
        {"closed": 2, "open": 3},
        *[{"closed": 2, "open": 1}] * 2,
    ]
    text = report.render()
    assert text.splitlines()[0].split() == "vqa_vqa_rad images questions closed open words/question file".split()
    assert text.splitlines()[1].split()[:5] == ["train", "3", "5", "2", "3"]
    assert "Nothing was left out." in text and "The labels are the 6 different answers of train, val and test" in text
    assert "val has the questions of test, as in the original" in text
    assert "Of the 2 images of test, train has 1, too, and 1 of the same questions about them." in text


def test_labels_of_train_alone(vqa_rad, tmp_path):
    report = prepare_vqa_rad(vqa_rad, tmp_path / "out", answers="train")
    assert facts(tmp_path / "out")["classes"]["answer_labels"] == ["yes", "left side", "3", "no", "lobe upper"]
    assert facts(tmp_path / "out")["options"]["answers"] == "train"
    assert column(tmp_path / "out", "test", "answer_labels") == [[[0]], [[], [3]]]
    assert column(tmp_path / "out", "test", "answers") == [[["yes"]], [["silhouette"], ["no"]]]
    assert column(tmp_path / "out", "test", "answer_scores") == [[[1.0]], [[], [1.0]]]
    text = report.render()
    assert "The labels are the 5 different answers of train alone." in text
    assert (
        "count as answered wrongly: 1 of val, 1 of test (such as 'silhouette', testset.json, record 2 (qid 12))" in text
    )
    assert VqaDataset([tmp_path / "out/vqa_vqa_rad_test.arrow"]).answer_ids == [[0], [], [3]]


def test_validation_that_is_not_the_test_split(tmp_path):
    records = [rad(i, f"{i % 20}.jpg", f"What is {i}?", f"word{i}") for i in range(60)]
    source = write_rad(tmp_path / "rad", {"train": records, "test": rad_splits()["test"]})
    write_images(source / "images", [f"{i}.jpg" for i in range(20)])
    options = {"val": "train", "val_frac": 0.2, "seed": 3, "answers": "train"}
    report = prepare_vqa_rad(source, tmp_path / "a", **options)
    train, val = (set(column(tmp_path / "a", split, "image_id")) for split in ("train", "val"))
    assert len(train) == 16 and len(val) == 4 and not train & val
    assert sum(map(len, column(tmp_path / "a", "train", "questions"))) == 48
    assert column(tmp_path / "a", "val", "answer_labels") == [[[]] * 3] * 4  # its answers are not train's
    assert len(facts(tmp_path / "a", "val")["classes"]["answer_labels"]) == 48
    assert facts(tmp_path / "a")["options"].items() >= options.items()
    assert "val has the questions of training images, which train lacks." in report.render()
    prepare_vqa_rad(source, tmp_path / "b", **options)
    prepare_vqa_rad(source, tmp_path / "c", **options | {"seed": 4})
    for split in SPLITS:
        a, b, c = ((tmp_path / folder / f"vqa_vqa_rad_{split}.arrow").read_bytes() for folder in "abc")
        assert a == b and a != c
    with pytest.raises(UserError, match=r"val_frac must be greater than 0 to draw a validation split, got 0"):
        prepare_vqa_rad(source, tmp_path / "d", val="train", val_frac=0)
    with pytest.raises(UserError, match=r"together less than 1, got 1\.0 and 0"):
        prepare_vqa_rad(source, tmp_path / "d", val="train", val_frac=1.0)


def test_questions_come_back_as_a_batch(vqa_rad, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["prepare", "vqa-rad", str(vqa_rad.parent), str(out), "--answers", "train"]) == 0
    assert "vqa_vqa_rad" in capsys.readouterr().out
    assert main(["inspect", str(out / "vqa_vqa_rad_test.arrow")]) == 0
    printed = capsys.readouterr().out
    assert "answers=train" in printed and "val=test" in printed and "3 texts" in printed
    assert "answer_labels: 5 classes ('yes', 'left side', '3', 'no', 'lobe upper')" in printed
    data = VqaDataset([out / "vqa_vqa_rad_train.arrow", out / "vqa_vqa_rad_test.arrow"])
    batches = VqaBatches(data, TOKENIZER, make_transform("clip", SIZE), max_text_tokens=32)
    batch = batches[BatchRequest(0, 0, list(range(8)))]
    assert batch.texts[:2] == ["Is it clear?", "How many?"] and batch.question_ids == [1, 3, 2, 5, 4, 11, 12, 13]
    assert batch.answer_ids_BA.tolist() == [[0], [2], [1], [4], [3], [0], [-1], [3]]
    assert batch.answer_scores_BA.tolist() == [[1.0]] * 6 + [[0.0], [1.0]]
    assert batch.is_open_B.tolist() == [False, True, True, True, False, False, True, False]
    assert batch.image_BCHW.shape == (8, 3, SIZE, SIZE) and torch.equal(batch.image_BCHW[0], batch.image_BCHW[1])
    assert batch.item_ids[6] == "images/d.jpg" and batch.answers[6] == ["silhouette"] and not batch.bad_samples


def test_the_originals_way_of_reading(vqa_rad, tmp_path):
    prepare_vqa_rad(vqa_rad, tmp_path / "out")
    with pa.memory_map(str(tmp_path / "out/vqa_vqa_rad_train.arrow")) as source:
        table = pa.concat_tables([pa.ipc.RecordBatchFileReader(source).read_all()])
        assert table["answer_labels"][1][1].as_py() == [4] and table["answer_type"][0][0].as_py() == 0
        pytest.importorskip("pandas")
        frame = table.to_pandas()
        assert list(frame.columns) == list(VQA_COLUMNS) and len(frame) == 3


# What is left out or refused


def test_missing_images_are_all_named(vqa_rad, tmp_path):
    for name in ("b.jpg", "d.jpg"):
        (vqa_rad / "images" / name).unlink()
    message = r"lacks 2 of the 4 images that the questions name; --allow-missing .*: images/b\.jpg, images/d\.jpg\."
    with pytest.raises(UserError, match=message):
        prepare_vqa_rad(vqa_rad, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = prepare_vqa_rad(vqa_rad, tmp_path / "out", allow_missing=True)
    assert left_out(report) == {"the image file is missing": 2}
    assert "Questions about missing images, which are left out: 2 of train, 2 of val, 2 of test." in report.render()
    assert column(tmp_path / "out", "train", "answer_labels") == [[[0], [2]], [[3]]]  # labels of the whole release
    assert len(facts(tmp_path / "out")["classes"]["answer_labels"]) == 6
    assert facts(tmp_path / "out")["options"]["allow_missing"] is True


def test_images_that_cannot_be_decoded_stop_or_are_left_out(vqa_rad, tmp_path):
    write(vqa_rad / "images/d.jpg", "no image")
    with pytest.raises(UserError, match=r"d\.jpg: the image cannot be decoded"):
        prepare_vqa_rad(vqa_rad, tmp_path / "out")
    report = prepare_vqa_rad(vqa_rad, tmp_path / "out", on_bad_image="drop")
    assert left_out(report) == {"the image cannot be decoded": 2}  # of val and of test
    assert report.splits["test"].kinds == {"closed": 1, "open": 0}


def test_answers_without_a_word(vqa_rad, tmp_path):
    splits = rad_splits()
    splits["train"][1]["answer"] = " The "
    write_rad(vqa_rad, splits)
    report = prepare_vqa_rad(vqa_rad, tmp_path / "out")
    assert facts(tmp_path / "out")["classes"]["answer_labels"][:3] == ["yes", "", "3"]
    assert (
        "Answers without a word are a label, as in the original: 1 (trainset.json, record 2 (qid 2))" in report.render()
    )
    report = prepare_vqa_rad(vqa_rad, tmp_path / "out", on_empty_answer="drop")
    assert left_out(report) == {"question whose answer has no word": 1} and "record 2 (qid 2)" in report.render()
    assert "" not in facts(tmp_path / "out")["classes"]["answer_labels"]
    with pytest.raises(UserError, match=r"\S+trainset\.json, record 2 \(qid 2\): the answer ' The ' has no word"):
        prepare_vqa_rad(vqa_rad, tmp_path / "out", on_empty_answer="stop")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answer": None}, r"trainset\.json, record 3 \(qid 3\): 'answer' must be a text or a number, got None"),
        ({"answer": ["yes"]}, r"record 3 \(qid 3\): 'answer' must be a text or a number, got \['yes'\]"),
        ({"answer": float("nan")}, r"record 3 \(qid 3\): 'answer' must be a text or a number, got nan"),
        ({"answer_type": "YES/NO"}, r"record 3 \(qid 3\): 'answer_type' must be CLOSED or OPEN, got 'YES/NO'"),
        ({"answer_type": None}, r"record 3 \(qid 3\): 'answer_type' must be CLOSED or OPEN, got None"),
        ({"question": "  "}, r"record 3 \(qid 3\): 'question' must be a text, got '  '"),
        ({"image_name": 7}, r"record 3 \(qid 3\): 'image_name' must be a text, got 7"),
        ({"qid": "3"}, r"trainset\.json, record 3: 'qid' must be an integer, got '3'"),
        ({"qid": True}, r"record 3: 'qid' must be an integer, got True"),
        ({"qid": 1}, r"\S+trainset\.json, record 3 \(qid 1\): its id 1 is that of another .* images/a\.jpg, too "
                     r"\(trainset\.json, record 1 \(qid 1\)\); expected ids that differ"),
    ],
)  # fmt: skip
def test_damaged_question_is_located(vqa_rad, tmp_path, change, message):
    splits = rad_splits()
    splits["train"][2] |= change
    write_rad(vqa_rad, splits)
    with pytest.raises(UserError, match=message):
        prepare_vqa_rad(vqa_rad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ids_may_repeat_for_different_images(vqa_rad, tmp_path):
    splits = rad_splits()
    splits["train"][1]["qid"] = 1
    report = prepare_vqa_rad(write_rad(vqa_rad, splits), tmp_path / "out")
    assert (
        "the same id, 1 times (trainset.json, record 2 (qid 1) as trainset.json, record 1 (qid 1))" in report.render()
    )
    assert column(tmp_path / "out", "train", "question_id") == [[1, 3], [1, 5], [4]]


def test_files_that_are_no_questions(vqa_rad, tmp_path):
    def refused(message, text):
        write(vqa_rad / "trainset.json", text)
        with pytest.raises(UserError, match=message):
            prepare_vqa_rad(vqa_rad, tmp_path / "out")

    refused(r"trainset\.json is not valid JSON", "[{")
    refused(r"trainset\.json must be a JSON list of questions, got dict", "{}")
    refused(r"trainset\.json, record 1 must be a JSON object, got 3", "[3]")
    refused(r"record 1 lacks image_name, answer; its keys are qid, question, answer_type",
            '[{"qid": 1, "question": "x", "answer_type": "OPEN"}]')  # fmt: skip
    (vqa_rad / "trainset.json").unlink()
    (vqa_rad / "testset.json").unlink()
    with pytest.raises(UserError, match=r"lacks \S*trainset\.json, \S*testset\.json; expected VQA-RAD: trainset"):
        prepare_vqa_rad(vqa_rad, tmp_path / "out")
    with pytest.raises(UserError, match="nowhere does not exist; expected VQA-RAD"):
        prepare_vqa_rad(tmp_path / "nowhere", tmp_path / "out")
