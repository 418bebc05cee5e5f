"""Checkpoints as files: what is written, kept and removed."""

import pytest
import torch
from full_disk import full_disk
from models import small_model
from safetensors.torch import load_file

from fastm3ae.training.checkpoint import Checkpointer
from fastm3ae.training.distributed import Processes
from fastm3ae.training.saved import checkpoints, damage, read_own


def save(checkpointer, step, model, parts=(), is_best=False):
    checkpointer.save(step, model.config, model.state_dict(), dict(parts), {}, {"step": step}, is_best)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, capsys):
    """Files stop growing at some size, as on a full disk; every place of the failure leaves what was there before."""
    model = small_model()
    for limit in (0, 2_000, 400_000):
        path = tmp_path / f"full_{limit}"
        checkpointer = Checkpointer(path, Processes("cpu"), keep=2)
        save(checkpointer, 1, model, {"values": torch.zeros(200_000)}, is_best=True)
        checkpointer.wait()
        with full_disk(limit):
            save(checkpointer, 2, model, {"values": torch.zeros(200_000)}, is_best=True)
            checkpointer.wait()
        assert "warning: The checkpoint of step 2 could not be written" in capsys.readouterr().out
        assert [step for step, _ in checkpoints(path)] == [1] and damage(path / "step_000001") is None
        assert sorted(entry.name for entry in path.iterdir()) == ["best", "step_000001"]
        with pytest.raises(Exception, match="The checkpoint of step 2 could not be written"):
            checkpointer.close()
        later = Checkpointer(path, Processes("cpu"), keep=2)
        save(later, 3, model)
        later.close()
        assert [step for step, _ in checkpoints(path)] == [1, 3]


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    (tmp_path / ".step_000004.partial").mkdir()
    Checkpointer(tmp_path, Processes("cpu"), keep=1).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep_every_steps", [None, 4])
def test_the_newest_are_kept_and_some_for_good(tmp_path, keep_every_steps):
    checkpointer = Checkpointer(tmp_path, Processes("cpu"), keep=2, keep_every_steps=keep_every_steps)
    for step in range(1, 12):
        save(checkpointer, step, small_model())
    checkpointer.close()
    assert [step for step, _ in checkpoints(tmp_path)] == ([4, 8] if keep_every_steps else []) + [10, 11]


def test_a_checkpoint_does_not_change_with_what_was_saved(tmp_path):
    model, values = small_model(), torch.ones(3)
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpointer = Checkpointer(tmp_path, Processes("cpu"), keep=9)
    for step in (1, 2):  # the second time into the memory of the first
        save(checkpointer, step, model, {"values": values, "one": torch.tensor(float(step))})
        with torch.no_grad():
            for tensor in (*model.state_dict().values(), values):
                tensor.mul_(2)
    checkpointer.close()
    for step in (1, 2):
        saved = load_file(tmp_path / f"step_00000{step}" / "model.safetensors")
        assert all(torch.equal(saved[name], tensor * step) for name, tensor in want.items())
        read = read_own(tmp_path / f"step_00000{step}", "val")
        assert read.keys() == {"ues"} and torch.equal(read["ues"], torch.full((3,), float(step)))
