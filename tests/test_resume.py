"""A run that stops goes on as if it never had: bit for bit on the CPU."""

import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch
from corpus import caption_rows
from runs import GPU_MODEL, losses, run, write_corpus
from safetensors.torch import load_file

from fastm3ae.cli import main
from fastm3ae.data.arrow import write_pairs
from fastm3ae.data.loader import Loader
from fastm3ae.training import pretrain
from fastm3ae.training.loop import Trainer
from fastm3ae.training.run_folder import RunFolder
from fastm3ae.training.saved import STATE_FILE, checkpoints, damage, newest_whole
from fastm3ae.training.step import OptimizerStep
from fastm3ae.weights.pretrained import read_about

# Checkpoints fall in the middle of epochs (3 batches) and of logged windows; two passes a step; dropout everywhere.
TRAIN = {"num_steps": 11, "log_every_steps": 4, "validate_every_steps": 5, "save_every_steps": 3, "micro_batch": 5,
         "keep_checkpoints": 2}  # fmt: skip


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, and an uninterrupted run on it."""
    folder = tmp_path_factory.mktemp("resume")
    write_corpus(folder)
    assert run(folder, output="whole", train=TRAIN) == 0
    return folder


def at_batch(monkeypatch, number, action):
    """Does something when a batch with this number (from 1) is fetched, once."""
    fetch, fetched = Trainer._next, [0]

    def _next(self, batches):
        fetched[0] += 1
        if fetched[0] == number:
            action()
        return fetch(self, batches)

    monkeypatch.setattr(Trainer, "_next", _next)


def kill():
    raise Killed


def weights(folder, output):
    return load_file(folder / output / "checkpoints" / "step_000011" / "model.safetensors")


def assert_as_uninterrupted(folder, output):
    assert losses(folder / output) == losses(folder / "whole")
    got, want = weights(folder, output), weights(folder, "whole")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    got, want = (json.loads((folder / name / "summary.json").read_text()) for name in (output, "whole"))
    for name in ("samples_per_s", "data_wait_frac", "wall_s"):
        del got[name], want[name]
    assert got == want
    best = [load_file(folder / name / "checkpoints" / "best" / "model.safetensors") for name in (output, "whole")]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])


@pytest.mark.parametrize(("batch", "workers"), [(1, 0), (3, 0), (5, 2), (7, 0), (11, 1)])
def test_killed_runs_go_on_bit_for_bit(folder, monkeypatch, batch, workers):
    output = f"killed_{batch}"
    with monkeypatch.context() as patch:
        at_batch(patch, batch, kill)
        with pytest.raises(Killed):
            run(folder, "--resume", "auto", output=output, train={**TRAIN, "num_workers": workers})
    torch.manual_seed(123)  # a new process starts with other random states
    assert run(folder, "--resume", "auto", output=output, train=TRAIN) == 0
    assert_as_uninterrupted(folder, output)


@pytest.mark.parametrize(
    ("number", "batch", "status"), [(signal.SIGINT, 2, 130), (signal.SIGTERM, 8, 143), (signal.SIGTERM, 1, 143)]
)
def test_signals_save_first(folder, monkeypatch, capsys, number, batch, status):
    output = f"stopped_{batch}"
    with monkeypatch.context() as patch:
        at_batch(patch, batch, lambda: os.kill(os.getpid(), number))
        assert run(folder, output=output, train=TRAIN) == status
    assert signal.getsignal(number) is not None and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    error = capsys.readouterr().err
    saved = [step for step, _ in checkpoints(folder / output / "checkpoints")]
    if batch == 1:
        assert "no step was made yet" in error and saved == []
    else:
        assert f"step {batch - 1} is saved; --resume auto goes on from it" in error and saved[-1] == batch - 1
    assert "Traceback" not in error and not (folder / output / "summary.json").exists()
    assert run(folder, "--resume", "auto", output=output, train=TRAIN) == 0
    assert_as_uninterrupted(folder, output)


@pytest.mark.parametrize(("number", "step"), [(1, 5), (3, 11)])
def test_a_signal_in_validation(folder, monkeypatch, number, step):
    """The validation is left, the step saved, and validated when the run goes on; it stands once in the metrics."""
    output, job = f"in_validation_{number}", pretrain.PRETRAINING
    count = [0]

    def validate_and_stop(*arguments):
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return job.validate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "PRETRAINING", dataclasses.replace(job, validate=validate_and_stop))
        assert run(folder, output=output, train=TRAIN) == 143
    assert step not in [step for step, split, *_ in losses(folder / output) if split == "val"]
    assert checkpoints(folder / output / "checkpoints")[-1][0] == step
    log = RunFolder.log

    def log_and_kill(run_folder, step, split, values):
        log(run_folder, step, split, values)
        kill()

    with monkeypatch.context() as patch, pytest.raises(Killed):  # after that validation, before another checkpoint
        patch.setattr(RunFolder, "log", log_and_kill)
        run(folder, "--resume", "auto", output=output, train=TRAIN)
    assert run(folder, "--resume", "auto", output=output, train=TRAIN) == 0
    assert_as_uninterrupted(folder, output)


def test_ctrl_c_while_the_loaders_end(folder, monkeypatch):
    """PyTorch ends them in a ``__del__``, which forgets what is raised there: it is raised afterwards."""

    class Ending:
        def __del__(self):
            for _ in range(2):  # the first one is noted, too late for any further step
                signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "close", lambda loader: Ending() and None)
        assert run(folder, output="at_the_end", train=TRAIN) == 130
    assert not (folder / "at_the_end" / "summary.json").exists()
    assert run(folder, "--resume", "auto", output="at_the_end", train=TRAIN) == 0
    assert_as_uninterrupted(folder, "at_the_end")


def test_resuming_what_is_complete_changes_nothing(folder):
    before = losses(folder / "whole")
    assert run(folder, "--resume", "auto", output="whole", train=TRAIN) == 0
    assert losses(folder / "whole") == before


def test_resuming_a_checkpoint_by_its_path(folder, capsys):
    (step, checkpoint), _ = checkpoints(folder / "whole" / "checkpoints")
    assert run(folder, "--resume", str(checkpoint), output="branch", train=TRAIN) == 0  # into a new folder
    assert losses(folder / "branch") == [line for line in losses(folder / "whole") if line[0] > step]
    for path, message in (
        (folder / "whole" / "checkpoints" / "step_000007", "There is no checkpoint"),
        (checkpoint, "is of another run than that in the run folder"),
        (folder / "whole", "checkpoint.json cannot be read"),
    ):
        assert run(folder, "--resume", str(path), output="branch", train=TRAIN) == 2
        assert message in capsys.readouterr().err


def test_what_a_run_started_from_may_be_gone(folder, monkeypatch):
    shutil.copytree(folder / "whole" / "checkpoints" / "best", folder / "origin")
    arguments = ["--init-from", str(folder / "origin"), "--resume", "auto"]
    with monkeypatch.context() as patch:
        at_batch(patch, 5, kill)
        with pytest.raises(Killed):
            run(folder, *arguments, output="from_origin", train=TRAIN)
    shutil.rmtree(folder / "origin")
    assert run(folder, *arguments, output="from_origin", train=TRAIN) == 0
    _, about = read_about(folder / "from_origin" / "checkpoints" / "step_000011")
    assert about["config"]["init_from"] == str(folder / "origin") and about["weights_were_random"]


def test_a_run_folder_that_is_none_is_left_alone(folder, capsys):
    (folder / "other").mkdir()
    (folder / "other" / "thesis.txt").write_text("precious")
    assert run(folder, "--resume", "auto", output="other", train=TRAIN) == 2
    assert "is not empty: choose another --output" in capsys.readouterr().err
    assert [path.name for path in (folder / "other").iterdir()] == ["thesis.txt"]
    (folder / "file").write_text("")
    assert run(folder, output="file/run", train=TRAIN) == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def test_a_read_only_run_folder(folder, capsys, monkeypatch):
    from pathlib import Path

    def refuse(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert run(folder, output="read_only", train=TRAIN) == 2
    assert "read_only cannot be written: Permission denied" in capsys.readouterr().err


@pytest.fixture
def stopped(folder, tmp_path, monkeypatch):
    """A run of its own, killed at step 8; checkpoints at 5 (the best until then) and 6."""
    for name in ("made_train.arrow", "made_val.arrow"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with monkeypatch.context() as patch:
        at_batch(patch, 9, kill)
        with pytest.raises(Killed):
            run(tmp_path, train=TRAIN)
    return tmp_path


DIFFERENCES = {
    "learning rate": (["--optim.learning-rate", "0.01"], "optim.learning_rate is 0.01, was 0.001"),
    "batch": (["--train.batch-size", "6"], "train.batch_size is 6, was 8"),
    "length": (["--train.num-steps", "9"], "train.num_steps is 9, was 11"),
    "seed": (["--seed", "3"], "seed is 3, was 0"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_another_configuration_is_refused_unless_forced(stopped, capsys, name):
    arguments, message = DIFFERENCES[name]
    assert run(stopped, "--resume", "auto", *arguments, train=TRAIN) == 2
    error = capsys.readouterr().err
    assert message in error and "--force-resume" in error and "Traceback" not in error
    assert run(stopped, "--resume", "auto", "--force-resume", *arguments, train=TRAIN) == 0
    assert f"Forced to go on although {message}" in capsys.readouterr().out


def test_another_model_cannot_be_forced(stopped, capsys):
    arguments = ["--resume", "auto", "--model.fusion.width", "64"]
    assert run(stopped, *arguments, train=TRAIN) == 2
    assert "model.fusion.width is 64, was 32" in capsys.readouterr().err
    assert run(stopped, *arguments, "--force-resume", train=TRAIN) == 2
    assert "of another architecture" in capsys.readouterr().err


def test_other_data_are_refused_unless_forced(stopped, capsys):
    rows = list(caption_rows(12, 100))
    rows[3]["caption"][0] += " more"
    write_pairs(stopped / "made_train.arrow", rows)
    assert run(stopped, "--resume", "auto", train=TRAIN) == 2
    assert "made_train.arrow does not hold what it held" in capsys.readouterr().err
    assert run(stopped, "--resume", "auto", "--force-resume", train=TRAIN) == 0


def test_data_may_move(stopped, folder):
    """Where the files lie does not matter, only what they hold."""
    for path in stopped.glob("*.arrow"):
        (stopped / "moved").mkdir(exist_ok=True)
        path.rename(stopped / "moved" / path.name)
    assert run(stopped, "--resume", "auto", "--data.root", str(stopped / "moved"), train=TRAIN) == 0
    assert losses(stopped / "run") == losses(folder / "whole")


def test_inspect_says_where_a_run_stands(stopped, folder, capsys):
    assert main(["inspect", str(stopped / "run")]) == 0
    text = capsys.readouterr().out
    assert "a run, not complete" in text and "last train: step 8" in text and "last val: step 5" in text
    assert text.count("  whole") == 2 and "weights alone" in text and "max_text_tokens: 24" in text
    assert main(["inspect", str(stopped / "made_train.arrow")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("texts, ids and image sizes")]
    assert line.split()[-1] in text  # the run knows its data by the same hash
    checkpoint = stopped / "run/checkpoints/step_000006"
    assert main(["inspect", str(checkpoint)]) == 0
    text = capsys.readouterr().out
    assert "6 steps were made, by 1 processes of 5 pairs a pass; the next batch is number 3 of epoch 1" in text
    assert f"model.safetensors: {(checkpoint / 'model.safetensors').stat().st_size:,} bytes" in text
    (checkpoint / STATE_FILE).write_bytes(b"")
    assert main(["inspect", str(checkpoint)]) == 0
    assert f"{STATE_FILE} has 0 of" in capsys.readouterr().out
    assert main(["inspect", str(folder / "whole")]) == 0
    assert "a run, complete" in capsys.readouterr().out


def test_a_truncated_checkpoint_is_passed_over(stopped, folder, capsys):
    newest, older = stopped / "run/checkpoints/step_000006", stopped / "run/checkpoints/step_000005"
    state = newest / STATE_FILE
    state.write_bytes(state.read_bytes()[:-100])
    assert run(stopped, "--resume", str(newest), train=TRAIN) == 2
    assert f"{STATE_FILE} has" in capsys.readouterr().err
    assert newest_whole(stopped / "run/checkpoints")[0] == older
    assert run(stopped, "--resume", "auto", train=TRAIN) == 0
    output = capsys.readouterr().out
    assert "step_000006 is damaged and passed over" in output and "going on from step_000005" in output
    assert losses(stopped / "run") == losses(folder / "whole")


def test_no_whole_checkpoint_is_no_reason_to_start_anew(stopped, capsys):
    for _, path in checkpoints(stopped / "run/checkpoints"):
        weights = bytearray((path / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (path / "model.safetensors").write_bytes(weights)
    assert run(stopped, "--resume", "auto", train=TRAIN) == 2
    error = capsys.readouterr().err
    assert "No checkpoint in" in error and "model.safetensors has another content than was written" in error


def test_damage_is_named(stopped):
    path = stopped / "run/checkpoints/step_000006"
    assert damage(path) is None
    (path / "model.safetensors").unlink()
    assert damage(path) == "model.safetensors cannot be read (No such file or directory)"
    (path / "checkpoint.json").write_text("{}")
    assert damage(path) == "checkpoint.json is damaged"


def test_a_full_device_is_one_sentence(folder, monkeypatch, capsys):
    def fail(step, pieces, totals):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(OptimizerStep, "__call__", fail)
    assert run(folder, output="full_device", train=TRAIN) == 2
    error = capsys.readouterr().err
    assert "The memory of cpu was full in step 1, with passes of 5 pairs: give a smaller --train.micro-batch" in error


def test_a_checkpoint_that_was_being_replaced_is_found(stopped, folder, capsys):
    path = stopped / "run/checkpoints/step_000006"
    path.rename(path.with_name(".step_000006.old"))
    assert run(stopped, "--resume", "auto", train=TRAIN) == 0
    assert "going on from step_000006" in capsys.readouterr().out
    assert losses(stopped / "run") == losses(folder / "whole")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_run_goes_on(folder, monkeypatch, precision):
    """Equal but for the order in which a GPU adds up; dropout draws the same, fp16 scales the same."""
    train = {**TRAIN, "device": "cuda", "precision": precision, "num_workers": 1}
    assert run(folder, output=f"{precision}_whole", train=train, model=GPU_MODEL) == 0
    with monkeypatch.context() as patch:
        at_batch(patch, 7, kill)
        with pytest.raises(Killed):
            run(folder, output=f"{precision}_killed", train=train, model=GPU_MODEL)
    torch.cuda.manual_seed(9)
    assert run(folder, "--resume", "auto", output=f"{precision}_killed", train=train, model=GPU_MODEL) == 0
    got, want = (losses(folder / f"{precision}_{name}") for name in ("killed", "whole"))
    for left, right in zip(got, want, strict=True):
        assert left[:2] == right[:2] and left[3:] == pytest.approx(right[3:], rel=1e-4 if precision == "fp32" else 2e-2)
