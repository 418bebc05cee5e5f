"""Whole runs of a tiny model, through the command."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from corpus import caption_rows
from PIL import Image
from runs import NO_DROPOUT, losses, run, write_corpus
from safetensors.torch import load_file

from fastm3ae.cli import main
from fastm3ae.config.presets import preset
from fastm3ae.data.arrow import write_pairs
from fastm3ae.errors import UserError
from fastm3ae.training.run import check_device
from fastm3ae.weights.pretrained import read_about


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path)
    return tmp_path


def test_a_run_leaves_everything_behind(corpus):
    assert run(corpus, "--train.tensorboard") == 0
    folder = corpus / "run"
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("mlm_accuracy", "mlm_accuracy_shuffled_image", "itm_accuracy", "mim_loss", "mim_loss_patch_mean"):
        assert isinstance(summary[name], float)
    assert summary["steps"] == 6 and summary["train_pairs"] == 24 and summary["val_pairs"] == 13
    assert 0 <= summary["data_wait_frac"] <= 1 and summary["samples_per_s"] > 0
    steps = [(step, split) for step, split, *_ in losses(folder)]
    assert steps == [
        (1, "train"),
        (2, "train"),
        (3, "train"),
        (3, "val"),
        (4, "train"),
        (5, "train"),
        (6, "train"),
        (6, "val"),
    ]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["best", "step_000004", "step_000006"]
    for step in (3, 6):
        assert Image.open(folder / "pictures" / f"reconstructions_{step:06d}.png").size[0] > 400
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["model"]["text"]["vocab_size"] == 60 and resolved["data"]["datasets"] == ["made"]
    assert "torch" in json.loads((folder / "environment.json").read_text())["libraries"]
    assert any((folder / "tensorboard").iterdir())
    _, about = read_about(folder / "checkpoints" / "step_000004")
    assert (about["step"], about["validated_step"]) == (4, 3) and about["validation"].keys() <= summary.keys()


def test_the_same_seed_gives_the_same_run_for_any_number_of_workers(corpus):
    for output, workers in (("a", 0), ("b", 0), ("c", 2)):
        assert run(corpus, "--train.num-workers", str(workers), output=output) == 0
    assert run(corpus, "--seed", "1", output="d") == 0
    first, again, workers, other = (losses(corpus / name) for name in "abcd")
    assert first == again == workers
    assert first != other
    states = [load_file(corpus / name / "checkpoints/step_000006/model.safetensors") for name in "ac"]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_passes_add_up_to_the_whole_batch(corpus, micro_batch):
    """Pieces of a batch have different numbers of masked tokens; losses and weights are those of the whole batch."""
    assert run(corpus, "--train.micro-batch", "auto", output="whole", model=NO_DROPOUT) == 0
    assert run(corpus, "--train.micro-batch", str(micro_batch), output="pieces", model=NO_DROPOUT) == 0
    for got, want in zip(losses(corpus / "pieces"), losses(corpus / "whole"), strict=True):
        assert got[:2] == want[:2] and got[3:] == pytest.approx(want[3:], rel=1e-5)


def test_starting_from_a_checkpoint(corpus, capsys):
    assert run(corpus) == 0
    checkpoint = corpus / "run" / "checkpoints" / "step_000006"
    assert run(corpus, "--init-from", str(checkpoint), output="second") == 0
    first = [line for line in losses(corpus / "second") if line[1] == "train"][0]
    start = [line for line in losses(corpus / "run") if line[1] == "train"][0]
    assert first[3] < start[3]  # it knows the texts already
    assert main(["inspect", str(checkpoint)]) == 0
    assert "mim_decoder" in capsys.readouterr().out
    assert main(["inspect", str(corpus / "run")]) == 0
    assert "== summary.json" in capsys.readouterr().out


def bad_corpus(corpus):
    rows = list(caption_rows(12, 100, bad=[2]))
    write_pairs(corpus / "made_train.arrow", rows)


def test_a_corrupt_image_stops_the_run_with_file_row_and_id(corpus, capsys):
    bad_corpus(corpus)
    assert run(corpus) == 2
    error = capsys.readouterr().err
    assert "made_train.arrow, row 2 (image_id 'img/102.png')" in error and "Traceback" not in error


def test_a_corrupt_image_is_skipped_and_counted(corpus, capsys):
    bad_corpus(corpus)
    assert run(corpus, "--data.on-bad-sample", "skip", "--train.num-workers", "1") == 0
    summary = json.loads((corpus / "run" / "summary.json").read_text())
    assert summary["skipped_samples"]["train"] >= 3  # three texts of one image, in each of two epochs
    assert "bad samples skipped; the first: " in capsys.readouterr().out


def test_accuracy_under_a_shuffled_image_uses_the_text_as_it_was(corpus):
    """A model that ignores images (its fusion reads none) scores the same with any image."""
    from contextlib import nullcontext

    from models import small_batch, small_model

    from fastm3ae.training.distributed import Processes
    from fastm3ae.training.validation import validate

    model = small_model()
    for layer in model.fusion.text_layers:
        torch.nn.init.zeros_(layer.cross_out.weight)
    batches = [small_batch(model, "mlm", seed=seed) for seed in range(3)]
    metrics = validate(model, batches, nullcontext, Processes("cpu"))
    assert metrics["mlm_accuracy"] == metrics["mlm_accuracy_shuffled_image"]
    assert metrics["mim_loss_patch_mean"] == pytest.approx(767 / 768, abs=1e-3)
    assert model.training


MISTAKES = {
    "missing data": (["--data.root", "/nowhere"], "nowhere"),
    "missing data set": (["--data.datasets", "mad"], "Did you mean 'made_train.arrow'"),
    "missing tokenizer": (["--data.tokenizer", "./no-tokenizer"], "no-tokenizer"),
    "image size": (["--model.vision.image-size-px", "40"], "multiple of model.vision.patch_size_px"),
    "swin with mim": (["--model.vision.kind", "swin", "--model.vision.patch-size-px", "4"], "Swin"),
    "an objective with labels": (["--model.objectives", "mlm", "vqa", "--model.num-answers", "3"], "names 'vqa'"),
    "two normalisations": (["--data.train-transform", "imagenet"], "must normalise alike"),
    "unknown device": (["--train.device", "gpu"], "device must be auto"),
    "too long texts": (["--data.max-text-tokens", "64"], "data.max_text_tokens is 64"),
    "missing checkpoint": (["--init-from", "nothing.ckpt"], "nothing.ckpt: there is no such checkpoint file"),
    "too large a batch": (["--train.batch-size", "100"], "100 pairs"),
    "unknown tower": (["--model.vision.weights", "vit_nothing"], "vit_nothing"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_one_sentence(corpus, capsys, name):
    arguments, message = MISTAKES[name]
    assert run(corpus, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1


def test_more_mistakes_in_files(corpus, capsys):
    assert run(corpus) == 0
    assert run(corpus) == 2  # the folder holds a run
    assert "is not empty" in capsys.readouterr().err
    write_pairs(corpus / "made_val.arrow", [])
    assert run(corpus, output="b") == 2
    assert "made_val.arrow" in capsys.readouterr().err
    (corpus / "made_val.arrow").write_bytes(b"ARROW1\0\0 and nothing more")
    assert run(corpus, output="c") == 2
    assert "made_val.arrow" in capsys.readouterr().err


def test_the_command_as_a_process(tmp_path):
    """No traceback, exit status 2, and help at once, without importing torch."""

    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "fastm3ae", *arguments],
            capture_output=True, text=True, cwd=tmp_path, env=os.environ,
        )  # fmt: skip

    result = command("--help")
    assert result.returncode == 0 and "pretrain" in result.stdout
    assert " torch\n" not in result.stderr
    result = command("pretrian")
    assert result.returncode == 2 and "Did you mean 'pretrain'" in result.stderr
    result = command("pretrain", "--preset", "demo", "--optim.learning-rat", "1")
    assert result.returncode == 2 and "--optim.learning-rate" in result.stdout + result.stderr
    (tmp_path / "bad.yaml").write_text("optim:\n  learning_rat: 1\n")
    result = command("pretrain", "--config", "bad.yaml")
    assert result.returncode == 2 and "Did you mean 'learning_rate'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_reader_that_has_enough(corpus):
    """As in `fastm3ae inspect FILE | head -1`."""
    command = [sys.executable, "-m", "fastm3ae", "inspect", str(corpus / "made_train.arrow")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


def test_own_images_from_a_table_to_a_run(tmp_path, capsys):
    lines = ["file,report,split"]
    for row in caption_rows(16, 50):
        name = Path(row["image_id"]).name
        (tmp_path / name).write_bytes(row["image"])
        lines.append(f"{name},{row['caption'][0]},{'val' if len(lines) > 12 else 'train'}")
    (tmp_path / "reports.csv").write_text("\n".join(lines))
    arguments = ["--image-column", "file", "--text-columns", "report", "--split-column", "split", "--name", "made"]
    assert main(["prepare", "csv", str(tmp_path / "reports.csv"), str(tmp_path), *arguments]) == 0
    assert "made_train.arrow" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "made_train.arrow")]) == 0
    assert "12 images" in capsys.readouterr().out
    assert run(tmp_path) == 0
    assert main(["prepare", "csv", str(tmp_path / "missing.csv"), str(tmp_path)]) == 2
    assert "missing.csv" in capsys.readouterr().err


def test_heads_that_the_gpu_kernel_does_not_take_are_refused():
    config = preset("demo")
    gpu = SimpleNamespace(device=torch.device("cuda"), number=1)
    check_device(config, gpu)
    fusion = dataclasses.replace(config.model.fusion, num_heads=8)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, fusion=fusion))
    with pytest.raises(UserError, match="model.fusion has heads of width 16; on a GPU the packed step takes 32 or 64"):
        check_device(config, gpu)
    check_device(dataclasses.replace(config, train=dataclasses.replace(config.train, step="original")), gpu)


def test_a_compiled_step_needs_a_compiler(monkeypatch):
    config = preset("demo")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, compiled=True))
    cpu = SimpleNamespace(device=torch.device("cpu"), number=1)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", sys.executable)
    check_device(config, cpu)
    monkeypatch.delenv("CXX")
    with pytest.raises(UserError, match="train.compiled needs a C\\+\\+ compiler, but there is none of g"):
        check_device(config, cpu)


@pytest.mark.parametrize(("device", "number"), [("cpu", 1), ("cuda", 2)])
def test_cuda_graphs_need_one_process_on_a_gpu(device, number):
    config = preset("demo")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, cuda_graphs=True))
    with pytest.raises(UserError, match=f"train.cuda_graphs works in one process on a GPU, got {number} on {device}"):
        check_device(config, SimpleNamespace(device=torch.device(device), number=number))
