"""Fine-tuning and evaluation, whole runs of a tiny model through the command."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from runs import GPU_MODEL, MODEL, TOKENIZER, run, write_corpus
from safetensors.torch import load_file
from tasks_data import ANSWERS, write_classes, write_vqa

from fastm3ae.cli import main
from fastm3ae.config import DataConfig, FinetuneConfig, TaskConfig
from fastm3ae.data.arrow import ArrowTable
from fastm3ae.model.build import build_model
from fastm3ae.tasks.labels import LabelledTask
from fastm3ae.tasks.registry import make_task
from fastm3ae.weights.pretrained import load_model, read_about, save_weights

TRAIN = {"num_steps": 30, "num_epochs": None, "batch_size": 8, "num_workers": 0, "log_every_steps": 10,
         "validate_every_steps": 10, "validate_every_epochs": None, "save_every_steps": 10, "tensorboard": False,
         "device": "cpu"}  # fmt: skip
DATASETS = {"vqa": "vqa_made", "classification": "cls_made"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pre-trained model, the data of the tasks, and a run of each task from it."""
    folder = tmp_path_factory.mktemp("finetune")
    write_corpus(folder)
    write_vqa(folder)
    write_classes(folder)
    assert run(folder, output="pretrained", train={"num_steps": 2, "validate_every_steps": 2}) == 0
    for task in DATASETS:
        assert finetune(folder, task) == 0
    return folder


def finetune(folder, task, *arguments, output=None, from_scratch=False, **changes):
    config = {
        "data": {"root": str(folder), "datasets": [DATASETS[task]], "train_transform": "clip", "max_text_tokens": 24},
        "model": {"vision": {"image_size_px": 32}},
        "optim": {"learning_rate": 3e-3, "head_lr_multiplier": 1.0, "fusion_lr_multiplier": 1.0},
        "train": TRAIN,
    }
    for section, values in changes.items():
        config[section] = {**config.get(section, {}), **values}
    path = folder / f"{task}.yaml"
    path.write_text(yaml.safe_dump(config))
    start = [] if "--init-from" in arguments else ["--init-from", str(folder / "pretrained" / "checkpoints" / "best")]
    return main(
        ["finetune", task, "--config", str(path), "--output", str(folder / (output or task)), *start, *arguments]
    )


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())["metrics"]


@pytest.mark.parametrize(("task", "score"), [("vqa", "closed_accuracy"), ("classification", "accuracy")])
def test_a_task_is_learnt_and_tested(folder, task, score):
    output = folder / task
    summary = json.loads((output / "summary.json").read_text())
    found = metrics(output / "test")
    assert found[score]["value"] > 0.8 and summary["best_score"] >= summary["score"]
    assert found[score]["low"] <= found[score]["value"] <= found[score]["high"]
    names = {path.name for path in (output / "test").iterdir()}
    assert {"metrics.json", "results.md", "predictions.csv", "predictions.jsonl", "confusion.png"} <= names
    rows = list(csv.DictReader((output / "test" / "predictions.csv").open(newline="")))
    assert len(rows) == 16 and rows[0]["expected"] in {*ANSWERS, "chest", "head"}
    assert sum(float(row["score"]) for row in rows) / 16 == pytest.approx(
        found["overall_accuracy" if task == "vqa" else "accuracy"]["value"]
    )


def test_the_checkpoint_knows_its_task(folder):
    config, about = read_about(folder / "vqa" / "checkpoints" / "best")
    assert config.objectives == ("vqa",) and config.num_answers == 4
    assert about["labels"] == ANSWERS and about["majority"]["closed"] in (0, 1) and about["weights_were_random"]
    assert about["config"]["task"]["kind"] == "vqa" and about["fingerprints"].keys() >= {"vqa_made_train.arrow"}
    assert (folder / "vqa" / "checkpoints" / "best" / "tokenizer.json").is_file()


def test_evaluate_repeats_the_test(folder, tmp_path, capsys):
    """Also of another folder, in another order of batches."""
    shutil.copytree(folder / "vqa" / "checkpoints" / "best", tmp_path / "model")
    arguments = ["--root", str(folder), "--output", str(tmp_path / "out"), "--device", "cpu", "--num-workers", "0"]
    assert main(["evaluate", str(tmp_path / "model"), "--batch-size", "5", *arguments]) == 0
    assert metrics(tmp_path / "out") == metrics(folder / "vqa" / "test")
    assert "overall_accuracy" in capsys.readouterr().out
    again = ["--split", "val", "--num-resamples", "7", *arguments]
    assert main(["evaluate", str(tmp_path / "model" / "model.safetensors"), "--tokenizer", str(TOKENIZER), *again]) == 0
    about = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert about["about"]["split"] == "val" and about["metrics"]["overall_accuracy"]["num_resamples"] == 7


def test_another_tokenizer_is_said(folder, tmp_path):
    tokens = (TOKENIZER / "vocab.txt").read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join([*tokens[:-2], tokens[-1], tokens[-2]]) + "\n")
    arguments = [
        "--tokenizer",
        str(tmp_path),
        "--device",
        "cpu",
        "--num-workers",
        "0",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(["evaluate", str(folder / "vqa" / "checkpoints" / "best"), *arguments]) == 0
    notes = json.loads((tmp_path / "out" / "metrics.json").read_text())["notes"]
    assert notes == [f"The tokenizer {tmp_path} is another one than the model was trained with."]
    assert json.loads((folder / "vqa" / "test" / "metrics.json").read_text())["notes"] == []


def test_a_folder_that_cannot_be_written_is_said_at_once(folder, capsys, monkeypatch):
    monkeypatch.setattr(LabelledTask, "evaluate", None)  # is not reached
    arguments = ["--device", "cpu", "--output", str(folder / "config.yaml" / "results")]
    status = main(["evaluate", str(folder / "vqa" / "checkpoints" / "best"), *arguments])
    assert "config.yaml/results cannot be written: Not a directory" in refused(capsys, status)


def test_inspect_names_the_task_and_its_labels(folder, capsys):
    for path in (
        folder / "vqa" / "checkpoints" / "best",
        folder / "vqa" / "checkpoints" / "step_000030",
        folder / "vqa",
    ):
        assert main(["inspect", str(path)]) == 0
        assert "fine-tuned for vqa on vqa_made\n4 labels: yes, no, left, right\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_a_folder_of_checkpoints(folder, capsys, command):
    path = folder / "vqa" if command == "evaluate" else folder / "vqa" / "checkpoints"
    message = refused(capsys, main([command, str(path)]))
    assert f"{path} is no checkpoint, but holds some: {folder / 'vqa' / 'checkpoints' / 'best'}, " in message


def test_the_pretrained_weights_are_the_start(folder):
    """With a learning rate of 0 all but the new head stays as it was."""
    assert finetune(folder, "vqa", output="still", optim={"learning_rate": 1e-30}, train={"num_steps": 1}) == 0
    before = load_file(folder / "pretrained" / "checkpoints" / "best" / "model.safetensors")
    after = load_file(folder / "still" / "checkpoints" / "best" / "model.safetensors")
    shared = before.keys() & after.keys()
    assert all(torch.equal(before[name], after[name]) for name in shared)
    assert {name.split(".")[0] for name in after.keys() - shared} == {"vqa_head"}


def test_a_model_of_other_labels_is_a_start(folder, tmp_path, capsys):
    """All but its head, whose labels mean something else."""
    write_vqa(tmp_path, [*ANSWERS, "both"])
    start = folder / "vqa" / "checkpoints" / "best"
    changes = {"optim": {"learning_rate": 1e-30}, "train": {"num_steps": 1}}
    assert finetune(tmp_path, "vqa", "--init-from", str(start), **changes) == 0
    said = capsys.readouterr().out
    assert f"{start}: new: vqa_head\n" in said and f"{start}: ignored: vqa_head (6 tensors)\n" in said
    before, after = (
        load_file(path / "model.safetensors") for path in (start, tmp_path / "vqa" / "checkpoints" / "best")
    )
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if not name.startswith("vqa_head."))
    assert after["vqa_head.3.weight"].shape[0] == 5


def test_frozen_towers_keep_their_weights(folder):
    assert finetune(folder, "vqa", "--task.freeze-towers", output="frozen", train={"num_steps": 3}) == 0
    before = load_file(folder / "pretrained" / "checkpoints" / "best" / "model.safetensors")
    after = load_file(folder / "frozen" / "checkpoints" / "best" / "model.safetensors")
    same = {name: torch.equal(before[name], after[name]) for name in before.keys() & after.keys()}
    towers = {name for name in same if name.startswith(("vision.", "text."))}
    assert all(same[name] for name in towers) and not all(same[name] for name in same.keys() - towers)


def test_frozen_parts_stay_in_evaluation_mode():
    from models import small_model

    model = small_model(objectives=("vqa",))
    model.freeze("text")
    model.train()
    assert not model.text.training and model.vision.training
    model.eval().train()
    assert not any(module.training for module in model.text.modules())


def test_a_run_goes_on(folder):
    """Killed runs resume: the task is the same."""
    assert finetune(folder, "classification", output="half", train={"num_steps": 20}) == 0
    command = ["--resume", "auto", "--force-resume"]
    assert finetune(folder, "classification", *command, output="half") == 0
    lines = [json.loads(line) for line in (folder / "half" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "val"] == [10, 20, 30]


def test_patience_ends_a_run(folder):
    """With a learning rate of almost 0 nothing gets better after the first validation."""
    changes = {"optim": {"learning_rate": 1e-30}, "train": {"patience": 2, "validate_every_steps": 3}}
    assert finetune(folder, "classification", output="patient", **changes) == 0
    summary = json.loads((folder / "patient" / "summary.json").read_text())
    assert summary["steps"] == 9
    assert finetune(folder, "classification", "--resume", "auto", output="patient", **changes) == 0
    assert json.loads((folder / "patient" / "summary.json").read_text())["steps"] == 9


def test_a_fraction_of_the_images(folder, tmp_path):
    task = make_task(FinetuneConfig(task=TaskConfig(train_frac=0.25), data=data_of(folder)))
    drawn = task._drawn(task.dataset("train"))
    assert len(drawn) == 6 and set(drawn // 2) == set(drawn[::2] // 2)  # both questions of 3 of 12 images
    other = make_task(FinetuneConfig(task=TaskConfig(train_frac=0.25), data=data_of(folder), seed=1))
    assert list(other._drawn(other.dataset("train"))) != list(drawn)


def data_of(folder, dataset="vqa_made", **changes):
    return DataConfig(root=str(folder), datasets=(dataset,), **changes)


def test_labels_of_files_that_say_nothing(tmp_path):
    """The original's files: a label's name is the word beside it, over all splits; gaps get a number."""
    write_vqa(tmp_path, with_facts=False)
    task = make_task(FinetuneConfig(data=data_of(tmp_path)))
    assert task.labels == tuple(ANSWERS)
    write_classes(tmp_path, with_facts=False)
    task = make_task(FinetuneConfig(task=TaskConfig(kind="classification"), data=data_of(tmp_path, "cls_made")))
    assert task.labels == ("label 0", "label 1")


def refused(capsys, status):
    error = capsys.readouterr().err
    assert status == 2 and "Traceback" not in error
    return error.strip().splitlines()[-1]


def test_other_labels_are_refused(folder, tmp_path, capsys):
    """Between a checkpoint and data, between splits, and by number where nothing is said."""
    checkpoint = str(folder / "vqa" / "checkpoints" / "best")
    write_vqa(tmp_path, [*ANSWERS[::-1], "both"])
    status = main(["evaluate", checkpoint, "--root", str(tmp_path), "--device", "cpu"])
    message = refused(capsys, status)
    assert "vqa_made_test.arrow has other labels than the model, 5 and 4: 0 is 'right', there 'yes'" in message
    write_vqa(tmp_path, ["maybe", *ANSWERS], with_facts=False)
    message = refused(capsys, main(["evaluate", checkpoint, "--root", str(tmp_path), "--device", "cpu"]))
    assert "vqa_made_test.arrow has" in message and "the model" in message
    write_vqa(tmp_path)
    write_vqa(tmp_path, ANSWERS[::-1], splits=("val",))
    start = str(folder / "pretrained" / "checkpoints" / "best")
    message = refused(capsys, finetune(tmp_path, "vqa", "--init-from", start))
    assert "vqa_made_val.arrow has other labels than vqa_made_train.arrow" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune"], None),
        (["finetune", "segmentaton"], "is not one of vqa"),
        (["finetune", "vqa", "--preset", "vqa-rda"], "Did you mean 'vqa-rad'"),
        (["finetune", "vqa", "--init-from", "nowhere"], "nowhere: there is no such checkpoint file"),
        (["evaluate", "nowhere"], "nowhere: there is no such checkpoint file"),
    ],
)
def test_mistakes(arguments, message, capsys):
    if message is None:
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        assert "classification" in capsys.readouterr().out
    else:
        assert message in refused(capsys, main(arguments))


def test_the_configuration_of_another_task(folder, capsys):
    status = main(["finetune", "classification", "--config", str(folder / "vqa" / "config.yaml")])
    assert "the configuration is of the task vqa; fastm3ae finetune vqa takes it" in refused(capsys, status)


def test_options_of_other_tasks(folder, capsys):
    status = main(["evaluate", str(folder / "vqa" / "checkpoints" / "best"), "--max-images", "3", "--device", "cpu"])
    assert "max_images is for retrieval and zero-shot, not for vqa" in refused(capsys, status)


def test_a_checkpoint_without_a_task(folder, capsys):
    status = main(["evaluate", str(folder / "pretrained" / "checkpoints" / "best")])
    assert "was not fine-tuned for a task" in refused(capsys, status)


def test_a_question_whose_answer_is_no_label(folder, tmp_path):
    """It counts as answered wrongly, and that is said."""
    write_vqa(tmp_path, ["yes", "no"])
    assert finetune(tmp_path, "vqa", "--init-from", str(folder / "pretrained" / "checkpoints" / "best")) == 0
    content = json.loads((tmp_path / "vqa" / "test" / "metrics.json").read_text())
    assert content["notes"] == ["8 questions have no answer among the labels; they count as answered wrongly."]
    assert content["metrics"]["open_accuracy"]["value"] == 0


def test_the_original_lines(folder, tmp_path, capsys, monkeypatch):
    """Fine-tuning, and then testing what came out, from an official checkpoint."""
    monkeypatch.chdir(tmp_path)
    model = load_model(folder / "pretrained" / "checkpoints" / "best")
    assert main(["convert", str(folder / "pretrained" / "checkpoints" / "best"), "m3ae.ckpt"]) == 0
    sizes = "hidden_size=32 num_top_layer=2 num_heads=2 image_size=32 vit=ViT-B/16"
    ours = [f"model.vision.width={model.config.vision.width}", "model.vision.num_blocks=1", "model.mim.layer=1",
            *(f"model.text.{key}={value}" for key, value in MODEL["text"].items())]  # fmt: skip
    ours += [f"model.mim.{key}={value}" for key, value in MODEL["mim"].items() if key != "layer"]
    line = (
        f"data_root={folder} num_gpus=0 num_nodes=1 task_finetune_vqa_vqa_rad per_gpu_batchsize=4 clip16 {sizes} "
        f"tokenizer={TOKENIZER} batch_size=8 max_epoch=2 num_workers=0 max_text_len=24 datasets=['vqa_made']"
    ).split()
    line += [*ours, "model.text.weights=random", "model.vision.weights=random", "train.tensorboard=False"]
    assert main(["with", *line, "load_path=m3ae.ckpt", "output=run"]) == 0
    assert Path("run/test/metrics.json").is_file()
    assert main(["convert", "run/checkpoints/best", "finetuned.ckpt"]) == 0
    capsys.readouterr()
    assert main(["with", *line, "load_path=finetuned.ckpt", "test_only=True", "output=tested"]) == 0
    assert metrics(Path("tested")) == metrics(Path("run/test"))
    assert main(["with", *line, "load_path=run/checkpoints/best", "test_only=True", "output=again"]) == 0
    assert metrics(Path("again")) == metrics(Path("tested"))
    write_vqa(tmp_path, ANSWERS[::-1])
    line = [f"data_root={tmp_path}" if word.startswith("data_root=") else word for word in line]
    capsys.readouterr()
    status = main(["with", *line, "load_path=run/checkpoints/best", "test_only=True", "output=other"])
    assert "vqa_made_test.arrow has other labels than the model" in refused(capsys, status)


def test_a_swin_is_fine_tuned(folder):
    """A model without a checkpoint starts from its towers."""
    vision = {"kind": "swin", "image_size_px": 64, "patch_size_px": 4, "width": 32, "swin_num_blocks": [1, 1],
              "swin_num_heads": [1, 2], "weights": "random"}  # fmt: skip
    model = {**MODEL, "vision": vision, "text": {**MODEL["text"], "weights": "random"}, "objectives": ["itm"]}
    config = {"model": model, "train": {**TRAIN, "num_steps": 2, "validate_every_steps": 2},
              "data": {"root": str(folder), "datasets": ["cls_made"], "tokenizer": str(TOKENIZER),
                       "max_text_tokens": 24}}  # fmt: skip
    (folder / "swin.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(folder / "swin.yaml"), "--output", str(folder / "swin")]
    assert main(["finetune", "classification", *arguments]) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu(folder, precision):
    """A task is learnt there, and evaluating on the CPU finds nearly the same probabilities."""
    towers = {tower: {**GPU_MODEL[tower], "weights": "random"} for tower in ("vision", "text")}
    train = {"device": "cuda", "precision": precision, "num_steps": 60}
    config = {"model": GPU_MODEL | towers, "data": {"tokenizer": str(TOKENIZER)}, "train": train}
    name = f"gpu_{precision}"
    assert finetune(folder, "classification", from_scratch=True, output=name, **config) == 0
    assert metrics(folder / name / "test")["accuracy"]["value"] > 0.8
    arguments = ["--device", "cpu", "--output", str(folder / name / "cpu"), "--num-workers", "0"]
    assert main(["evaluate", str(folder / name / "checkpoints" / "best"), *arguments]) == 0
    here, there = (
        [json.loads(line) for line in (folder / name / where / "predictions.jsonl").read_text().splitlines()]
        for where in ("cpu", "test")
    )
    assert [row["predicted"] for row in here] == [row["predicted"] for row in there]
    probabilities = ([row["probability"] for row in rows] for rows in (here, there))
    assert next(probabilities) == pytest.approx(next(probabilities), abs=1e-4 if precision == "fp32" else 0.05)


def test_facts_reach_the_results(folder):
    about = json.loads((folder / "vqa" / "test" / "metrics.json").read_text())["about"]
    table = ArrowTable([folder / "vqa_made_test.arrow"])
    assert about["preparation"] == {"vqa_made_test.arrow": table.facts()["vqa_made_test.arrow"]["options"]}
    assert about["labels"] == ANSWERS and about["task"] == "vqa" and about["seed"] == 0


def test_weights_of_others_are_remembered(folder, tmp_path):
    model = load_model(folder / "pretrained" / "checkpoints" / "best")
    save_weights(build_model(model.config).state_dict(), model.config, tmp_path)  # says nothing of its origin
    status = finetune(folder, "vqa", "--init-from", str(tmp_path), "--data.tokenizer", str(TOKENIZER), output="others",
                      train={"num_steps": 1})  # fmt: skip
    assert status == 0
    about = json.loads((folder / "others" / "test" / "metrics.json").read_text())["about"]
    assert about["weights_were_random"] is False
