"""Steps whose losses or gradients are not finite change nothing, are counted and named, and end a run at last."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import mpma_models
import pytest
import torch
from models import small_batch, small_gpu_model, small_model
from poison import poison
from runs import NO_DROPOUT, command, run, write_corpus
from safetensors.torch import load_file
from test_graphs import OPTIONS, batches, run_again

from fastm3ae.config import OptimConfig, TrainConfig
from fastm3ae.errors import UserError
from fastm3ae.objectives import losses, total
from fastm3ae.training.distributed import Processes
from fastm3ae.training.graphs import PassGraphs
from fastm3ae.training.loop import Trainer
from fastm3ae.training.meter import Meter
from fastm3ae.training.nonfinite import NONFINITE_FILE, Nonfinite
from fastm3ae.training.parallel import Copy
from fastm3ae.training.step import OptimizerStep

ALONE = Processes("cpu")
# Two passes of 4 pairs a step; warm-up over, so that every step changes the weights.
TRAIN = {"num_steps": 8, "micro_batch": 4, "validate_every_steps": 8, "save_every_steps": 2, "keep_checkpoints": 9,
         "num_pictures": 0}  # fmt: skip
OPTIM = {"learning_rate": 1e-3, "warmup_steps": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, and a run on it that nothing happens to."""
    folder = tmp_path_factory.mktemp("nonfinite")
    write_corpus(folder)
    assert go(folder, "sound") == 0
    return folder


def go(folder, output, *arguments, **train):
    return run(folder, *arguments, output=output, train={**TRAIN, **train}, optim=OPTIM)


def lines(folder, output, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / output / name).read_text().splitlines()]


def train_lines(folder, output):
    return {line["step"]: line for line in lines(folder, output) if line["split"] == "train"}


def weights(folder, output, step=8):
    return load_file(folder / output / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("changes", [{}, {"step": "original"}], ids=["packed", "original"])
def test_a_step_with_a_poisoned_pair_changes_nothing_else(folder, monkeypatch, capsys, changes):
    """The run is the one in which the optimiser makes no step there; all that is drawn is the same."""
    output, batches_seen = f"poisoned_{len(changes)}", []
    make_step = OptimizerStep.__call__

    def leave_third_out(step, pieces, totals):
        batches_seen.append([piece.item_ids for piece in pieces])
        with monkeypatch.context() as patch:
            if len(batches_seen) == 3:
                patch.setattr(step.optimizer, "step", lambda: None)
            return make_step(step, pieces, totals)

    with monkeypatch.context() as patch:
        patch.setattr(OptimizerStep, "__call__", leave_third_out)
        assert go(folder, f"{output}_left_out", **changes) == 0
    others, suspects = batches_seen[2]
    (suspect, *_) = set(suspects) - set(others)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_next", poison([3], suspect))
        assert go(folder, output, **changes) == 0
    assert "1 of the last steps changed nothing, the first of them step 3" in capsys.readouterr().out
    assert equal(weights(folder, output), weights(folder, f"{output}_left_out"))

    got, want = (train_lines(folder, name) for name in (output, f"{output}_left_out"))
    assert {"loss", "mlm_loss", "mim_loss", "itm_accuracy"}.isdisjoint(got[3]) and got[3]["samples_per_s"] > 0
    assert all(got[step]["loss"] == want[step]["loss"] for step in (1, 2, 4, 5, 6, 7, 8))
    assert [got[step].get("nonfinite_steps") for step in range(1, 9)] == [None, None, 1, 1, 1, 1, 1, 1]
    (line,) = lines(folder, output, NONFINITE_FILE)
    (piece,) = line.pop("pieces")
    assert line == {"step": 3, "process": 0} and piece["item_ids"] == suspects and "nan" in piece["losses"].values()
    summary = json.loads((folder / output / "summary.json").read_text())
    assert summary["nonfinite_steps"] == 1
    assert json.loads((folder / "sound" / "summary.json").read_text())["nonfinite_steps"] == 0
    assert not (folder / "sound" / NONFINITE_FILE).exists()


def test_means_are_those_of_the_other_steps(folder, monkeypatch):
    """Step by step and four at a time; all pairs are poisoned in the last four."""
    monkeypatch.setattr(Trainer, "_next", poison([3, 5, 6, 7, 8], "any"))
    for output, every in (("each", 1), ("four", 4)):
        assert go(folder, output, log_every_steps=every) == 0
    each, four = train_lines(folder, "each"), train_lines(folder, "four")
    for name in ("mim_loss", "itm_loss", "itm_accuracy"):  # over as many patches and pairs in each step
        assert four[4][name] == pytest.approx(sum(each[step][name] for step in (1, 2, 4)) / 3, rel=1e-6)
    assert "loss" not in four[8] and four[8]["nonfinite_steps"] == each[8]["nonfinite_steps"] == 5
    assert lines(folder, "each", NONFINITE_FILE) == lines(folder, "four", NONFINITE_FILE)


def test_a_run_that_is_not_finite_any_more_ends_and_goes_on(folder, monkeypatch, capsys):
    limit = {"max_nonfinite_steps": 3}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_next", poison([2, *range(5, 9)], "any"))
        for _ in range(2):  # the second time from the checkpoint of step 6, with what was counted until then
            assert go(folder, "ended", "--resume", "auto", **limit) == 2
            error = capsys.readouterr().err
            assert "not finite in 4 steps in a row, from step 5 on" in error and "Traceback" not in error
            assert "lower optim.learning_rate" in error and "bf16" not in error
            assert [line["step"] for line in lines(folder, "ended", NONFINITE_FILE)] == [2, 5, 6, 7, 8]
    steps = sorted(path.name for path in (folder / "ended" / "checkpoints").glob("step_*"))
    assert steps == ["step_000002", "step_000004", "step_000006"]
    assert equal(weights(folder, "ended", 4), weights(folder, "ended", 6))
    assert go(folder, "ended", "--resume", "auto", **limit) == 0
    assert json.loads((folder / "ended" / "summary.json").read_text())["nonfinite_steps"] == 3
    assert {line["step"] for line in lines(folder, "ended", NONFINITE_FILE)} == {2, 5, 6}  # what was made again is gone
    assert all(torch.isfinite(tensor).all() for tensor in weights(folder, "ended").values())


def test_one_process_of_two(folder):
    """Both leave the step out, and go on as one process does."""
    script = str(Path(__file__).with_name("poison.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    sections = {"model": NO_DROPOUT, "optim": {**OPTIM, "learning_rate": 1e-4}, "train": TRAIN}
    found, item = {}, "img/102.png"
    for output, num in (("one", 1), ("two", 2)):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num)] if num > 1 else []
        arguments = command(folder, output=output, **sections)
        result = subprocess.run(
            [sys.executable, *launcher, script, "1,2,3", item, *arguments],
            capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-2000:]
        found[output] = lines(folder, output, NONFINITE_FILE)
    assert json.loads((folder / "two" / "summary.json").read_text())["nonfinite_steps"] == len(found["two"]) > 0
    items = {
        output: [(line["step"], piece["item_ids"]) for line in of for piece in line["pieces"]]
        for output, of in found.items()
    }
    assert items["two"] == items["one"]  # pieces of 4 pairs, whoever has them
    assert {line["process"] for line in found["one"]} == {0} and {line["process"] for line in found["two"]} == {0, 1}
    assert all(item in of_piece for _, of_piece in items["two"])
    one, two = (train_lines(folder, name) for name in ("one", "two"))
    for step, line in one.items():
        assert ("loss" in line) == ("loss" in two[step]) == (step not in {step for step, _ in items["one"]})
        assert line.get("loss", 0) == pytest.approx(two[step].get("loss", 0), rel=1e-5), step


def test_mistakes():
    with pytest.raises(UserError, match="train.max_nonfinite_steps must not be negative, got -1"):
        TrainConfig(max_nonfinite_steps=-1)
    TrainConfig(max_nonfinite_steps=0)


def make_step(model, is_fp16=False, graphs=None, **optim):
    config = OptimConfig(learning_rate=1e-2, warmup_steps=0, **optim)
    return OptimizerStep(Copy(model), config, 100, Processes(str(model.image_proj.weight.device)), nullcontext, is_fp16,
                         OPTIONS, graphs)  # fmt: skip


def state_of(step):
    """Copies of the weights and of the optimiser's state."""
    weights = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    states = step.optimizer.state_dict()["state"]
    return weights | {f"{number} {name}": torch.as_tensor(value).clone() for number, state in states.items() for
                      name, value in state.items()}  # fmt: skip


def test_finite_steps_are_made_as_without_a_scaler():
    """Bit for bit, in float32 as in runs."""
    batch = small_batch(small_model(dtype=torch.float32), "mlm")
    step = make_step(small_model(dtype=torch.float32))
    plain = small_model(dtype=torch.float32)
    reference = make_step(plain)
    for _ in range(3):
        step([batch], step.count([batch]))
        results = reference.parallel.forward(batch, **OPTIONS)
        total(losses(results, batch, plain.config)).backward()
        reference.optimizer.step()
        reference.optimizer.zero_grad()
        reference.schedule.step()
    assert equal(state_of(step), state_of(reference))
    assert step.nonfinite.read(3, ALONE, 0) == [] and step.nonfinite.num == 0


@pytest.mark.parametrize("clip_grad_norm", [None, 1.0])
@pytest.mark.parametrize("adamw", ["torch", "official"])
def test_gradients_alone_that_are_not_finite(adamw, clip_grad_norm):
    model = small_model()
    step = make_step(model, adamw=adamw, clip_grad_norm=clip_grad_norm)
    pieces = [small_batch(model, "mlm", seed=seed) for seed in range(2)]
    step(pieces, step.count(pieces))
    before = state_of(step)
    hook = model.image_proj.weight.register_hook(lambda grad: grad * float("inf"))
    step(pieces, step.count(pieces))
    hook.remove()
    assert equal(state_of(step), before)
    step(pieces, step.count(pieces))
    assert not equal(state_of(step), before)
    (line,) = step.nonfinite.read(3, ALONE, 0)
    assert (line["step"], line["process"], len(line["pieces"])) == (2, 0, 2)
    assert all(type(loss) is float for piece in line["pieces"] for loss in piece["losses"].values())
    assert [piece["item_ids"] for piece in line["pieces"]] == [["0", "1", "2", "3"]] * 2
    assert (step.nonfinite.num, step.nonfinite.in_a_row, step.nonfinite.since) == (1, 1, 2)


def test_a_learning_rate_that_is_too_large_leaves_finite_weights():
    model = small_model(dtype=torch.float32)
    step = make_step(model)
    for group in step.optimizer.param_groups:
        group["lr"] = 1e30
    step.schedule.base_lrs = [1e30] * len(step.optimizer.param_groups)
    batch = small_batch(model, "mlm")
    for _ in range(5):
        step([batch], step.count([batch]))
    step.nonfinite.read(5, ALONE, 100)
    assert step.nonfinite.in_a_row >= 3
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_loss_that_is_not_finite_though_its_gradients_are(loss):
    p = torch.nn.Parameter(torch.ones(3))
    nonfinite = Nonfinite(torch.device("cpu"), is_fp16=False)
    nonfinite.scaled(p.sum() + float(loss)).backward()
    assert not p.grad.isfinite().any()
    p.grad = None
    nonfinite.scaled(p.sum()).backward()
    assert torch.equal(p.grad, torch.ones(3))


class Toy:
    """Steps on one number whose gradient is given."""

    def __init__(self, is_fp16):
        self.p = torch.nn.Parameter(torch.ones(()))
        self.optimizer = torch.optim.AdamW([self.p], lr=0.1, fused=True)
        self.nonfinite = Nonfinite(torch.device("cpu"), is_fp16)
        self.batch = small_batch(small_model(), "mlm", num=2)
        self.num = 0

    def __call__(self, gradient, loss=1.0):
        before = self.p.item()
        value = self.p * gradient
        self.nonfinite.scaled(value - value.detach() + loss).backward()
        self.nonfinite.scaler.unscale_(self.optimizer)
        self.nonfinite.scaler.step(self.optimizer)
        self.nonfinite.end_step([self.batch], [{"mlm": torch.tensor(loss)}])
        self.optimizer.zero_grad()
        self.num += 1
        assert bool(self.nonfinite.is_skipped) == (self.p.item() == before)

    def read(self, limit=100):
        return [line["step"] for line in self.nonfinite.read(self.num, ALONE, limit)]


def test_the_search_for_the_scale_of_fp16_is_not_counted():
    toy = Toy(is_fp16=True)
    for _ in range(10):
        toy(1e36)  # overflows until the scale is 2^8
    assert toy.read() == [] and toy.nonfinite.num == 0 and toy.nonfinite.scale == 2.0**8
    assert toy.nonfinite.values() == {"loss_scale": 2.0**8}
    toy(1.0, loss=float("nan"))
    toy(float("inf"))  # the scale is still more than 1: a part of the search, which neither counts nor ends the row
    toy(1.0, loss=float("inf"))
    assert toy.read() == [11, 13] and (toy.nonfinite.in_a_row, toy.nonfinite.since) == (2, 11)
    toy(1.0)
    assert toy.read() == [] and toy.nonfinite.in_a_row == 0
    for _ in range(6):
        toy(float("inf"))  # 2^5 falls to 2^-1
    assert toy.read() == [20]
    assert toy.nonfinite.values() == {"nonfinite_steps": 3, "loss_scale": 0.5}


def test_the_scale_of_other_precisions_is_always_1():
    toy = Toy(is_fp16=False)
    for _ in range(300):  # halved as often, it would be 0
        toy(float("nan"))
    toy(1.0)
    assert len(toy.read(1000)) == 300 and toy.nonfinite.scaler.get_scale() == 1.0
    assert toy.nonfinite.values() == {"nonfinite_steps": 300} and toy.nonfinite.in_a_row == 0


def test_a_row_that_exceeds_the_limit_stays_although_the_last_step_was_finite():
    toy = Toy(is_fp16=False)
    for gradient in (1.0, float("nan"), float("nan"), float("nan"), 1.0):
        toy(gradient)
    assert toy.read(limit=2) == [2, 3, 4] and (toy.nonfinite.in_a_row, toy.nonfinite.since) == (3, 2)
    message = str(toy.nonfinite.too_many(Path("runs/x")))
    assert "in 3 steps in a row, from step 2 on" in message and f"runs/x/{NONFINITE_FILE} names" in message


@pytest.mark.parametrize("is_fp16", [False, True])
def test_the_state_goes_on(is_fp16):
    toy, again = Toy(is_fp16), Toy(is_fp16)
    for loss in (1.0, float("nan"), float("nan")):
        toy(1.0, loss=loss)
    toy.read()
    again.nonfinite.restore(toy.nonfinite.state())
    again.num = 3
    assert again.nonfinite.scaler.get_scale() == toy.nonfinite.scaler.get_scale() == (2.0**14 if is_fp16 else 1.0)
    again(1.0, loss=float("nan"))
    again.read()
    assert (again.nonfinite.num, again.nonfinite.in_a_row, again.nonfinite.since) == (3, 3, 2)
    other = Toy(not is_fp16)  # forced to go on in another precision
    other.nonfinite.restore(toy.nonfinite.state())
    assert other.nonfinite.scaler.get_scale() == (1.0 if is_fp16 else 2.0**16)


def test_recorded_passes_forget_what_was_not_finite():
    states = []
    for is_recorded in (False, True):
        model = small_model()
        one, two, three, *_ = batches(model)
        poisoned = batches(model)[1]
        poisoned.image_BCHW[0] = float("nan")
        graphs = PassGraphs(model, False, False, lambda line: None, run_again) if is_recorded else None
        step = make_step(model, graphs=graphs, eps=1.0)
        for pieces in ([one], [two, poisoned], [three], [two]):
            step(pieces, step.count(pieces))
        (line,) = step.nonfinite.read(4, ALONE, 0)
        assert line["step"] == 2 and len(line["pieces"]) == 1
        states.append(state_of(step))
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-10) for name in states[0])


def test_contrast_spreads_what_is_not_finite():
    """One image of MPMA makes the loss of every pass NaN; of the other losses only that of its own pass."""
    model = mpma_models.small_model(dtype=torch.float32)
    batch = mpma_models.small_batch(model.config, dtype=torch.float32)
    pieces = [mpma_models.part_of(batch, rows) for rows in ([0, 1, 2], [3, 4, 5])]
    pieces[1].image_BCHW[0] = float("nan")
    step = OptimizerStep(Copy(model), OptimConfig(warmup_steps=0), 10, ALONE, nullcontext, False, {"compiled": False})
    before = state_of(step)
    step(pieces, step.count(pieces))
    assert equal({name: value for name, value in state_of(step).items() if name in before}, before)
    (line,) = step.nonfinite.read(1, ALONE, 0)
    assert [piece["losses"]["global_alignment"] for piece in line["pieces"]] == ["nan", "nan"]
    assert [piece["losses"]["image_reconstruction"] == "nan" for piece in line["pieces"]] == [False, True]
    assert [piece["item_ids"] for piece in line["pieces"]] == [piece.item_ids for piece in pieces]


def test_meters_leave_steps_out():
    meter = Meter(ALONE)
    for value, is_skipped in ((1.0, False), (float("nan"), True), (4.0, False)):
        meter.add({"mlm_loss": (torch.tensor(value), 2)}, 3, torch.tensor(is_skipped))
    other = Meter(ALONE)
    other.restore(meter.state(), torch.device("cpu"))
    for of in (meter, other):
        of.add({"mlm_loss": (torch.tensor(4.0), 2)}, 3, torch.tensor(False))
        values = of.read()
        assert values["mlm_loss"] == values["loss"] == 1.5 and of.total_samples == 12
        of.add({"mlm_loss": (torch.tensor(4.0), 2)}, 3, torch.tensor(True))
        assert of.read().keys() == {"samples_per_s", "data_wait_frac"}


@pytest.mark.gpu
@pytest.mark.parametrize("clip_grad_norm", [None, 1.0])
def test_no_step_waits_for_the_gpu(clip_grad_norm):
    from test_packed_step import to_float32

    model = small_gpu_model()
    step = make_step(model, clip_grad_norm=clip_grad_norm)
    batch = to_float32(batches(model)[0]).to("cuda")
    poisoned = to_float32(batches(model)[0]).to("cuda")
    poisoned.image_BCHW[0] = float("nan")
    for piece in (batch, poisoned, batch):  # kernels are compiled
        step([piece], step.count([piece]))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for piece in (batch, poisoned, batch):
            step([piece], step.count([piece]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [line["step"] for line in step.nonfinite.read(6, ALONE, 100)] == [2, 5]
