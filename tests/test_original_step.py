"""The yardstick of the training step is the original: its losses, gradients, optimiser steps, and its work."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from models import small_batch, small_config, small_model
from parity_common import compare
from parity_model import FLOAT32, FLOAT64, build, check_gradients, make_batches
from parity_optim import NO_TRUE_GRADIENT, config_of
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from fastm3ae import objectives
from fastm3ae.config import OptimConfig
from fastm3ae.model.m3ae import M3AE
from fastm3ae.weights.convert import to_official, unused_by_original

GOLDEN = Path(__file__).parent / "data" / "golden"
C1 = GOLDEN / "c1_clip_roberta_pretrain.safetensors"
META, TENSORS = json.loads(C1.with_suffix(".json").read_text()), load_file(C1)
DEPTHS = [(6, 3), (6, 1), (6, 5), (4, 2), (2, 0), (3, -1)]


@pytest.fixture(autouse=True)
def yardstick(monkeypatch):
    """The folder with the benchmarks is importable."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import original_step

    return original_step


def yardstick_losses(yardstick, model, batch):
    return {name: objectives.Loss(outputs.loss, {}) for name, outputs in yardstick.passes(model, batch)}


def our_losses(model, batch, step="original"):
    return objectives.losses(model(batch, step), batch, model.config)


def gradients(model, loss):
    """By name, of the parameters that get one."""
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def with_depth(num_layers, mim_layer, text="roberta", **changes):
    torch.manual_seed(0)
    config = small_config("clip", text, **changes)
    fusion = dataclasses.replace(config.fusion, num_layers=num_layers)
    return M3AE(dataclasses.replace(config, fusion=fusion, mim=dataclasses.replace(config.mim, layer=mim_layer)))


class Calls(TorchFunctionMode):
    """Counts calls of torch by name, and keeps the shapes of what is dropped out."""

    def __init__(self):
        super().__init__()
        self.names, self.dropped = Counter(), Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.names[function.__name__] += 1
        if function is torch.nn.functional.dropout and kwargs.get("training", True) and kwargs.get("p", 0.5) > 0:
            self.dropped[args[0].dim()] += 1
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    ("dtype", "prefix", "tolerance"), [(torch.float32, "out", FLOAT32), (torch.float64, "f64", FLOAT64)]
)
def test_golden_losses_predictions_and_gradients(yardstick, dtype, prefix, tolerance):
    model, _ = build(C1, dtype)
    batch = make_batches(TENSORS, model, dtype)["mlm"]
    outputs = dict(yardstick.passes(model, batch))
    masked = outputs["mlm"].predictions.flatten(0, 1)[batch.masked_index_M]
    got = {
        "mlm/mlm_logits_masked": masked,
        "mim/mim_logits": outputs["mim"].predictions,
        "itm/itm_logits": outputs["itm"].predictions,
        **{f"{name}/loss": output.loss for name, output in outputs.items()},
    }
    checks = [
        compare(name, value, TENSORS[f"{prefix}/{name}"], **tolerance)
        for name, value in got.items()
        if f"{prefix}/{name}" in TENSORS
    ]
    assert {f"{name}/loss" for name in outputs} <= {check.name for check in checks}
    losses = {name: objectives.Loss(output.loss, {}) for name, output in outputs.items()}
    checks += check_gradients(model, losses, META, TENSORS)
    missed = [check for check in checks if not check.ok]
    assert len(checks) > 30 and not missed, "\n".join(map(str, missed))


@pytest.mark.parametrize("run", ["A", "B", "C"])
def test_golden_optimizer_steps(yardstick, run):
    """The whole step, three times from the golden's weights: losses before each step, parameters after it."""
    meta = json.loads((GOLDEN / "optimizer_c1.json").read_text())
    recorded, tensors = meta["three_steps"][run], load_file(GOLDEN / "optimizer_c1.safetensors")
    settings = meta["settings"] | recorded["overrides"]
    model, _ = build(C1, torch.float32)
    batch = make_batches(TENSORS, model, torch.float32)["mlm"]
    step = yardstick.OriginalStep(model, config_of(settings), settings["max_steps"])
    start = to_official({name: p.detach().clone() for name, p in model.named_parameters()}, model)
    checks = []
    for number, want_loss in enumerate(recorded["losses_before_each_step"], 1):
        loss = torch.tensor(step(batch)["total_loss"])
        checks.append(compare(f"loss before step {number}", loss, torch.tensor(want_loss), **FLOAT32))
        after = to_official({name: p.detach() for name, p in model.named_parameters()}, model)
        for key, want in tensors.items():
            name = key.removeprefix(f"{run}/step{number}/")
            if name == key or unused_by_original(name) or NO_TRUE_GRADIENT.fullmatch(name):
                continue
            update = (want - start[name]).abs().max().item()
            # 0.2 % of the largest update: noise of other kernels is below, another formula above.
            checks.append(compare(key, after[name], want, atol=max(2e-3 * update, 1e-9), rtol=1e-6))
    missed = [check for check in checks if not check.ok]
    assert len(checks) > 10 and not missed, "\n".join(map(str, missed))


@pytest.mark.parametrize("step", ["original", "packed"])
@pytest.mark.parametrize("text", ["roberta", "bert"])
@pytest.mark.parametrize(("num_layers", "mim_layer"), DEPTHS)
def test_equals_ours(yardstick, num_layers, mim_layer, text, step):
    model = with_depth(num_layers, mim_layer, text).double()
    batch = small_batch(model, "mlm", num=5)
    theirs, ours = yardstick_losses(yardstick, model, batch), our_losses(model, batch, step)
    assert list(theirs) == list(ours)
    for name in ours:
        assert abs(theirs[name].mean - ours[name].mean) < 1e-9
        got, want = gradients(model, theirs[name].mean), gradients(model, ours[name].mean)
        assert got.keys() == want.keys()
        for parameter in want:
            assert torch.allclose(got[parameter], want[parameter], rtol=1e-9, atol=1e-9), (name, parameter)
    (_, mlm), (_, mim), (_, itm) = yardstick.passes(model, batch)
    assert torch.isclose(yardstick.accuracy(mlm.predictions, mlm.labels) * 6, ours["mlm"].sums["accuracy"].float())
    assert torch.isclose(yardstick.accuracy(itm.predictions, itm.labels) * 5, ours["itm"].sums["accuracy"].float())
    assert mim.labels is None


@pytest.mark.parametrize("is_normalized", [True, False])
def test_target_may_be_plain_pixels(yardstick, is_normalized):
    model = small_model(objectives=("mim",), mim={"normalize_target": is_normalized})
    batch = small_batch(model, "mim")
    got, want = yardstick_losses(yardstick, model, batch)["mim"].mean, our_losses(model, batch)["mim"].mean
    assert abs(got - want) < 1e-9


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1]])
def test_any_number_of_false_images(yardstick, labels):
    model = small_model(objectives=("itm",))
    batch = small_batch(model, "itm")
    labels = torch.tensor(labels)
    false_images = torch.randn(int((labels == 0).sum()), *batch.image_BCHW.shape[1:], dtype=torch.float64)
    batch = dataclasses.replace(
        batch, itm_labels_B=labels, false_image_FCHW=false_images, itm_index_B=None, itm_rows_B=None
    )
    got, want = yardstick_losses(yardstick, model, batch)["itm"].mean, our_losses(model, batch)["itm"].mean
    assert abs(got - want) < 1e-9


def test_a_batch_without_masked_tokens_costs_nothing(yardstick):
    model = small_model()
    batch = small_batch(model, "mlm")
    labels = torch.full_like(batch.mlm_labels_BT, -100)
    batch = dataclasses.replace(batch, mlm_labels_BT=labels, masked_index_M=None, masked_rows_M=None)
    loss = yardstick_losses(yardstick, model, batch)["mlm"].mean
    got, want = gradients(model, loss), gradients(model, our_losses(model, batch)["mlm"].mean)
    assert loss == 0 and got.keys() == want.keys() and not any(gradient.any() for gradient in got.values())
    metrics = yardstick.OriginalStep(model, OptimConfig(), 100)(batch)
    assert metrics["mlm_loss"] == metrics["mlm_accuracy"] == 0


def test_compiled_it_is_one_graph_for_each_pass(yardstick, monkeypatch):
    """Whatever the lengths; a graph that breaks would be an error."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    functions = {True: torch.compile(yardstick.one_pass, fullgraph=True, backend=keep), False: yardstick.one_pass}
    monkeypatch.setattr(yardstick, "maybe_compiled", lambda function, compiled: functions[compiled])
    model = small_model()
    for seed in range(3):
        lengths, num_masked = ([9, 6, 7], [1, 2, 3]) if seed else ([9, 9, 9], 4)
        batch = yardstick.make_batch(model.config, lengths, num_masked, 9, seed)
        batch = dataclasses.replace(
            batch,
            image_BCHW=batch.image_BCHW.double(),
            false_image_FCHW=batch.false_image_FCHW.double(),
        )
        for (name, got), (_, want) in zip(
            yardstick.passes(model, batch, compiled=True), yardstick.passes(model, batch), strict=True
        ):
            got_gradients = gradients(model, got.loss)
            for parameter, gradient in gradients(model, want.loss).items():
                assert torch.allclose(got_gradients[parameter], gradient, rtol=1e-9, atol=1e-12), (name, parameter)
    assert len(graphs) == len(model.config.objectives)


def test_equal_pieces_make_the_step_of_one(yardstick):
    after = []
    for num_pieces in (1, 3):
        model = small_model()
        batch = small_batch(model, "mlm", num=5)
        step = yardstick.OriginalStep(model, OptimConfig(learning_rate=1e-3), 100)
        metrics = [step(*[batch] * num_pieces) for _ in range(2)]
        after.append((metrics, {name: p.detach() for name, p in model.named_parameters()}))
    for got, want in zip(after[0][0], after[1][0], strict=True):
        assert got == pytest.approx(want, rel=1e-6)
    before = dict(small_model().named_parameters())
    for name, value in after[0][1].items():
        assert torch.allclose(value, after[1][1][name], rtol=1e-6, atol=1e-9), name
    assert any((value - before[name]).abs().max() > 1e-7 for name, value in after[0][1].items())


def test_dropout_where_the_original_has_it(yardstick):
    model = with_depth(3, 2, dropout_frac=0.1).double().train()
    batch = small_batch(model, "mlm")

    def losses(seed):
        torch.manual_seed(seed)
        return torch.stack([loss.mean for loss in yardstick_losses(yardstick, model, batch).values()])

    assert torch.equal(losses(0), losses(0)) and losses(0).isfinite().all()
    assert (losses(0) != losses(1)).all()
    with Calls() as calls:
        losses(0)
    num_text_layers = len(model.text.encoder.layer)
    # Four dimensions: attention's probabilities; a fusion layer has two attentions and one more hidden state.
    per_pass = Counter({4: num_text_layers + 2 * 2 * 3, 3: 1 + 2 * num_text_layers + 2 * 3 * 3})
    assert calls.dropped == Counter({dim: 3 * number for dim, number in per_pass.items()})
    model.eval()
    assert torch.equal(losses(0), losses(1))


def test_does_what_the_fast_step_saves(yardstick):
    model = with_depth(3, 1)
    batch = small_batch(model, "mlm", num=5)
    with Calls() as calls:
        outputs = dict(yardstick.passes(model, batch))
    num_fusion_layers, num_text_layers = 2 * 3, 2
    assert calls.names["argsort"] == 2
    assert calls.names["einsum"] == 3  # patchify
    assert calls.names["conv2d"] == 3
    assert calls.names["__bool__"] == len(batch)  # ITM's images
    assert calls.names["softmax"] == 3 * (2 * num_fusion_layers + num_text_layers)
    assert calls.names["tanh"] == 3 * 2  # poolers
    assert outputs["mlm"].predictions.shape == (*batch.mlm_ids_BT.shape, model.config.text.vocab_size)


def test_under_autocast(yardstick):
    model = with_depth(3, 2)
    batch = small_batch(model, "mlm")
    exact = yardstick_losses(yardstick, model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = yardstick_losses(yardstick, model, batch)
        image, *_ = yardstick.encode_image(model, batch.image_BCHW, None)
    assert image.dtype == torch.bfloat16  # the original's stream: its norms cast back
    for name in exact:
        assert torch.isclose(rounded[name].mean, exact[name].mean, rtol=0.02)
    got = gradients(model, objectives.total(rounded))
    assert got.keys() == gradients(model, objectives.total(exact)).keys()
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in got.values())


@pytest.mark.gpu
def test_step_on_a_gpu(yardstick):
    torch.manual_seed(0)
    model = M3AE(small_config(dropout_frac=0.1)).cuda()
    batch = yardstick.make_batch(model.config, [5, 9, 9, 7], num_masked=2, num_tokens=9).to("cuda")
    step = yardstick.OriginalStep(model, OptimConfig(learning_rate=1e-3, warmup_steps=1), 100)
    history = [step(batch)["total_loss"] for _ in range(30)]
    assert step.scaler.is_enabled() and history[-1] < 0.9 * history[0]


def test_refuses_what_the_original_does_not_train(yardstick):
    with pytest.raises(ValueError, match="CLIP ViT"):
        model = small_model("swin", objectives=("mlm",))
        next(yardstick.passes(model, small_batch(model, "mlm")))
    with pytest.raises(ValueError, match=r"got \['vqa'\]"):
        model = small_model(objectives=("mlm", "vqa"))
        next(yardstick.passes(model, small_batch(model, "mlm")))


def test_made_batches_are_as_asked_for(yardstick):
    config = small_config()
    batch = yardstick.make_batch(config, [9, 3, 6, 4, 8], num_masked=2, num_tokens=9)
    assert (~batch.is_padding_BT).sum(1).tolist() == [9, 3, 6, 4, 8]
    assert ((batch.text_ids_BT == config.text.pad_token_id) == batch.is_padding_BT).all()
    is_masked = batch.mlm_labels_BT != -100
    assert is_masked.sum(1).tolist() == [2, 1, 2, 2, 2]  # a text of three tokens has one that is not special
    assert (batch.mlm_labels_BT == batch.text_ids_BT)[is_masked].all() and not is_masked[:, 0].any()
    assert (batch.mlm_ids_BT == batch.text_ids_BT)[~is_masked].all()
    assert batch.itm_labels_B.sum() == 2 and len(batch.false_image_FCHW) == 3 and batch.patch_noise_BN.shape == (5, 16)
