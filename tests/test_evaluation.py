"""An evaluation's files: that they hold what was found, and replace an earlier evaluation's."""

import csv
import io
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fastm3ae.errors import UserError
from fastm3ae.tasks import evaluation as module
from fastm3ae.tasks.confusion import MAX_CLASSES, confusion_counts, confusion_png
from fastm3ae.tasks.evaluation import About, Evaluation, write_evaluation
from fastm3ae.tasks.metrics import Interval
from fastm3ae.visualize import case_sheet

FILES = {"metrics.json", "results.md", "predictions.csv", "predictions.jsonl", "confusion.png", "hardest.png"}
ABOUT = About(
    task="vqa",
    datasets=["vqa_vqa_rad"],
    split="test",
    options={},
    configuration={"seed": 3, "optim": {"learning_rate": 5e-6}},
    seed=3,
    checkpoint="runs/vqa/checkpoints/best",
    weights_were_random=True,
    fingerprints={"vqa_vqa_rad_test.arrow": "ab" * 32},
    preparation={"vqa_vqa_rad_test.arrow": {"answers": "train", "val": "patients"}},
    labels=["yes", "no", "être"],
    resampling_unit="image",
    environment={"fastm3ae": "0.1.0", "commit": "c0ffee", "libraries": {"torch": "2.10"}},
)
METRICS = {
    "overall_accuracy": Interval(2 / 3, 0.1, 1.0, 3, 2, 1000, 7, 0.9),
    "open_accuracy": Interval(0.5, None, None, 2, 1, 0, 0, 0.9),
    "auroc_a|b": Interval(None, None, None, 3, 2, 0, 0, 0.9),
}
TEXTS = ['a "b", c', "two\nlines", "two\r\nlines\rand more", " être, 肺; ", "'=1+1", "\u2028\t\\n", ""]
PREDICTIONS = [
    {"id": i, "text": text, "probability": 0.1 + i / 3, "is_open": i % 2 == 0, "rank": None}
    for i, text in enumerate(TEXTS)
] + [{"id": 99, "text": "1", "score": 1.0}]
CONFUSION = (["yes", "no", "no"], ["no", "no", "no"])
HARDEST = [(torch.zeros(3, 80, 100), ["worst"]), (torch.ones(3, 80, 100), ["bad", "", "by a little"])]


def whole(**changes):
    return Evaluation(
        **{"metrics": METRICS, "predictions": PREDICTIONS, "confusion": CONFUSION, "hardest": HARDEST,
           "notes": ["Two questions were left out."], **changes}
    )  # fmt: skip


def test_metrics_come_back_as_they_were(tmp_path):
    write_evaluation(whole(), tmp_path / "new" / "folder", ABOUT)
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == FILES
    content = json.loads((tmp_path / "new" / "folder" / "metrics.json").read_text(encoding="utf-8"))
    assert {name: Interval(**found) for name, found in content["metrics"].items()} == METRICS
    assert content["about"] == ABOUT and content["notes"] == ["Two questions were left out."]
    assert content["metrics"]["overall_accuracy"] == {
        "value": 2 / 3, "low": 0.1, "high": 1.0, "num_items": 3, "num_groups": 2, "num_resamples": 1000,
        "num_left_out": 7, "confidence": 0.9,
    }  # fmt: skip


def test_predictions_come_back_as_they_were(tmp_path):
    write_evaluation(whole(), tmp_path, ABOUT)
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert [json.loads(line) for line in lines] == PREDICTIONS
    assert "肺" in lines[3]
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "text", "probability", "is_open", "rank", "score"]
    assert [row["text"] for row in rows] == [*TEXTS, "1"]
    assert [float(row["probability"]) for row in rows[:-1]] == [row["probability"] for row in PREDICTIONS[:-1]]
    assert (
        rows[0]["is_open"] == "True" and rows[0]["rank"] == "" == rows[-1]["probability"] and rows[-1]["score"] == "1.0"
    )


def test_the_report_says_everything_that_matters(tmp_path):
    write_evaluation(whole(), tmp_path, ABOUT)
    lines = (tmp_path / "results.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# vqa on vqa_vqa_rad, test"
    for line in (
        "| metric | % | interval | items | groups (image) | resamples | left out |",
        "| overall_accuracy | 66.7 | 10.0 to 100.0 | 3 | 2 | 1000 | 7 |",
        "| open_accuracy | 50.0 | - | 2 | 1 | 0 | 0 |",
        "| auroc_a&#124;b | not defined | - | 3 | 2 | 0 | 0 |",
        "90 % intervals by 1,000 resamples of whole images; left out: those in which the metric is not defined.",
        "- Two questions were left out.",
        "- checkpoint: runs/vqa/checkpoints/best, from random weights",
        "- seed: 3",
        "- version: 0.1.0, commit c0ffee",
        f"- data vqa_vqa_rad_test.arrow: sha256 {'ab' * 32}",
        "- preparation of vqa_vqa_rad_test.arrow: answers=train, val=patients",
        "![confusion](confusion.png)",
        "![hardest](hardest.png)",
    ):
        assert line in lines, line
    assert any(line.startswith("- labels: 3, sha256 ") for line in lines)
    write_evaluation(whole(confusion=None, hardest=()), tmp_path, {**ABOUT, "weights_were_random": False, "labels": []})
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "random" not in text and "labels" not in text and "![" not in text


def test_an_earlier_evaluation_is_replaced_and_nothing_else(tmp_path):
    (tmp_path / "mine.txt").write_text("stays")
    write_evaluation(whole(), tmp_path, ABOUT)
    write_evaluation(whole(metrics={}, predictions=[], confusion=None, hardest=()), tmp_path, {**ABOUT, "seed": 4})
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"confusion.png", "hardest.png"} | {"mine.txt"}
    assert json.loads((tmp_path / "metrics.json").read_text())["about"]["seed"] == 4
    assert (tmp_path / "predictions.jsonl").read_text() == ""
    assert "no intervals" in (tmp_path / "results.md").read_text()


def test_what_fails_before_writing_changes_nothing(tmp_path):
    write_evaluation(whole(), tmp_path, ABOUT)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bad = [*PREDICTIONS[:2], {"id": 7, "text": "why?", "probability": float("nan")}]
    with pytest.raises(UserError, match=r"Prediction 2 \(id 7, text 'why\?'\) has the probability nan"):
        write_evaluation(whole(predictions=bad), tmp_path, ABOUT)
    with pytest.raises(TypeError):
        write_evaluation(whole(predictions=[{"id": torch.tensor(1)}]), tmp_path, ABOUT)
    with pytest.raises(ValueError, match="it lacks labels, split"):
        write_evaluation(whole(), tmp_path, {k: v for k, v in ABOUT.items() if k not in ("labels", "split")})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    write_evaluation(whole(), tmp_path, ABOUT)
    before = (tmp_path / "metrics.json").read_bytes()
    replaced = module.Path.replace

    def full_disk(path, target):
        if target.name == "metrics.json":
            raise OSError(28, "No space left on device")
        return replaced(path, target)

    monkeypatch.setattr(module.Path, "replace", full_disk)
    with pytest.raises(UserError, match=f"The folder {tmp_path} cannot be written: No space left on device."):
        write_evaluation(whole(notes=["new"]), tmp_path, ABOUT)
    assert {path.name for path in tmp_path.iterdir()} == FILES and (tmp_path / "metrics.json").read_bytes() == before


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written: File exists"):
        write_evaluation(whole(), tmp_path / "file", ABOUT)


def test_confusion_counts():
    names, counts = confusion_counts(["b", "a", "b", "b", "a"], ["b", "b", "c", "a", "a"])
    assert names == ["b", "a", "c"] and counts.tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]


def test_rare_classes_share_a_row():
    """Class number n is expected n + 1 times; the two rarest of 22 are also predicted for each other."""
    expected = [f"class {n:02d}" for n in range(MAX_CLASSES + 2) for _ in range(n + 1)]
    predicted = ["class 01", "class 00", "class 21", *expected[3:]]
    names, counts = confusion_counts(expected, predicted)
    assert names == [f"class {n:02d}" for n in range(MAX_CLASSES + 1, 1, -1)] + ["other (2 classes)"]
    want = np.diag([*range(MAX_CLASSES + 2, 2, -1), 2])
    want[-1, 0] = 1
    assert counts.tolist() == want.tolist() and counts.sum() == len(expected)
    assert confusion_counts(expected[3:], expected[3:])[0][-1] == "class 02"


def num_darkest(expected, predicted):
    """How many pixels of the picture are of the darkest blue: those of a cell that has its whole row."""
    with Image.open(io.BytesIO(confusion_png(expected, predicted))) as picture:
        return (np.array(picture.convert("RGB")) == (8, 48, 107)).all(axis=-1).sum()


def test_the_shade_of_a_cell_is_its_share_of_the_row():
    """Not of all items: a class of one item is as dark as one of nine. The digits on the cells cover little."""
    one = num_darkest(["a"] * 9 + ["b"] * 2, ["a"] * 9 + ["b", "a"])
    two = num_darkest(["a"] * 9 + ["b"], ["a"] * 9 + ["b"])
    assert one > 4000 and 1.9 < two / one < 2.1


def test_any_name_can_be_drawn():
    names = ["$x_1", "$x_1", "{\\frac", "a very long name of a class, which is " * 3, "", "two\nlines"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Image.open(io.BytesIO(confusion_png(names, names))) as picture:
            assert 400 < picture.width < 800


def test_the_sheet_of_cases_shows_each_image_beside_its_text():
    sheet = np.array(case_sheet(HARDEST))
    tile_height, tile_width = 160, 200  # 80 x 100, enlarged twice
    assert sheet.shape[0] == 2 * (tile_height + 6)
    assert not sheet[:tile_height, :tile_width].any()
    assert (sheet[tile_height + 6 : 2 * tile_height + 6, :tile_width] == 255).all()
    beside = [sheet[top : top + tile_height, tile_width + 6 :] for top in (0, tile_height + 6)]
    assert 0 < (beside[0] < 128).sum() < (beside[1] < 128).sum()
