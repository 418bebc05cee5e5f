"""Passes that are recorded and replayed make the same steps; on a CPU a replay is the recorded function run again."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from models import small_gpu_model, small_model
from test_packed_step import make_batch, to_float32

from fastm3ae.config import OptimConfig, TrainConfig
from fastm3ae.config.presets import preset
from fastm3ae.errors import UserError
from fastm3ae.training import graphs
from fastm3ae.training.distributed import Processes
from fastm3ae.training.graphs import PassGraphs, record_graph
from fastm3ae.training.parallel import Copy
from fastm3ae.training.step import OptimizerStep

OPTIONS = {"share_texts": False, "checkpoint_activations": False, "compiled": False}


def run_again(function):
    """Replays by running the function again, into the tensors of its first results."""
    results = function()

    def replay():
        for name, values in function().items():
            for key, value in values.items():
                results[name][key].copy_(value)

    return replay, results


def batches(model):
    """Various numbers of tokens, masked ones and false images; the third needs more room, the fifth has fewer pairs."""
    lengths = [[9, 2, 5, 12], [3, 8, 12, 4], [12, 12, 12, 12], [7, 7, 12, 2], [12, 5]]
    masked = [[3, 1, 0, 2], [1, 2, 3, 0], [5, 5, 5, 5], [0, 0, 0, 1], [1, 1]]
    labels = [[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0], [1, 0, 1, 1], [0, 1]]
    return [make_batch(model, *some, seed) for seed, some in enumerate(zip(lengths, masked, labels, strict=True))]


def steps(model, is_recorded, pieces_of, record=run_again, say=lambda line: None, autocast=nullcontext):
    """The metrics of steps on batches, and the parameters afterwards."""
    torch.manual_seed(0)
    recorded = PassGraphs(model, False, False, say, record) if is_recorded else None
    # A small eps would make much of gradients that are zero but for rounding.
    config = OptimConfig(learning_rate=0.1, eps=1.0, clip_grad_norm=1.0)
    processes = Processes(str(model.image_proj.weight.device))
    step = OptimizerStep(Copy(model), config, 10, processes, autocast, False, OPTIONS, recorded)
    metrics = []
    for pieces in pieces_of:
        found = step(pieces, step.count(pieces))
        metrics.append({name: (float(value), count) for name, (value, count) in found.items()})
    return metrics, {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(got, want, tolerance):
    for step_got, step_want in zip(got[0], want[0], strict=True):
        assert step_got.keys() == step_want.keys()
        for name, (value, count) in step_want.items():
            assert step_got[name][1] == count
            assert abs(step_got[name][0] - value) <= tolerance * max(1, abs(value)), name
    assert all((got[1][name] - p).abs().max() <= tolerance for name, p in want[1].items())


@pytest.mark.parametrize("objectives", [("mlm", "mim", "itm"), ("mim",), ("itm", "mlm")])
def test_recorded_passes_make_the_same_steps(objectives):
    found = []
    for is_recorded in (False, True):
        model = small_model(objectives=objectives)
        one, two, three, four, five = batches(model)
        # The second step adds the gradients of two passes.
        found.append(steps(model, is_recorded, [[one], [two, three], [four], [five], [one]]))
    assert_close(found[1], found[0], 1e-10)


def test_a_larger_bucket_is_said_and_graphs_are_few(monkeypatch):
    model, lines, recorded = small_model(), [], []

    def record(function):
        recorded.append(function)
        return run_again(function)

    some = batches(model)
    steps(model, True, [[batch] for batch in some + some], record, lines.append)
    assert len(lines) == len(recorded) == 3
    assert lines[0].startswith("4 pairs with texts of up to 12 tokens: a CUDA graph for ")
    assert "is too small for a batch with 48 tokens, 20 of them read by mlm, 3 false images" in lines[1]
    assert lines[2].startswith("2 pairs with texts of up to 12 tokens")
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    recorded.clear()
    steps(model, True, [[some[0]], [some[4]], [some[0]], [some[0]]], record)
    assert len(recorded) == 3  # the first again, because the second took its place


def test_what_excludes_cuda_graphs():
    with pytest.raises(UserError, match="train.cuda_graphs and train.checkpoint_activations exclude each other"):
        TrainConfig(cuda_graphs=True, checkpoint_activations=True)
    config = preset("mpma-demo")
    with pytest.raises(UserError, match="train.cuda_graphs is an option of M3AE only"):
        dataclasses.replace(config, train=dataclasses.replace(config.train, cuda_graphs=True))


@pytest.mark.gpu
def test_replayed_graphs_make_the_same_steps():
    found, lines = [], []
    for is_recorded in (False, True):
        model = small_gpu_model()
        one, two, three, four, five = (to_float32(batch).to("cuda") for batch in batches(model))
        some = [[one], [two, three], [four], [five], [one], [two], [four]]
        found.append(steps(model, is_recorded, some, record_graph, lines.append))
    assert_close(found[1], found[0], 1e-3)
    assert len(lines) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_replays_draw_new_dropout(dtype):
    model = small_gpu_model(dropout_frac=0.3).train()
    batch = to_float32(batches(model)[0]).to("cuda")
    recorded = PassGraphs(model, False, False, lambda line: None, record_graph)
    step = OptimizerStep(Copy(model), OptimConfig(), 10, Processes("cuda"), nullcontext, False, OPTIONS, recorded)
    step.autocast = lambda: torch.autocast("cuda", dtype)
    losses = [recorded(batch, [1.0] * 3, step._run)["mlm"]["loss"].item() for _ in range(8)]
    assert len(set(losses)) > 4 and torch.tensor(losses).std() < 1
