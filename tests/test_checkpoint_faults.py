"""Checkpoints that cannot be written or read, which of several a run goes on from, and what torchrun starts again."""

import json
import threading

import pytest
from full_disk import full_disk
from models import small_model
from runs import losses, run, write_corpus

from fastm3ae.cli import main
from fastm3ae.config import PretrainConfig
from fastm3ae.errors import UserError
from fastm3ae.training import checkpoint
from fastm3ae.training import saved as saved_files
from fastm3ae.training.checkpoint import Checkpointer
from fastm3ae.training.distributed import Processes
from fastm3ae.training.loop import Trainer
from fastm3ae.training.resume import find_checkpoint
from fastm3ae.training.run_folder import RunFolder
from fastm3ae.training.saved import checkpoints, damage, newest_whole

TRAIN = {"num_steps": 5, "save_every_steps": 2, "validate_every_steps": 5, "log_every_steps": 2}


@pytest.fixture
def model():
    return small_model(objectives=("mlm",))


@pytest.fixture
def checkpointer(tmp_path):
    return Checkpointer(tmp_path / "checkpoints", Processes("cpu"), keep=3)


def save(checkpointer, model, *steps, is_best=False):
    for step in steps:
        checkpointer.save(step, model.config, model.state_dict(), {}, {}, {"step": step}, is_best)
        checkpointer.wait()


def saved(checkpointer):
    return [step for step, _ in checkpoints(checkpointer.folder)]


def test_one_failure_is_overcome_and_two_are_not(checkpointer, model, capsys):
    save(checkpointer, model, 1)
    with full_disk():
        save(checkpointer, model, 2)
    save(checkpointer, model, 3)
    with full_disk():
        save(checkpointer, model, 4, 5)
        with pytest.raises(UserError, match="The checkpoint of step 5 could not be written to"):
            save(checkpointer, model, 6)
    assert saved(checkpointer) == [1, 3]
    assert capsys.readouterr().out.count("warning: The checkpoint of step") == 3


def test_no_best_weights_get_lost(checkpointer, model):
    """No later checkpoint has them, and a later one would say that they were saved."""
    save(checkpointer, model, 1, is_best=True)
    with full_disk():
        save(checkpointer, model, 2, is_best=True)
    with pytest.raises(UserError, match="The checkpoint of step 2 could not be written to"):
        save(checkpointer, model, 3)
    assert saved(checkpointer) == [1]


@pytest.mark.parametrize("error", [OSError(), OSError(28, "No space left on device")], ids=["mute", "full"])
def test_a_failure_that_cannot_be_said_is_not_waited_for(checkpointer, model, monkeypatch, error):
    """The log is on the full disk, too; the error has no words."""

    def fail(*arguments):
        raise error

    monkeypatch.setattr(checkpoint, "save_weights", fail)
    monkeypatch.setattr(checkpoint.tqdm, "write", fail)
    waiting = threading.Thread(target=save, args=(checkpointer, model, 1), daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()
    with pytest.raises(UserError, match=r"could not be written to .* \(.*OSError\(\)|No space left on device"):
        checkpointer.close()


def test_a_disk_that_cannot_be_read_is_named(checkpointer, model, monkeypatch):
    save(checkpointer, model, 1)

    def fail(path):
        raise OSError(5, "Input/output error")  # as a failing read says it, without the file

    monkeypatch.setattr(saved_files, "size_and_hash", fail)
    assert damage(checkpointer.folder / "step_000001") == "model.safetensors cannot be read (Input/output error)"


@pytest.mark.parametrize("killed_at", ["the first file", "the renaming"])
def test_a_removal_that_was_killed_is_finished_at_the_next_start(checkpointer, model, monkeypatch, killed_at):
    save(checkpointer, model, 1, 2, 3)
    with monkeypatch.context() as patch:
        if killed_at == "the renaming":
            rename = checkpoint.os.replace
            patch.setattr("os.replace", lambda path, to: None if path.name == "step_000001" else rename(path, to))
        patch.setattr("shutil.rmtree", lambda path, **_: [file.unlink() for file in path.glob("checkpoint.json")])
        save(checkpointer, model, 4)
    assert all(damage(path) is None for _, path in checkpoints(checkpointer.folder))
    later = Checkpointer(checkpointer.folder, Processes("cpu"), keep=3, step=4)
    assert saved(later) == [2, 3, 4] and not list(later.folder.glob(".*"))


def test_damaged_checkpoints_do_not_count_among_those_that_are_kept(checkpointer, model):
    save(checkpointer, model, 1, 4, 9)
    (checkpointer.folder / "step_000009" / "checkpoint.json").write_text("")
    path, _ = newest_whole(checkpointer.folder)
    assert path.name == "step_000004"
    later = Checkpointer(checkpointer.folder, Processes("cpu"), keep=1, step=4)
    assert saved(later) == [4]
    save(later, model, 5)  # between the intervals, as a signal saves
    assert saved(later) == [5]


def config_of(folder, resume):
    return PretrainConfig(output=str(folder), resume=None if resume is None else str(resume))


def test_an_older_checkpoint_is_gone_on_from_only_where_nothing_gets_lost(checkpointer, model):
    save(checkpointer, model, 1, 4)
    older, newer = (path for _, path in checkpoints(checkpointer.folder))
    run_folder = checkpointer.folder.parent
    assert find_checkpoint(config_of(run_folder, newer))[0] == newer
    assert find_checkpoint(config_of(run_folder / "other", older))[0] == older
    with pytest.raises(UserError, match="000001 cannot be resumed where there is step_000004, which would be lost"):
        find_checkpoint(config_of(run_folder, older))
    (newer / "checkpoint.json").write_text("")
    assert find_checkpoint(config_of(run_folder, older))[0] == older


def test_a_restarted_run_goes_on_from_its_own(checkpointer, model, tmp_path):
    other = Checkpointer(tmp_path / "other" / "checkpoints", Processes("cpu"), keep=3)
    save(other, model, 7)
    origin = other.folder / "step_000007"
    begun = config_of(tmp_path, origin)
    (tmp_path / "config.yaml").write_text("")  # it was killed before its first checkpoint
    for is_restarted in (False, True):
        assert find_checkpoint(begun, is_restarted)[0] == origin
    save(checkpointer, model, 8, 9)
    assert find_checkpoint(begun, True)[0] == checkpointer.folder / "step_000009"
    with pytest.raises(UserError, match="is of another run than that in the run folder"):
        find_checkpoint(begun)


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def test_what_torchrun_starts_again_goes_on(tmp_path, monkeypatch, capsys):
    write_corpus(tmp_path)
    assert run(tmp_path, output="whole", train=TRAIN) == 0
    step = Trainer._try_step

    def killed_at_4(trainer, *arguments):
        if trainer.step == 3:
            raise Killed
        return step(trainer, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "_try_step", killed_at_4)
        run(tmp_path, train=TRAIN)
    assert run(tmp_path, train=TRAIN) == 2  # somebody else's start of the same command
    assert "is not empty: --resume auto goes on with its run" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run(tmp_path, train=TRAIN) == 0
    assert "going on from step_000002" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize("method", ["log", "picture", "summarize", "close"])
def test_a_run_folder_on_a_full_disk_is_one_sentence(tmp_path, monkeypatch, capsys, method):
    write_corpus(tmp_path)
    write = getattr(RunFolder, method)

    def write_on_a_full_disk(*arguments):
        with full_disk():
            return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, method, write_on_a_full_disk)
        if method == "close":  # tries again to write what could not be written before
            patch.setattr(RunFolder, "summarize", lambda folder, summary: folder._metrics.buffer.write(b"rest"))
        assert run(tmp_path, train={**TRAIN, "num_steps": 3}) == 2
    error = capsys.readouterr().err
    assert f"error: The run folder {tmp_path / 'run'} cannot be written: File too large." in error
    assert "Traceback" not in error
    # It would say that the run is complete.
    assert method == "close" or not (tmp_path / "run" / "summary.json").exists()
    assert run(tmp_path, "--resume", "auto", train={**TRAIN, "num_steps": 3}) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


def test_a_full_disk_under_the_log_has_a_status(monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.print", fail)
    assert main(["--help"]) == 2
