"""Several processes on the CPU (gloo) make the run that one process makes."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
import yaml
from corpus import caption_rows, pretrain_batches
from models import small_batch, small_model
from runs import NO_DROPOUT, TOKENIZER, command, losses, run
from safetensors.torch import load_file
from tasks_data import write_vqa

from fastm3ae.cli import main
from fastm3ae.data.arrow import write_pairs
from fastm3ae.data.loader import Loader, Place
from fastm3ae.errors import UserError
from fastm3ae.objectives import losses as objective_losses
from fastm3ae.objectives import total
from fastm3ae.training.distributed import Processes

# Shares of 3 and 4 pairs, the larger one in two passes; epochs of 3 batches.
TRAIN = {"num_steps": 20, "batch_size": 7, "micro_batch": 3, "log_every_steps": 1, "validate_every_steps": 10,
         "save_every_steps": 8, "keep_checkpoints": 9}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, one of its images corrupt, and the run of one process on it."""
    folder = tmp_path_factory.mktemp("distributed")
    write_pairs(folder / "made_train.arrow", caption_rows(12, 100, bad=[5]))
    write_pairs(folder / "made_val.arrow", caption_rows(7, 10))
    assert run(folder, output="one", **changes()) == 0
    return folder


def changes(**train):
    """Learning is slow, so that what grows is not the difference in rounding."""
    sections = {"model": NO_DROPOUT, "data": {"on_bad_sample": "skip"}, "optim": {"learning_rate": 1e-4}}
    return {**sections, "train": {**TRAIN, **train}}


def torchrun(arguments, num=2, **environment):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num)]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "fastm3ae", *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def assert_same_losses(got, want):
    for left, right in zip(got, want, strict=True):
        assert left[:2] == right[:2]
        assert left[3:] == pytest.approx(right[3:], rel=1e-6), left[:2]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one(folder, parallel):
    output = f"two_{parallel}"
    result = torchrun(command(folder, output=output, **changes(parallel=parallel, num_pictures=2)))
    assert result.returncode == 0, result.stderr[-2000:]
    assert_same_losses(losses(folder / output), losses(folder / "one"))
    one, two = (
        load_file(folder / name / "checkpoints" / "step_000020" / "model.safetensors") for name in ("one", output)
    )
    for name, tensor in one.items():  # also of those that no objective reads, which must not decay
        assert torch.allclose(two[name], tensor, rtol=1e-4, atol=2e-5), name
    one, two = (json.loads((folder / name / "summary.json").read_text()) for name in ("one", output))
    assert one["skipped_samples"] == two["skipped_samples"] and one["skipped_samples"]["train"] > 0
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    for name in ("mlm_accuracy", "mlm_accuracy_shuffled_image", "itm_accuracy", "score"):
        assert two[name] == pytest.approx(one[name], abs=1e-6)
    assert result.stdout.count("run folder") == 1  # one process speaks and writes


@pytest.mark.parametrize("begin", [1, 2])
def test_another_number_of_processes_goes_on(folder, capfd, begin):
    """Two processes go on with what one began, and one with what two began: with the same batches and masks."""
    end, output = 3 - begin, f"begun_by_{begin}"

    def go(num, *arguments, output=output):
        arguments = [*arguments, *([] if num == 2 else ["--train.num-workers", "0"])]
        if num == 1:
            return run(folder, *arguments, output=output, **changes())
        result = torchrun(command(folder, *arguments, output=output, **changes()))
        print(result.stdout)
        return result.returncode

    assert go(begin, "--train.num-steps", "8") == 0  # its schedule is another
    assert go(end, "--resume", "auto", "--force-resume") == 0
    assert f"{end} processes go on with what {begin} began" in capfd.readouterr().out
    checkpoint = folder / output / "checkpoints" / "step_000008"
    assert go(1, "--resume", str(checkpoint), "--force-resume", output=f"{output}_alone") == 0
    lines = [line for line in losses(folder / output) if line[0] > 8]
    assert len(lines) == 14  # twelve steps and two validations
    assert_same_losses(lines, losses(folder / f"{output}_alone"))


def test_two_processes_fine_tune_as_one(tmp_path):
    """They share the questions of each step and of each validation; the first one tests alone."""
    write_vqa(tmp_path)
    towers = {name: {**NO_DROPOUT[name], "weights": "random"} for name in ("vision", "text")}
    config = {
        "model": {**NO_DROPOUT, **towers},
        "data": {"root": str(tmp_path), "datasets": ["vqa_made"], "tokenizer": str(TOKENIZER), "max_text_tokens": 24},
        "optim": {"learning_rate": 1e-3, "head_lr_multiplier": 1.0, "fusion_lr_multiplier": 1.0},
        "train": {"num_steps": 6, "num_epochs": None, "batch_size": 7, "micro_batch": 3, "num_workers": 0,
                  "log_every_steps": 2, "validate_every_steps": 3, "validate_every_epochs": None,
                  "tensorboard": False, "device": "cpu"},
    }  # fmt: skip
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(config))
    arguments = ["finetune", "vqa", "--config", str(tmp_path / "task.yaml"), "--output"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    result = torchrun([*arguments, str(tmp_path / "two")])
    assert result.returncode == 0, result.stderr[-2000:]
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [line["split"] for line in one].count("val") == 2
    for left, right in zip(two, one, strict=True):
        assert left.pop("split") == right.pop("split")
        for clock in {"samples_per_s", "data_wait_frac"} & right.keys():
            del left[clock], right[clock]
        assert left == pytest.approx(right, rel=1e-5)
    one, two = (json.loads((tmp_path / name / "test" / "metrics.json").read_text()) for name in ("one", "two"))
    assert one["metrics"] == two["metrics"] and two["metrics"]["overall_accuracy"]["num_items"] == 16
    assert result.stdout.count("test_overall_accuracy") == 1


def test_sigterm_to_the_launcher_saves(folder):
    arguments = command(folder, "--resume", "auto", output="stopped", **changes(num_steps=20))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [sys.executable, *launcher, "-m", "fastm3ae", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics = folder / "stopped" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    process.terminate()
    _, error = process.communicate()
    assert process.returncode != 0
    assert "SIGTERM stopped the run: step" in error, error[-2000:]
    result = torchrun(arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    assert_same_losses(losses(folder / "stopped"), losses(folder / "one"))


def test_a_bad_sample_in_one_process_ends_all(folder):
    arguments = command(folder, output="bad", **changes())
    result = torchrun([*arguments, "--data.on-bad-sample", "stop"])
    assert result.returncode != 0 and "made_train.arrow, row 5" in result.stderr


def test_a_port_in_use_is_named(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        result = subprocess.run(
            [sys.executable, "-m", "fastm3ae", *command(folder, output="port", **changes())],
            capture_output=True, text=True, check=False, env={**os.environ, **environment},
        )  # fmt: skip
    assert result.returncode == 2 and f"port {port}: the port is in use" in result.stderr
    assert "Traceback" not in result.stderr


def test_several_processes_without_a_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="start them with torchrun"):
        Processes("cpu")


def test_a_batch_smaller_than_the_processes(folder):
    batches = pretrain_batches([folder / "made_train.arrow"])
    with pytest.raises(UserError, match="3 processes cannot share a batch of 2 pairs"):
        Loader(batches, batch_size=2, is_training=True, place=Place(num_ranks=3))


@pytest.mark.parametrize("num_pairs", [1, 2, 5, 7, 32, 257])
@pytest.mark.parametrize("micro_batch", [None, 1, 3, 32])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_pieces_cover_every_batch_once(num_pairs, micro_batch, num_ranks):
    places = [Place(micro_batch=micro_batch, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for is_training in (True, False):
        pieces = [place.pieces(num_pairs, is_training) for place in places]
        pairs = [pair for of_rank in pieces for piece in of_rank for pair in piece]
        assert pairs == list(range(num_pairs)) if is_training else sorted(pairs) == list(range(num_pairs))
        sizes = [len(piece) for of_rank in pieces for piece in of_rank]
        assert max(sizes) <= (micro_batch or num_pairs)
        if is_training and num_pairs >= num_ranks:
            shares = [sum(map(len, of_rank)) for of_rank in pieces]
            assert min(sizes) >= 1 and max(shares) - min(shares) <= 1


@pytest.mark.parametrize("objectives", [("mlm", "mim", "itm"), ("mlm", "itm"), ("itm",), ("mlm", "mim"), ("mim",)])
def test_image_text_matching_leaves_no_parameter_alone(objectives):
    """What decides whether the processes look for parameters without a gradient in each step."""
    model = small_model(objectives=objectives)
    batch = small_batch(model, "mlm")
    total(objective_losses(model(batch), batch, model.config)).backward()
    left_alone = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert bool(left_alone) == ("itm" not in objectives), left_alone
