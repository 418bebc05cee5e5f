"""The examples: a stranger's ViTMAE keeps its numbers, outputs, arguments and checkpoints, and the check runs."""

import copy
import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "vitmae.py"
CONFIG = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
    "image_size": 20,
    "patch_size": 4,
}


@pytest.fixture
def accelerate(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    from vitmae import accelerate

    return accelerate


@pytest.fixture
def make_models(accelerate):
    """Makes transformers' model and ours, of the same weights."""

    def make(dtype=torch.float64, **changes):
        torch.manual_seed(0)
        model = ViTMAEForPreTraining(ViTMAEConfig(**CONFIG | changes)).to(dtype)
        with torch.no_grad():  # those that start as zeros, or small, would hide what is done to them
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model, accelerate(copy.deepcopy(model))

    return make


def make_batch(dtype=torch.float64, size_px=20):
    torch.manual_seed(1)
    return torch.randn(3, 3, size_px, size_px, dtype=dtype), torch.rand(3, (size_px // 4) ** 2)


@pytest.mark.parametrize("mask_ratio", [0.75, 0.5, 0.05])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_outputs_and_every_gradient_are_those_of_transformers(make_models, norm_pix_loss, mask_ratio):
    image, noise = make_batch()
    models = make_models(norm_pix_loss=norm_pix_loss, mask_ratio=mask_ratio)
    want, got = (model(image, noise=noise, output_hidden_states=True, output_attentions=True) for model in models)
    assert type(got) is type(want) and got.keys() == want.keys()
    assert torch.equal(got.mask, want.mask) and got.mask.dtype == want.mask.dtype
    assert torch.equal(got.ids_restore, want.ids_restore)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.hidden_states, want.hidden_states, rtol=1e-9, atol=1e-12)
    for output in (want, got):
        output.loss.backward()
    grads = [{name: p.grad for name, p in model.named_parameters() if p.requires_grad} for model in models]
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 50
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-8, atol=1e-12, msg=name)


def test_float32_agrees_to_five_digits(make_models):
    image, noise = make_batch(torch.float32)
    want, got = (model(image, noise=noise).loss for model in make_models(torch.float32))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_the_same_seed_hides_the_same_patches(make_models):
    image, _ = make_batch()
    outputs = []
    for model in make_models():
        torch.manual_seed(7)
        outputs.append(model(image))
    assert torch.equal(outputs[0].mask, outputs[1].mask) and outputs[0].mask.sum() == 3 * 19
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-9, atol=0)


def test_bfloat16_under_autocast(make_models):
    image, noise = make_batch(torch.float32)
    losses = []
    for model in make_models(torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(image, noise=noise).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=0.01, atol=0)


def test_images_of_another_size(make_models):
    image, noise = make_batch(size_px=28)
    want, got = (model(image, noise=noise, interpolate_pos_encoding=True) for model in make_models())
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-9, atol=0)
    for model in make_models():
        with pytest.raises(ValueError, match="doesn't match model"):
            model(image, noise=noise)


def test_a_users_way_of_calling_it(make_models, tmp_path):
    image, noise = make_batch()
    plain, ours = make_models()
    assert inspect.signature(ours.forward).parameters.keys() == inspect.signature(plain.forward).parameters.keys()
    want, got = (model(image, noise=noise, return_dict=False) for model in (plain, ours))
    assert isinstance(got, tuple) and len(got) == len(want)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    ours.save_pretrained(tmp_path)
    again = ViTMAEForPreTraining.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again(image, noise=noise).loss, plain(image, noise=noise).loss)
    other = copy.deepcopy(ours)
    with torch.no_grad():
        other.decoder.mask_token[..., 0] += 1  # adding to all would be taken out by the normalisation
    assert not torch.equal(other(image, noise=noise).loss, ours(image, noise=noise).loss)
    torch.testing.assert_close(ours(image, noise=noise).loss, got[0])


def test_what_can_not_be_accelerated(accelerate, make_models):
    with pytest.raises(ValueError, match="must be a ViTMAEForPreTraining of 3 channels, got Linear"):
        accelerate(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="3 channels"):
        make_models(num_channels=1)


def test_the_check_in_its_small_form():
    command = [sys.executable, EXAMPLE, "--config", "small", "--rounds", "5", "--device", "cpu", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stdout + result.stderr
    *_, parts, step, peak = result.stdout.splitlines()
    assert parts.startswith("masking, unshuffle, patchify and loss, times as fast: ")
    assert step.startswith("the whole step, times as fast: ") and "not measured" in peak
    assert "apart by" in result.stdout


def test_the_check_times_nothing_that_is_wrong(monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import vitmae
    import vitmae_step

    def wrong(self, patches_BKD, keep_BK, right=vitmae.add_positions):
        return right(self, patches_BKD, keep_BK) * 1.001

    monkeypatch.setattr(vitmae, "add_positions", wrong)
    monkeypatch.setattr(sys, "argv", ["vitmae.py", "--config", "small", "--device", "cpu"])
    with pytest.raises(SystemExit, match="nothing is timed"):
        vitmae_step.main(EXAMPLE)
    assert "milliseconds" not in capsys.readouterr().out


@pytest.mark.parametrize(("parts_target", "status"), [(0.01, 0), (1000.0, 1)])
def test_the_check_holds_its_targets(monkeypatch, parts_target, status):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import vitmae_step

    size = dataclasses.replace(vitmae_step.SIZES["small"], parts_target=parts_target, step_target=0.01, parts_batch=2)
    monkeypatch.setitem(vitmae_step.SIZES, "small", dataclasses.replace(size, step_batch=2))
    monkeypatch.setattr(sys, "argv", ["vitmae.py", "--config", "small", "--rounds", "1", "--device", "cpu", "--check"])
    stopped = 0
    try:
        vitmae_step.main(EXAMPLE)
    except SystemExit as stop:
        stopped = stop.code
    assert stopped == status
