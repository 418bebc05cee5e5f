"""Fine-tuning once for each of several seeds, and runs that are stopped or cannot be tested."""

import json
import os
import signal

import pytest
from runs import run, write_corpus
from tasks_data import write_vqa
from test_finetune import finetune, refused

from fastm3ae.training.loop import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pre-trained model, and questions with and without a test split."""
    folder = tmp_path_factory.mktemp("seeds")
    write_corpus(folder)
    write_vqa(folder)
    write_vqa(folder, splits=("train", "val"), name="vqa_untested")
    assert run(folder, output="pretrained", train={"num_steps": 2, "validate_every_steps": 2}) == 0
    return folder


def test_seeds_make_a_table(folder, capsys):
    assert finetune(folder, "vqa", "--seeds", "1", "2", output="seeds", train={"num_steps": 10}) == 0
    table = (folder / "seeds" / "results.md").read_text()
    assert table in capsys.readouterr().out and "±" in table
    content = json.loads((folder / "seeds" / "results.json").read_text())
    assert "vqa_made_test.arrow" in json.dumps(content) and (folder / "seeds" / "seed_2" / "test").is_dir()


def test_interrupted_seeds_go_on(folder, capsys, monkeypatch):
    """By the same command, which makes no run twice; one of another configuration is no part of the table."""

    def go(*arguments):
        seeds = ["--seeds", "1", "2", *arguments]
        return finetune(folder, "vqa", *seeds, output="stopped_seeds", train={"num_steps": 12, "save_every_steps": 4})

    with monkeypatch.context() as changed:
        changed.setattr(Trainer, "_try_step", stopped_at(6, seed=2))
        assert go() == 128 + signal.SIGINT
    tested = folder / "stopped_seeds" / "seed_1" / "test" / "metrics.json"
    before = tested.stat().st_mtime_ns
    capsys.readouterr()
    assert go() == 0 and tested.stat().st_mtime_ns == before
    assert "seed_2: going on from step_000006" in capsys.readouterr().out
    assert "over seeds" in (folder / "stopped_seeds" / "results.md").read_text()
    message = refused(capsys, go("--optim.weight-decay", "0.5"))
    assert "seed_1 cannot go on as it was: optim.weight_decay is 0.5, was 0.01" in message


def stopped_at(step, seed=0):
    """Trainer's own method for a step, but that Ctrl-C comes in one of them."""
    make = Trainer._try_step

    def stop(self, pieces, totals):
        if self.step + 1 == step and self.config.seed == seed:
            os.kill(os.getpid(), signal.SIGINT)
        return make(self, pieces, totals)

    return stop


def test_a_stop_before_a_validation(folder, capsys, monkeypatch):
    """Nothing is validated any more; the step is saved, and its validation is made when the run goes on."""
    changes = {"output": "stopped", "train": {"num_steps": 20}}
    with monkeypatch.context() as changed:
        changed.setattr(Trainer, "_try_step", stopped_at(10))
        assert finetune(folder, "vqa", **changes) == 128 + signal.SIGINT
    assert "step 10 is saved" in capsys.readouterr().err
    assert finetune(folder, "vqa", "--resume", "auto", **changes) == 0
    lines = [json.loads(line) for line in (folder / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "val"] == [10, 20]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1", "1"], "--seeds must name different seeds, got 1 1"),
        (["--seeds", "1", "-2"], "seed must be at least 0 and less than 2**63, got -2"),
        (["--seeds", "1", "--task.no-test"], "--seeds compares tests"),
        (["--seeds", "1", "--resume", "x"], "--resume cannot be x"),
        (["--seeds", "1", "--data.datasets", "vqa_untested"], "There is no vqa_untested_test.arrow"),
    ],
)
def test_seeds_that_cannot_be(folder, capsys, arguments, message):
    """Before the first of them is begun."""
    assert message in refused(capsys, finetune(folder, "vqa", *arguments, output="no_seeds"))
    assert not (folder / "no_seeds").exists()


def test_no_test_is_said(folder, capsys):
    short = {"num_steps": 1, "validate_every_steps": 1}
    assert finetune(folder, "vqa", "--data.datasets", "vqa_untested", output="untested", train=short) == 0
    assert f"not tested: there is no {folder / 'vqa_untested_test.arrow'}" in capsys.readouterr().out
