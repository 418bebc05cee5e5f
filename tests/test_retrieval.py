"""Retrieval and zero-shot classification, whole runs of tiny models through the command."""

import csv
import json

import numpy as np
import pytest
import yaml
from corpus import png
from runs import MODEL, run, write_config, write_corpus
from tasks_data import write_captions, write_vqa
from test_finetune import metrics, refused

from fastm3ae.cli import main
from fastm3ae.data.arrow import IMAGE_LABEL_COLUMNS, write_pairs
from fastm3ae.tasks.retrieval import _image_rows, _ranks, _text_rows
from fastm3ae.tasks.search import Retrieval
from fastm3ae.tasks.zero_shot import _class_scores, _lack, read_prompts

MPMA = {
    "kind": "mpma",
    "vision": {**MODEL["vision"], "kind": "vit"},
    "text": MODEL["text"],
    "fusion": MODEL["fusion"],
    "num_slots": 4,
    "image": {"decoder_width": 32, "decoder_num_layers": 1, "decoder_num_heads": 2},
    "alignment": {"head_width": 32, "width": 16},
}
TASK = {
    "data": {"datasets": ["irtr_made"], "train_transform": "clip", "max_text_tokens": 24},
    "model": {"vision": {"image_size_px": 32}},
    "optim": {"learning_rate": 3e-3, "head_lr_multiplier": 1.0, "fusion_lr_multiplier": 1.0},
    "task": {"num_false_texts": 5, "num_recall_images": 6},
    "train": {"num_steps": 12, "num_epochs": None, "batch_size": 5, "num_workers": 0, "validate_every_steps": 6,
              "validate_every_epochs": None, "tensorboard": False, "device": "cpu"},
}  # fmt: skip
PROMPTS = {"dark": ["brain", "head"], "light": {"positive": ["chest"], "negative": ["axial"]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both models, pre-trained for two steps; captions; images with two classes."""
    folder = tmp_path_factory.mktemp("retrieval")
    write_corpus(folder)
    write_captions(folder)
    steps = {"num_steps": 2, "validate_every_steps": 2}
    assert run(folder, output="m3ae", train=steps) == 0
    config = yaml.safe_load(write_config(folder, data={"datasets": ["irtr_made"]}, train=steps).read_text())
    (folder / "mpma.yaml").write_text(yaml.safe_dump({**config, "model": MPMA}))
    towers = ["--model.vision.weights", "random", "--model.text.weights", "random"]
    arguments = ["--config", str(folder / "mpma.yaml"), "--output", str(folder / "mpma"), *towers]
    assert main(["pretrain", *arguments]) == 0
    rows = (
        {"image": png(20 + 200 * (i % 2)), "labels": [1 - i % 2, i % 2], "image_id": f"{i}.png", "split": "test"}
        for i in range(8)
    )
    facts = {"options": {}, "classes": {"labels": ["dark", "light"]}}
    write_pairs(folder / "classes_test.arrow", rows, IMAGE_LABEL_COLUMNS, facts)
    (folder / "prompts.yaml").write_text(yaml.safe_dump(PROMPTS))
    return folder


def checkpoint(folder, name):
    return str(folder / name / "checkpoints" / "best")


def evaluate(folder, name, *arguments, output="out"):
    fixed = ["--root", str(folder), "--output", str(folder / output), "--device", "cpu", "--num-workers", "0"]
    return main(["evaluate", checkpoint(folder, name), *fixed, *arguments])


def content(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_a_model_is_fine_tuned_and_tested(folder):
    config = {**TASK, "data": {**TASK["data"], "root": str(folder)}}
    (folder / "task.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(folder / "task.yaml"), "--init-from", checkpoint(folder, "m3ae")]
    assert main(["finetune", "retrieval", *arguments, "--output", str(folder / "tuned")]) == 0
    lines = [json.loads(line) for line in (folder / "tuned" / "metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if line["split"] == "val" and line["step"] == 12]
    assert last["recall_candidates"] == 6 and last["score"] == last["recall_at_1"]
    at_1 = last["image_to_text_recall_at_1"] + last["text_to_image_recall_at_1"]
    assert last["recall_at_1"] == pytest.approx(at_1 / 2) and 0 <= last["accuracy"] <= 1
    found = content(folder / "tuned" / "test")
    assert found["notes"] == ["10 images and 15 texts were searched."]
    assert found["metrics"].keys() == {
        f"{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)
    }
    assert found["metrics"]["image_to_text_recall_at_10"]["num_items"] == 10
    rows = list(csv.DictReader((folder / "tuned" / "test" / "predictions.csv").open(newline="")))
    assert [row["query"] for row in rows] == ["image"] * 10 + ["text"] * 15
    hits = np.mean([int(row["rank"]) <= 5 for row in rows[:10]])
    assert found["metrics"]["image_to_text_recall_at_5"]["value"] == pytest.approx(hits)
    assert evaluate(folder, "tuned") == 0 and metrics(folder / "out") == found["metrics"]


@pytest.mark.parametrize("name", ["m3ae", "mpma"])
def test_without_fine_tuning(folder, name):
    """By image-text matching, or by alignment."""
    dataset = ["--datasets", "irtr_made"]
    assert evaluate(folder, name, "--task", "retrieval", *dataset, output=f"{name}-out") == 0
    found = content(folder / f"{name}-out")
    assert found["metrics"]["text_to_image_recall_at_10"]["value"] == 1.0  # of ten images
    assert found["metrics"]["text_to_image_recall_at_1"]["num_groups"] == 10
    assert evaluate(folder, name, "--task", "retrieval", *dataset, "--max-images", "4", output="few") == 0
    few = content(folder / "few")
    assert few["notes"][0].startswith("4 images and 6 texts") and few["about"]["options"] == {"max_images": 4}


def test_preselection_is_said_to_be_inexact(folder):
    arguments = ["--task", "retrieval", "--datasets", "irtr_made"]
    chosen = ["--preselect-with", checkpoint(folder, "mpma"), "--num-preselected", "2"]
    assert evaluate(folder, "m3ae", *arguments, *chosen, output="some") == 0
    assert any(note.startswith("Not exact") for note in content(folder / "some")["notes"])
    assert evaluate(folder, "m3ae", *arguments, output="all") == 0
    everything = ["--preselect-with", checkpoint(folder, "mpma"), "--num-preselected", "99"]
    assert evaluate(folder, "m3ae", *arguments, *everything, output="whole") == 0
    assert metrics(folder / "whole") == metrics(folder / "all")


@pytest.mark.parametrize("name", ["m3ae", "mpma"])
def test_classes_by_prompts(folder, name):
    arguments = ["--task", "zero-shot", "--datasets", "classes", "--prompts", str(folder / "prompts.yaml")]
    assert evaluate(folder, name, *arguments, output=f"{name}-zero") == 0
    found = content(folder / f"{name}-zero")
    assert found["metrics"].keys() == {"mean_auroc", "auroc_dark", "auroc_light", "accuracy", "macro_f1"}
    assert found["about"]["task"] == "zero-shot" and found["about"]["labels"] == ["dark", "light"]
    assert "by 4 prompts" in found["notes"][0]
    # Images of one grey are equal, so that they are told apart perfectly or not at all.
    assert found["metrics"]["auroc_dark"]["value"] in (0.0, 0.5, 1.0)
    rows = list(csv.DictReader((folder / f"{name}-zero" / "predictions.csv").open(newline="")))
    assert len(rows) == 8 and rows[0]["score_dark"] == rows[2]["score_dark"] != rows[1]["score_dark"]


def test_scores_of_classes():
    """Means over the positive prompts, less those over the negative ones."""
    scores_IT = np.array([[1.0, 3.0, 5.0, 1.0], [0.0, 2.0, 4.0, 8.0]])
    groups = [(["a", "b"], []), (["c"], ["d"])]
    assert _class_scores(scores_IT, groups).tolist() == [[2.0, 4.0], [1.0, -4.0]]


def test_what_an_image_lacks():
    """How far its best class stands below the best that it has not; nothing if it is the best, or if it has none."""
    scores_IC = np.array([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [-1.0, -3.0, -2.0]])
    labels_IC = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 1, 0]])
    assert _lack(scores_IC, labels_IC).tolist() == [1.0, 0.0, 0.0, 2.0]


def test_ranks_by_hand():
    """Behind equals, but not behind other own ones."""
    scores = np.array([[3.0, 1.0, 2.0], [2.0, 2.0, 1.0], [1.0, 1.0, 1.0], [2.0, 1.0, 2.0]])
    assert _ranks(scores, [np.array([1, 2]), np.array([0]), np.array([0, 1, 2]), np.array([0, 1])]) == [2, 2, 1, 2]
    found = Retrieval(
        scores_IT=np.array([[1.0, 3.0, 2.0], [4.0, 2.0, 5.0]]), image_of_text_T=np.array([0, 0, 1]),
        image_ids=["a", "b"], texts=["x", "y", "z"], is_exact=True, bad_samples=[], ids_without_text=[],
    )  # fmt: skip
    assert [(row["expected"], row["predicted"], row["rank"]) for row in _image_rows(found)] == [
        ("y", "y", 1), ("z", "z", 1)
    ]  # fmt: skip
    assert [(row["expected"], row["predicted"], row["rank"]) for row in _text_rows(found)] == [
        ("a", "b", 2), ("a", "a", 1), ("b", "b", 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no classes; expected for each class a list"),
        ("a: []", "for the class 'a'"),
        ("a: word", "has 'word' for the class 'a'"),
        ("a: {positive: [x], neutral: [y]}", "for the class 'a'"),
        ("a: [x", "is not YAML"),
    ],
)
def test_bad_prompts(tmp_path, text, message):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(Exception, match=message) as error:
        read_prompts(tmp_path / "p.yaml")
    assert type(error.value).__name__ == "UserError"


def test_mistakes(folder, capsys):
    zero_shot = ["--task", "zero-shot", "--datasets", "classes"]
    assert "prompts must name a file" in refused(capsys, evaluate(folder, "m3ae", *zero_shot))
    (folder / "few.yaml").write_text("dark: [brain]\nlihgt: [chest]\n")
    status = evaluate(folder, "m3ae", *zero_shot, "--prompts", str(folder / "few.yaml"))
    assert "no prompts for the class 'light', but for dark, lihgt. Did you mean 'lihgt'" in refused(capsys, status)
    status = evaluate(folder, "m3ae", "--task", "retrieval", "--preselect-with", checkpoint(folder, "m3ae"),
                      "--datasets", "irtr_made")  # fmt: skip
    assert "preselect_with must be an MPMA's checkpoint" in refused(capsys, status)
    rows = [{"image": b"x", "labels": [1, 0], "image_id": "0.png", "split": "test"}]
    write_pairs(folder / "bad_test.arrow", rows, IMAGE_LABEL_COLUMNS, {"classes": {"labels": ["dark", "light"]}})
    bad = ["--task", "zero-shot", "--datasets", "bad", "--prompts", str(folder / "prompts.yaml"), "--on-bad-sample"]
    for name in ("m3ae", "mpma"):
        assert "None of the 1 images can be used" in refused(capsys, evaluate(folder, name, *bad, "skip"))
    write_vqa(folder)
    arguments = ["--data.root", str(folder), "--data.datasets", "irtr_made", "--output", str(folder / "no")]
    status = main(["finetune", "retrieval", "--init-from", checkpoint(folder, "mpma"), *arguments])
    assert "evaluate" in refused(capsys, status)
