"""Contrast among the pairs of other passes and other processes: the joined batch's features, losses and gradients."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from mpma_models import part_of, small_batch, small_model

from fastm3ae.errors import UserError
from fastm3ae.training.contrast import passes
from fastm3ae.training.distributed import Processes

OPTIONS = {"checkpoint_activations": False, "compiled": False}
DIVISIONS = {
    "equal": [[[0, 1, 2]], [[3, 4, 5]]],
    "passes": [[[0], [1, 2]], [[3, 4, 5]]],
    "dealt": [[[1, 4], [5]], [[0, 3], [2]]],
    "idle": [[[0, 1, 2, 3, 4, 5]], []],
    "idle beside passes": [[[0, 1, 2, 3], [4, 5]], []],
}
ONE_STEP = """
import json
import sys
import torch
from contextlib import nullcontext
from mpma_models import part_of, small_batch, small_model
from fastm3ae.config import OptimConfig
from fastm3ae.training.distributed import Processes
from fastm3ae.training.parallel import share
from fastm3ae.training.step import OptimizerStep

processes, found = Processes("cpu"), {}
for name, shares in json.loads(sys.argv[1]).items():
    model = small_model(alignment={"learn_temperature": True})
    parallel = share(model, processes, "ddp", num_passes=2)
    config = OptimConfig(learning_rate=1e-3)
    step = OptimizerStep(parallel, config, 10, processes, nullcontext, False, {"compiled": False})
    batch = small_batch(model.config)
    mine = [part_of(batch, rows) for rows in shares[processes.rank]]
    totals = processes.sum(step.count(mine))
    step.optimizer.step = lambda *_, **__: None
    step.optimizer.zero_grad = lambda *_, **__: None
    if not mine:
        step._spare = part_of(batch, [0, 1])
    sums = step(mine, totals)
    losses = {key: sum(processes.gather(float(sums[key][0]))) for key in sums if key.endswith("_loss")}
    found[name] = {"grads": {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, "losses": losses}
if processes.is_first:
    torch.save(found, sys.argv[2])
processes.close()
"""


def one_step(folder, divisions, *launcher):
    """Losses and gradients of one step for each way of dividing the pairs."""
    (folder / "one_step.py").write_text(ONE_STEP)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, *launcher, str(folder / "one_step.py"), json.dumps(divisions), str(folder / "result")],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return torch.load(folder / "result")


def test_processes_give_the_gradients_of_the_joined_batch(tmp_path):
    """In float64, however the pairs are divided, also if one process has none that can be used."""
    joined = one_step(tmp_path, {"joined": [[[0, 1, 2, 3, 4, 5]]]})["joined"]
    found = one_step(tmp_path, DIVISIONS, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert found.keys() == DIVISIONS.keys() and "global_head.log_temperature" in joined["grads"]
    for division, two in found.items():
        assert two["losses"] == pytest.approx(joined["losses"], rel=1e-10), division
        assert joined["grads"].keys() == two["grads"].keys()
        for name, grad in joined["grads"].items():
            assert torch.allclose(two["grads"][name], grad, rtol=1e-8, atol=1e-12), (division, name)


@pytest.mark.parametrize("dropout_frac", [0.0, 0.3])
def test_each_pass_makes_the_features_that_the_others_were_given(dropout_frac):
    model = small_model(dropout_frac=dropout_frac, alignment={"view": "full"})
    batch = small_batch(model.config)
    pieces = [part_of(batch, [0, 1, 2]), part_of(batch, [3]), part_of(batch, [4, 5])]
    first = 0
    for piece, of_pass in zip(pieces, passes(model, pieces, 3, Processes("cpu"), nullcontext, OPTIONS), strict=True):
        with of_pass.dropout():
            own = model(piece)["global_alignment"].stacked()
        everything, start = of_pass.gather(own)
        assert len(everything) == 6 and start == first
        assert torch.equal(everything[start : start + len(piece)], own)
        first += len(piece)
    if dropout_frac:
        assert not torch.equal(model(piece)["global_alignment"].stacked(), own)


def test_several_passes_of_a_compiled_model_are_refused():
    model = small_model(dropout_frac=0.1)
    pieces = [part_of(small_batch(model.config), rows) for rows in ([0, 1, 2], [3, 4, 5])]
    with pytest.raises(UserError, match="let train.micro_batch hold the whole batch of a process"):
        passes(model, pieces, 2, Processes("cpu"), nullcontext, OPTIONS | {"compiled": True})
