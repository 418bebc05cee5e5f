"""The yardstick of MPMA's step gives its losses and gradients."""

from pathlib import Path

import pytest
import torch
from mpma_models import small_batch, small_model

from fastm3ae import objectives

FORMS = {
    "slots": {},
    "topk": {"memory": "topk"},
    "none": {"memory": "none"},
    "roberta, mean features, learned temperature, plain pixels": {
        "text": "roberta",
        "alignment": {"pool": "mean", "learn_temperature": True},
        "image": {"normalize_target": False},
    },
}


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import plain_mpma

    return plain_mpma


def gradients(model, loss):
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_losses_and_gradients_are_ours(plain, form, is_fused):
    model = small_model(**FORMS[form])
    batch = small_batch(model.config)
    theirs = plain.losses(model, batch, is_fused)
    ours = {name: loss.mean for name, loss in objectives.losses(model(batch), batch, model.config).items()}
    assert list(theirs) == list(ours)
    for name in ours:
        assert abs(theirs[name] - ours[name]) < 1e-9, name
        got, want = gradients(model, theirs[name]), gradients(model, ours[name])
        for parameter in got.keys() | want.keys():
            zero = torch.zeros(())
            difference = got.get(parameter, zero) - want.get(parameter, zero)
            assert difference.abs().max() < 1e-9, (name, parameter)
        assert any(gradient.abs().max() > 1e-4 for gradient in want.values())


def test_dropout_is_where_ours_has_it(plain):
    """Nearly everything is dropped, so that only what has no dropout keeps its loss."""
    model = small_model(dropout_frac=0.9).train()
    batch = small_batch(model.config)
    torch.manual_seed(0)
    first, second = plain.losses(model, batch), plain.losses(model, batch)
    assert first["image_reconstruction"] == second["image_reconstruction"]
    assert first["report_reconstruction"] != second["report_reconstruction"]


@pytest.mark.parametrize(
    "form", [{"masking": "separate"}, {"alignment": {"view": "full"}}, {"image": {"target_scale": 2}}]
)
def test_other_forms_are_refused(plain, form):
    model = small_model(**form)
    with pytest.raises(ValueError, match="masked view, paired masking"):
        plain.losses(model, small_batch(model.config))
