"""The recorded numbers of the original, replayed; and proof that the comparison notices what it should."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import parity
import pytest
import torch
from parity_model import build, check_model, load_state, make_batches, run
from safetensors.torch import load_file

from fastm3ae.model.m3ae import M3AE
from fastm3ae.weights.convert import config_from_official, from_official

GOLDEN = Path(__file__).parent / "data" / "golden"
C1 = GOLDEN / "c1_clip_roberta_pretrain.safetensors"


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.safetensors")))
def test_golden(name):
    checks = list(parity.checks_of(GOLDEN / f"{name}.safetensors"))
    missed = [check for check in checks if not check.ok]
    assert checks and not missed, "\n".join(map(str, missed))


def test_program_fails_on_a_changed_number(tmp_path):
    for source in GOLDEN.glob("pos_embed_tables.*"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    program = [sys.executable, parity.__file__, str(tmp_path)]
    assert subprocess.run(program, capture_output=True).returncode == 0
    tensors = load_file(GOLDEN / "pos_embed_tables.safetensors")
    tensors["clip/4to6/after"][3, 3] += 1e-3
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "pos_embed_tables.safetensors")
    result = subprocess.run(program, capture_output=True, text=True)
    assert result.returncode == 1 and "MISS" in result.stdout and "clip/4to6/after" in result.stdout


def test_program_fails_on_an_empty_folder(tmp_path):
    result = subprocess.run([sys.executable, parity.__file__, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 1 and "no goldens found" in result.stdout


def set_eps(part, eps):
    def mutate(model):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.LayerNorm) and name.startswith(part):
                module.eps = eps

    return mutate


def sequential_fusion(model):
    def forward(text, image, is_padding, num_layers=None):
        from fastm3ae.model.fusion import FusionStates

        states = FusionStates([text], [image])
        layers = list(zip(model.fusion.text_layers, model.fusion.image_layers, strict=True))
        for text_layer, image_layer in layers[:num_layers]:
            states.text.append(text_layer(states.text[-1], states.image[-1], is_padding, None))
            states.image.append(image_layer(states.image[-1], states.text[-1], None, is_padding))
        return states

    model.fusion.forward = forward


MUTATIONS = {
    "fusion eps 1e-5": set_eps("fusion.", 1e-5),
    "vision eps 1e-6": set_eps("vision.", 1e-6),
    "text eps 1e-12": set_eps("text.", 1e-12),
    "mlm head eps 1e-5": set_eps("mlm_head.", 1e-5),
    "decoder eps 1e-6": set_eps("mim_decoder.", 1e-6),
    "sequential co-attention": sequential_fusion,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_float64_losses_notice(mutation):
    """Each of these faults moves a float64 loss beyond the tolerance, so the goldens would show it."""
    tensors = load_file(C1)
    model, _ = build(C1, torch.float64)
    MUTATIONS[mutation](model)
    batches = make_batches(tensors, model, torch.float64)
    errors = [
        abs(run(model, name, batch)[1].mean.item() - tensors[f"f64/{name}/loss"].item())
        for name, batch in batches.items()
    ]
    assert max(errors) > 1e-9


def test_check_model_reports_what_it_cannot_compute(tmp_path):
    from safetensors.torch import save_file

    tensors = load_file(C1)
    tensors["out/mlm/something_new"] = torch.zeros(3)
    save_file(tensors, tmp_path / C1.name)
    (tmp_path / C1.with_suffix(".json").name).write_bytes(C1.with_suffix(".json").read_bytes())
    missed = [check for check in check_model(tmp_path / C1.name) if not check.ok]
    assert [check.name for check in missed] == ["out/mlm/something_new"]


def test_two_passes_of_train_mode_without_dropout_equal_eval():
    model, _ = build(C1, torch.float32)
    batches = make_batches(load_file(C1), model, torch.float32)
    for name, batch in batches.items():
        model.eval()
        expected = run(model, name, batch)[1].mean
        model.train()
        assert torch.equal(run(model, name, batch)[1].mean, expected)


def test_dropout_only_where_it_belongs():
    """With dropout on, the language tower and the fusion are random, the vision tower and the decoder are not."""
    state = load_state(C1)
    import json

    meta = json.loads(C1.with_suffix(".json").read_text())
    config = config_from_official(meta["config"], state, meta["text_encoder"])
    config = dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, dropout_frac=0.1),
        fusion=dataclasses.replace(config.fusion, dropout_frac=0.1),
    )
    model = M3AE(config).train()
    ours, _ = from_official(state, model)
    model.load_state_dict({**model.state_dict(), **ours})
    image = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.encode_image(image), model.encode_image(image))
    ids = torch.randint(4, 190, (2, 8))
    is_padding = torch.zeros(2, 8, dtype=torch.bool)
    assert not torch.equal(model.encode_text(ids, is_padding), model.encode_text(ids, is_padding))
    model.text.eval()
    text, tokens = model.encode_text(ids, is_padding), model.encode_image(image)
    assert not torch.equal(
        model.fusion(text, tokens, is_padding).text[-1], model.fusion(text, tokens, is_padding).text[-1]
    )
