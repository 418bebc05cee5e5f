"""The FLOPs of a step are counted right, by part of the model, and hold their targets."""

import dataclasses
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import mpma_models
import pytest
import torch
from models import small_config, small_model
from torch.utils.flop_counter import FlopCounterMode

from fastm3ae import objectives
from fastm3ae.kernels import masked_token_loss, packed_attention, topk_attention
from fastm3ae.training.flops import FlopsByPart, count_flops, model_without_values

# FLOPs per sample, forward and backward, counted in the original's own code.
ORIGINAL = {
    "mlm": {
        "text encoder": (11022630912, 22045261824),
        "image encoder": (54558385152, 108734564352),
        "projections": (458883072, 917766144),
        "fusion, text layers": (11401297920, 22802595840),
        "fusion, image layers": (35440625664, 59067709440),
        "poolers": (2359296, 0),
        "MLM head": (5016748032, 10033496064),
    },
    "mim": {
        "text encoder": (11022630912, 22045261824),
        "image encoder": (13377933312, 26373660672),
        "projections": (172228608, 344457216),
        "fusion, text layers": (7674789888, 5116526592),
        "fusion, image layers": (9252052992, 9252052992),
        "poolers": (2359296, 0),
        "MIM decoder": (5489645568, 10979291136),
    },
    "itm": {
        "text encoder": (11022630912, 22045261824),
        "image encoder": (54558385152, 108734564352),
        "projections": (458883072, 917766144),
        "fusion, text layers": (11401297920, 22802595840),
        "fusion, image layers": (35440625664, 70881251328),
        "poolers": (2359296, 4718592),
        "ITM head": (6144, 12288),
    },
}


@pytest.fixture(autouse=True)
def flops(monkeypatch):
    """The folder with the benchmarks is importable."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import flops

    return flops


def test_yardstick_is_the_original_in_every_part(flops):
    case = flops.CASES[0]
    counted = flops.count(case)
    got = {
        name: {
            part: tuple(column[part, direction] // flops.NUM_PAIRS for direction in flops.DIRECTIONS)
            for part in {part for part, _ in column}
        }
        for name, column in counted.items()
    }
    assert got == ORIGINAL
    forward, backward = (flops.per_sample(counted, direction) for direction in flops.DIRECTIONS)
    assert (forward, forward + backward) == (277_776_758_784, 800_875_573_248)
    assert case.is_met(forward, forward + backward)
    assert not case.is_met(forward, forward + backward - 2) and not case.is_met(forward - 2, forward + backward)


def one_loss(model, batch):
    """A step with one loss for all objectives, which also encodes its images once more than it needs."""
    from original_step import passes

    model.vision(batch.image_BCHW)
    yield "all", sum(outputs.loss for _, outputs in passes(model, batch))


@pytest.fixture
def small_cases(flops, monkeypatch):
    monkeypatch.setattr(flops, "official_config", small_config)
    monkeypatch.setattr(flops, "NUM_TOKENS", 9)
    original = dataclasses.replace(flops.CASES[0], num_valid=9, num_masked=2)
    return original, dataclasses.replace(original, title="another step", losses=one_loss)


def test_a_step_with_one_loss_and_work_without_a_loss(flops, small_cases):
    original, another = (flops.count(case) for case in small_cases)
    want = sum(original.values(), Counter())
    want["image encoder", "forward"] += original["mlm"]["image encoder", "forward"]
    assert another == {"all": want}


def test_check_holds_every_case(flops, small_cases, monkeypatch, capsys):
    counted = {case.title: flops.count(case) for case in small_cases}
    monkeypatch.setattr(flops, "count", lambda case: counted[case.title])
    for are_met, is_check, status in [
        ((True, True), True, None),
        ((True, False), True, 1),
        ((False, True), True, 1),
        ((False, True), False, None),
    ]:
        cases = [
            dataclasses.replace(case, is_met=lambda *_, is_met=is_met: is_met)
            for case, is_met in zip(small_cases, are_met, strict=True)
        ]
        monkeypatch.setattr(flops, "CASES", cases)
        monkeypatch.setattr("sys.argv", ["flops.py", *["--check"] * is_check])
        with pytest.raises(SystemExit) if status else nullcontext() as stop:
            flops.main()
        assert not status or stop.value.code == status
    assert "another step: 9 of 9 tokens valid" in capsys.readouterr().out


def test_token_loss_is_counted():
    """Its products are hidden from torch's counter, also those of the gradients."""
    tokens, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((6, 8), (10, 8), (10,)))
    labels = torch.arange(6)
    with FlopCounterMode(display=False) as counter:
        masked_token_loss(tokens, weight, bias, labels)[0].backward()
    assert counter.get_total_flops() == 3 * 2 * 6 * 8 * 10
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        masked_token_loss(tokens, weight, bias, labels)
    assert counter.get_total_flops() == 2 * 6 * 8 * 10


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_packed_attention_is_counted(device):
    """Where tensors have no values, the lengths are those that were on the host before."""
    offsets = torch.tensor([0, 3, 3, 7, 0, 5, 9, 11], dtype=torch.int32)
    q, k, v, slots = (torch.randn(num, 2, 8, device=device, requires_grad=True) for num in (7, 11, 11, 3))
    with FlopsByPart(small_model()) as counter:
        q_offsets, k_offsets = offsets.to(device, non_blocking=True).split([4, 4])
        options = {"max_q_len": 4, "max_k_len": 5, "memory": (slots, slots)}
        context = packed_attention(q, k, v, q_offsets, k_offsets, **options)
        forward = counter.take().total()
        context.sum().backward()
        backward = counter.take().total()
    num_weights = 3 * (5 + 3) + 4 * (2 + 3)
    assert (forward, backward) == (4 * num_weights * 2 * 8, 8 * num_weights * 2 * 8)


@pytest.mark.parametrize("memory", mpma_models.MEMORIES)
def test_mpma_is_counted_by_part_and_without_values(memory):
    """What a model without values needs is what one with values does."""
    counted = []
    for model in (
        mpma_models.small_model(memory=memory),
        model_without_values(mpma_models.small_config(memory=memory)),
    ):
        batch = mpma_models.small_batch(model.config, dtype=torch.float64 if not counted else torch.float32)
        batch = batch.to(next(model.parameters()).device)

        def losses(model=model, batch=batch):
            yield "step", objectives.total(objectives.losses(model(batch), batch, model.config))

        counted.append(count_flops(model, losses())["step"])
    assert counted[0] == counted[1]
    assert {part for part, _ in counted[0]} == {
        "text encoder", "image encoder", "projections", "MLM head", "MIM decoder", "memory fusion", "alignment heads",
    }  # fmt: skip


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_topk_attention_is_counted(device):
    q, k, v = (torch.randn(num, 2, 8, device=device, requires_grad=True) for num in (7, 11, 11))
    with FlopCounterMode(display=False) as counter:
        context = topk_attention(q, k, v, 3)
        forward = counter.get_total_flops()
        context.sum().backward()
    assert (forward, counter.get_total_flops()) == (4 * 7 * 11 * 2 * 8, 12 * 7 * 11 * 2 * 8)
