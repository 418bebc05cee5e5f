"""The memory's forms: their derivatives, their formulas, and what must not change them."""

import mpma_reference as reference
import numpy as np
import pytest
import torch
from mpma_models import MEMORIES, small_config

from fastm3ae.kernels import packed_attention, topk_attention
from fastm3ae.model.memory_fusion import FusionPlan, MemoryFusion, MemorySlots, TopKMemory
from fastm3ae.model.rows import Layout, send

TEXTS, PATCHES = np.array([4, 1, 6, 2]), np.array([3, 3, 3, 3])
READ, NUM_READ = np.array([1, 2, 6, 9]), np.array([2, 0, 2, 0])


def fusion_of(memory, seed=0, **sizes):
    torch.manual_seed(seed)
    return MemoryFusion(small_config(memory=memory, **sizes)).double()


def plan_of(num_layers, read=READ, num_read=NUM_READ, texts=TEXTS):
    plan = FusionPlan(Layout(texts), Layout(PATCHES[: len(texts)]), read, num_read, num_layers)
    send(plan.indices(), torch.device("cpu"))
    return plan


def inputs(width=48, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(int(n.sum()), width, generator=generator, dtype=torch.float64) for n in (TEXTS, PATCHES)]


@pytest.mark.parametrize("memory", MEMORIES)
def test_gradcheck(memory):
    """Towards the tokens and all parameters of the memory."""
    from fastm3ae.config import FusionConfig

    fusion = fusion_of(
        memory, fusion=FusionConfig(width=8, num_layers=2, num_heads=2, mlp_ratio=1, dropout_frac=0.0),
        num_slots=3, num_topk_slots=6, num_topk_kept=2,
    )  # fmt: skip
    plan = plan_of(2)
    text, patches = (x.requires_grad_() for x in inputs(width=8))
    names = [name for name, _ in fusion.named_parameters() if name.startswith(("slots", "topk"))]
    leaves = [fusion.get_parameter(name).detach().clone().requires_grad_() for name in names]
    assert bool(leaves) == (memory != "none")

    def run(text, patches, *leaves):
        parameters = dict(zip(names, leaves, strict=True))
        return torch.func.functional_call(fusion, parameters, (text, patches, plan.layers))

    assert torch.autograd.gradcheck(run, (text, patches, *leaves))


@pytest.mark.parametrize("memory", MEMORIES)
def test_rows_that_are_not_read_change_nothing(memory):
    fusion, (text, patches) = fusion_of(memory), inputs()
    everything = plan_of(3, np.arange(int(TEXTS.sum())), TEXTS)
    want = fusion(text, patches, everything.layers)[READ]
    assert torch.allclose(fusion(text, patches, plan_of(3).layers), want, rtol=1e-12, atol=1e-12)


def test_slots_are_seen_by_every_report_whatever_its_length():
    """Also by one of a single token, whose attention to a constant image is then a constant but for the slots."""
    fusion, (text, patches) = fusion_of("slots"), inputs()
    plan = plan_of(3, np.arange(int(TEXTS.sum())), TEXTS)
    before = fusion(text, patches, plan.layers)
    with torch.no_grad():
        fusion.slots[2].values.add_(1.0)
    after = fusion(text, patches, plan.layers)
    assert (before != after).any(dim=1).all()


def test_without_slots_attention_is_plain_attention_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 4, 8, generator=generator) for n in (13, 12, 12))
    ends = [torch.tensor([0, *np.cumsum(n)], dtype=torch.int32) for n in (TEXTS, PATCHES)]
    options = {"max_q_len": 6, "max_k_len": 3}
    plain = packed_attention(q, k, v, *ends, **options)
    assert torch.equal(packed_attention(q, k, v, *ends, **options, memory=(k[:0], v[:0])), plain)


def test_none_is_the_plain_layers():
    """The control is what the slots' fusion is when its slots get no weight at all."""
    none, slots = fusion_of("none"), fusion_of("slots")
    slots.load_state_dict(none.state_dict(), strict=False)
    text, patches = inputs()
    plan = plan_of(3)
    for layer in slots.slots:  # keys that every query scores far below the patches
        torch.nn.init.zeros_(layer.keys)
        torch.nn.init.zeros_(layer.values)
    plain = none(text, patches, plan.layers)
    assert not torch.allclose(slots(text, patches, plan.layers), plain)  # a key of zeros still takes its share
    for number, layer in enumerate(slots.slots):
        for stack in (none, slots):  # the same large positive offset in every query, which patches' keys ignore
            torch.nn.init.constant_(stack.layers[number].cross_q.bias, 40.0)
            torch.nn.init.zeros_(stack.layers[number].cross_kv.weight)
        torch.nn.init.constant_(layer.keys, -40.0)
    assert torch.equal(slots(text, patches, plan.layers), none(text, patches, plan.layers))


def test_slots_start_as_published():
    torch.manual_seed(0)
    slots = MemorySlots(64, 768, 12)
    assert slots.keys.std().item() == pytest.approx(1 / 64, rel=0.02)
    assert slots.values.std().item() == pytest.approx(1 / 64, rel=0.02)
    keys, values = slots()
    assert keys.shape == values.shape == (64, 12, 64)
    assert torch.equal(keys.flatten(1), slots.keys * 8) and torch.equal(values.flatten(1), slots.values * 8)
    assert MemorySlots(16, 96, 2).keys.std().item() == pytest.approx(1 / 48, rel=0.05)


@pytest.mark.parametrize("num_kept", [1, 3, 11])
def test_topk_attention_is_the_literal_one(num_kept):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 4, 6, generator=generator, dtype=torch.float64) for n in (7, 11, 11))
    want = reference.topk_attention(q.flatten(1), k.flatten(1), v.flatten(1), 4, num_kept)
    assert torch.allclose(topk_attention(q, k, v, num_kept).flatten(1), want, rtol=1e-12, atol=1e-14)
    if num_kept == 11:
        want = reference.attention(q.flatten(1), k.flatten(1), v.flatten(1), 4)
        assert torch.allclose(topk_attention(q, k, v, num_kept).flatten(1), want, rtol=1e-12, atol=1e-14)


def test_both_modalities_read_one_matrix():
    torch.manual_seed(0)
    memory = TopKMemory(11, 3, 48, 4)
    assert memory.matrix.shape == (11, 48)
    fusion, (text, patches) = fusion_of("topk"), inputs()
    fusion(text, patches, plan_of(3).layers).sum().backward()
    assert [name for name, _ in fusion.named_parameters() if "matrix" in name] == ["topk.matrix"]
    assert fusion.topk.matrix.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", MEMORIES)
def test_autocast(memory, dtype):
    """The slots, which no product casts, go along."""
    fusion, (text, patches) = fusion_of(memory).float(), [x.float() for x in inputs()]
    plan = plan_of(3)
    with torch.autocast("cpu", dtype=dtype):
        got = fusion(text, patches, plan.layers)
    got.float().sum().backward()
    assert torch.allclose(got.float(), fusion(text, patches, plan.layers), atol=0.2)
