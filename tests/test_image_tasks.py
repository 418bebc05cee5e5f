"""Fine-tuning and evaluation of images without texts, through the command, on made-up radiographs."""

import csv
import dataclasses
import json
import shutil

import image_models
import mpma_models
import numpy as np
import pytest
import torch
from image_models import png, write_radiographs
from models import small_model
from PIL import Image
from safetensors.torch import load_file

from fastm3ae.cli import main
from fastm3ae.config import FinetuneConfig, ImageConfig, TaskConfig
from fastm3ae.config.presets import FINETUNE_PRESETS, preset
from fastm3ae.data.arrow import IMAGE_LABEL_COLUMNS, write_pairs
from fastm3ae.errors import UserError
from fastm3ae.tasks.registry import make_task
from fastm3ae.tasks.task import NUM_HARDEST
from fastm3ae.training.finetune import start_from
from fastm3ae.visualize import draw_outline
from fastm3ae.weights.pretrained import save_weights

TRAIN = [
    "--train.device", "cpu", "--train.num-workers", "0", "--train.no-tensorboard", "--train.batch-size", "16",
    "--optim.learning-rate", "1e-3", "--optim.head-lr-multiplier", "3",
]  # fmt: skip
TOWER = [
    "--model.vision.weights", "random", "--model.vision.image-size-px", "32", "--model.vision.patch-size-px", "8",
    "--model.vision.width", "64", "--model.vision.num-blocks", "1", "--model.decoder-widths", "32", "16",
]  # fmt: skip


def command(folder, task, *options, output="run", epochs=20, tower=TOWER):
    """The arguments of a short run on the corpus in a folder."""
    data = ["--data.root", str(folder), "--data.datasets", "made", "--output", str(folder / output)]
    length = ["--train.num-epochs", str(epochs), "--train.validate-every-epochs", str(epochs / 2)]
    return ["finetune", task, *data, *TRAIN, *length, *tower, *options]


def metrics(folder):
    return {
        name: found["value"] for name, found in json.loads((folder / "metrics.json").read_text())["metrics"].items()
    }


def complaint(capsys, arguments):
    """What the command says of a user's mistake."""
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err


def checkpoint_of(model, folder, **about):
    folder.mkdir()
    save_weights(model.state_dict(), model.config, folder, about)
    return folder


def test_classes_are_learnt_and_evaluate_repeats_the_test(tmp_path):
    write_radiographs(tmp_path)
    assert main(command(tmp_path, "image-classification", "--data.train-transform", "imagenet")) == 0
    run = tmp_path / "run"
    tested = metrics(run / "test")
    assert set(tested) == {"mean_auroc", "auroc_left", "auroc_right"} and tested["mean_auroc"] > 0.8
    best = run / "checkpoints" / "best"
    assert {path.name for path in best.iterdir()} == {"model.safetensors"}  # there is no tokenizer
    assert main(["evaluate", str(best), "--output", str(tmp_path / "again"), "--device", "cpu"]) == 0
    assert metrics(tmp_path / "again") == tested
    about = json.loads((tmp_path / "again" / "metrics.json").read_text())["about"]
    assert about["labels"] == ["left", "right"] and about["resampling_unit"] == "patient"
    assert about["weights_were_random"] and about["task"] == "image_classification"
    with (tmp_path / "again" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert list(rows[0]) == ["image_id", "expected", "loss", "probability_left", "probability_right"]
    assert {row["expected"] for row in rows} == {"", "left", "right", "left; right"}
    assert all(0 <= float(row["probability_left"]) <= 1 for row in rows)
    assert not (tmp_path / "again" / "confusion.png").exists()
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"image_classification_loss", "image_classification_accuracy"} <= logged[0].keys()


def test_pixels_are_learnt_and_evaluate_repeats_the_test(tmp_path):
    write_radiographs(tmp_path, has_masks=True, patients=False)
    assert main(command(tmp_path, "segmentation", "--task.no-freeze-towers")) == 0
    tested = metrics(tmp_path / "run" / "test")
    with (tmp_path / "run" / "test" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    nothing = np.mean([float(row["expected_frac"]) == 0 for row in rows])  # what finding nothing is worth
    assert tested["dice_not_empty"] > 0.6 and tested["dice"] > nothing + 0.3
    assert np.mean([float(row["dice"]) for row in rows]) == pytest.approx(tested["dice"])
    best = tmp_path / "run" / "checkpoints" / "best"
    assert main(["evaluate", str(best), "--output", str(tmp_path / "again"), "--device", "cpu"]) == 0
    assert metrics(tmp_path / "again") == tested
    content = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert content["about"]["resampling_unit"] == "image"
    assert content["notes"] == ["Dice is that of squares of 32 pixels, to which images and masks were resized."]
    colours = {colour for _, colour in Image.open(tmp_path / "again" / "hardest.png").getcolors(2**20)}
    assert {(0, 255, 51), (255, 51, 26)} <= colours


@pytest.mark.parametrize("task", ["image-classification", "segmentation"])
def test_a_frozen_tower_stays_as_the_checkpoint_has_it(tmp_path, task):
    write_radiographs(tmp_path, has_masks=True)
    source = small_model(dtype=torch.float32)
    checkpoint = checkpoint_of(source, tmp_path / "m3ae")
    options = ["--init-from", str(checkpoint), "--task.freeze-towers", "--task.train-frac", "0.5"]
    size = ["--model.vision.image-size-px", "64", "--model.decoder-widths", "8"]
    assert main(command(tmp_path, task, *options, *size, epochs=2, tower=())) == 0
    trained = load_file(tmp_path / "run" / "checkpoints" / "best" / "model.safetensors")
    for name, value in source.vision.state_dict().items():
        assert torch.equal(trained[f"vision.{name}"], value), name
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["train_pairs"] == 24 and summary["steps"] == 2
    assert {name.split(".")[0] for name in trained} == {"vision", f"{task.replace('-', '_')}_head"}


def test_the_tower_and_its_normalisation_come_from_the_checkpoint(tmp_path):
    config = preset("nih", FINETUNE_PRESETS["image-classification"])
    m3ae = checkpoint_of(
        small_model(dtype=torch.float32), tmp_path / "m3ae", config={"data": {"val_transform": "clip"}}
    )
    mpma = checkpoint_of(
        mpma_models.small_model(dtype=torch.float32), tmp_path / "mpma", config={"data": {"val_transform": "imagenet"}}
    )
    for checkpoint, kind, transforms in (
        (m3ae, "clip", ("clip_resizedcrop", "clip")),
        (mpma, "vit", ("imagenet_resizedcrop", "imagenet")),
    ):
        started = start_from(config, str(checkpoint))
        assert (started.data.train_transform, started.data.val_transform) == transforms
        vision = started.model.vision
        assert (vision.kind, vision.width, vision.num_blocks) == (kind, 64, 2)
        assert (vision.image_size_px, vision.weights, started.init_from) == (224, "random", str(checkpoint))
        assert started.model.kind == "image" and started.data.tokenizer == config.data.tokenizer
    back = start_from(dataclasses.replace(config, data=dataclasses.replace(
        config.data, train_transform="clip", val_transform="clip")), str(mpma))  # fmt: skip
    assert (back.data.train_transform, back.data.val_transform) == ("imagenet", "imagenet")


def test_texts_cannot_start_from_a_model_without_any(tmp_path):
    checkpoint_of(image_models.small_model(dtype=torch.float32), tmp_path / "x")
    with pytest.raises(UserError, match="x has no language tower, so that vqa cannot start from it"):
        start_from(preset("vqa-rad", FINETUNE_PRESETS["vqa"]), str(tmp_path / "x"))


@pytest.mark.parametrize("task", ["image-classification", "segmentation"])
def test_the_presets_name_a_task_that_there_is(task):
    for make in FINETUNE_PRESETS[task].values():
        config = make()
        assert config.task.kind == task.replace("-", "_") and not config.model.has_texts
        assert config.model.vision.image_size_px == 224 and config.task.freeze_towers == (task == "segmentation")


def test_labels_that_differ_are_refused_with_both(tmp_path, capsys):
    write_radiographs(tmp_path, sizes={"train": 16, "val": 4})
    write_radiographs(tmp_path, sizes={"test": 4}, classes=("left", "middle"))
    said = complaint(capsys, command(tmp_path, "image-classification"))
    assert "made_test.arrow has other labels than made_train.arrow, 2 and 2: 1 is 'middle', there 'right'" in said
    write_radiographs(tmp_path, sizes={"test": 4})
    assert main(command(tmp_path, "image-classification", "--task.no-test", epochs=2)) == 0
    write_radiographs(tmp_path, sizes={"test": 4}, classes=("right", "left"))
    best = tmp_path / "run" / "checkpoints" / "best"
    said = complaint(capsys, ["evaluate", str(best), "--output", str(tmp_path / "again"), "--device", "cpu"])
    assert "made_test.arrow has other labels than the model, 2 and 2: 0 is 'right', there 'left'" in said


def test_masks_that_are_missing_are_refused(tmp_path, capsys):
    write_radiographs(tmp_path, sizes={"train": 16, "val": 4})
    said = complaint(capsys, command(tmp_path, "segmentation"))
    assert "made_train.arrow has no column 'mask', which segmentation needs" in said


def test_a_validation_split_without_both_values_of_any_class_is_refused(tmp_path, capsys):
    write_radiographs(tmp_path, sizes={"train": 16})
    row = {"image": png(np.zeros((8, 8))), "labels": [0, 1], "split": "val"}
    rows = [row | {"image_id": str(number)} for number in range(3)]
    write_pairs(tmp_path / "made_val.arrow", rows, IMAGE_LABEL_COLUMNS, {"classes": {"labels": ["left", "right"]}})
    said = complaint(capsys, command(tmp_path, "image-classification", epochs=2))
    assert "mean_auroc, which chooses the best checkpoint, is not defined for the validation split" in said


def test_classes_without_an_auroc_are_named(tmp_path):
    write_radiographs(tmp_path)
    config = FinetuneConfig(task=TaskConfig(kind="image_classification"), model=ImageConfig())
    data = dataclasses.replace(config.data, root=str(tmp_path), datasets=("made",))
    task = make_task(dataclasses.replace(config, data=data))
    items = [
        {
            "pair": i,
            "image_id": str(i),
            "group": str(i),
            "probability": [0.9, i / 20],
            "expected": [1, i % 2],
            "loss": i,
        }
        for i in range(20)
    ]
    asked = []

    def square(pair):
        asked.append(pair)
        return torch.zeros(3, 8, 8)

    found = task.evaluation(items, square, num_resamples=5)
    assert found.notes == ["All images or none have left: no AUROC, and no part in the mean."]
    assert found.metrics["auroc_left"].value is None and found.metrics["mean_auroc"].value is not None
    # Wrong are odd ones up to 10 and even ones above, which lie on the other side of a half.
    assert asked == [18, 16, 14, 12, 9, 7, 5, 3, 1] and len(asked) < NUM_HARDEST
    assert found.hardest[0][1] == ["18", "expected: left", "right: 0.90, expected 0", "left: 0.90, expected 1"]


def test_outline():
    inside = torch.zeros(5, 6, dtype=torch.bool)
    inside[1:4, 1:5] = True
    drawn = draw_outline(torch.zeros(3, 5, 6), inside, (1.0, 0.5, 0.0))
    expected = inside.clone()
    expected[2, 2:4] = False
    assert torch.equal(drawn[0] == 1, expected) and torch.equal(drawn[1] == 0.5, expected) and not drawn[2].any()
    whole = draw_outline(torch.zeros(3, 4, 4), torch.ones(4, 4, dtype=torch.bool), (1.0, 1.0, 1.0))
    assert whole[0].sum() == 12  # at the image's edge, too


def test_a_run_goes_on_where_it_stopped(tmp_path):
    write_radiographs(tmp_path)
    options = ["--train.save-every-steps", "2", "--train.keep-checkpoints", "9", "--task.no-test"]
    assert main(command(tmp_path, "image-classification", *options, output="whole", epochs=2)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (3, 4, 6):  # 3 validated best
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step_{step:06d}")
    resumed = command(tmp_path, "image-classification", *options, "--resume", "auto", output="cut", epochs=2)
    assert main(resumed) == 0 and (tmp_path / "cut" / "environment_000002.json").is_file()
    whole, again = (
        load_file(tmp_path / run / "checkpoints" / "step_000006" / "model.safetensors") for run in ("whole", "cut")
    )
    assert all(torch.equal(again[name], whole[name]) for name in whole)
