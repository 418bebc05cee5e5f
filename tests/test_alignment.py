"""Global and local alignment against their literal forms, also when the batch is divided."""

import mpma_reference as reference
import pytest
import torch
import torch.nn.functional as F

from fastm3ae.config import AlignmentConfig
from fastm3ae.model.alignment import GlobalFeatures, GlobalHead, alone, cls_attention, info_nce, local_alignment


def unit(*shape, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).requires_grad_(**options)


def leaves(num_pairs, width=7):
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    return unit(num_pairs, width), unit(num_pairs, width, seed=1), scale


@pytest.mark.parametrize("num_pairs", [1, 2, 7, 64])
def test_info_nce_is_the_literal_one(num_pairs):
    image, report, scale = leaves(num_pairs)
    loss, num_correct = info_nce(GlobalFeatures(image, report, scale), alone)
    want = reference.info_nce(image, report, scale)
    assert torch.allclose(loss, want, rtol=1e-12, atol=1e-15)
    for got, expected in zip(*(torch.autograd.grad(x, (image, report, scale)) for x in (loss, want)), strict=True):
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-14)
    products = image @ report.T
    assert num_correct == sum(int(products[i].argmax()) == i for i in range(num_pairs))
    if num_pairs == 1:
        assert loss == 0 and num_correct == 1


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 5, 1), (1,) * 7])
def test_passes_add_up_to_the_whole_batch(sizes):
    """Each pass with the others' features without gradients; weights are the passes' shares."""
    image, report, scale = leaves(7)
    whole = info_nce(GlobalFeatures(image, report, scale), alone)
    everything = GlobalFeatures(image, report, scale).stacked()
    total, num_correct, first = 0, 0, 0
    for size in sizes:
        rows = slice(first, first + size)
        own = GlobalFeatures(image[rows], report[rows], scale)
        loss, right = info_nce(own, lambda x, first=first: (everything, first))
        total, num_correct, first = total + loss * size / 7, num_correct + right, first + size
    assert torch.allclose(total, whole[0], rtol=1e-12) and num_correct == whole[1]
    for got, want in zip(*(torch.autograd.grad(x, (image, report, scale)) for x in (total, whole[0])), strict=True):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-14)


def test_without_the_others_the_gradient_would_be_another():
    """A pass that left out what it does to the others' losses would miss a part of the gradient."""
    image, report, scale = leaves(4)
    everything = GlobalFeatures(image, report, scale).stacked()
    own = GlobalFeatures(image[:2], report[:2], scale)
    loss, _ = info_nce(own, lambda x: (everything, 0))
    logits = torch.cat([image[:2], image[2:].detach()]) @ torch.cat([report[:2], report[2:].detach()]).T * scale
    rows = (F.cross_entropy(x[:2], torch.arange(2)) for x in (logits, logits.T))
    half = sum(rows) / 2
    assert torch.allclose(half, loss)
    grads = [torch.autograd.grad(x, image)[0] for x in (loss, half)]
    assert not torch.allclose(*grads)


RAGGED = (0, 1, 5, 3)


def words_of(counts, width=6):
    num, longest = len(counts), max(1, *counts)
    words = unit(num, longest, width, requires_grad=True)
    is_absent = torch.arange(longest) >= torch.tensor(counts)[:, None]
    weights = torch.rand(num, longest, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = weights.masked_fill(is_absent, 0)
    return words, is_absent, weights / weights.sum(1, keepdim=True).clamp(min=1e-9)


@pytest.mark.parametrize("counts", [RAGGED, (4, 4), (1,), (0, 0)])
def test_local_alignment_is_the_literal_one(counts):
    words, is_absent, weights = words_of(counts)
    patches = unit(len(counts), 4, 6, seed=3, requires_grad=True)
    patch_weights = torch.rand(len(counts), 4, dtype=torch.float64).softmax(1)
    got = local_alignment(words, is_absent, weights, patches, patch_weights, 0.1)
    want = torch.zeros((), dtype=torch.float64)
    for b, n in enumerate(counts):
        if n:
            pair = words[b, :n], weights[b, :n], patches[b], patch_weights[b]
            want = want + reference.local_loss(*pair, 0.1) / len(counts)
    assert torch.allclose(got, want, rtol=1e-11, atol=1e-15)
    grads = torch.autograd.grad(got, (words, patches))
    assert not grads[0][is_absent].any()  # exactly
    if any(counts):
        for grad, expected in zip(grads, torch.autograd.grad(want, (words, patches)), strict=True):
            assert torch.allclose(grad, expected, rtol=1e-9, atol=1e-13)


def test_absent_words_change_no_bit():
    words, is_absent, weights = words_of(RAGGED)
    patches, patch_weights = unit(len(RAGGED), 4, 6, seed=3), torch.full((len(RAGGED), 4), 0.25, dtype=torch.float64)
    other = words.where(~is_absent[..., None], unit(*words.shape, seed=9))
    results = [local_alignment(w, is_absent, weights, patches, patch_weights, 0.1) for w in (words, other)]
    assert torch.equal(*results) and results[0] > 0


def test_cls_attention():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(3, 2, 8, generator=generator), torch.randn(3, 5, 2, 8, generator=generator)
    is_absent = torch.arange(5) >= torch.tensor([0, 2, 5])[:, None]
    weights = cls_attention(q, k, is_absent)
    assert weights.sum(1).tolist() == pytest.approx([0, 1, 1]) and not weights[is_absent].any()
    by_head = [(k[1, :2, h] @ q[1, h] / 8**0.5).softmax(0) for h in range(2)]
    assert torch.allclose(weights[1, :2], sum(by_head) / 2)
    assert torch.allclose(cls_attention(q, k)[2], weights[2])


@pytest.mark.parametrize("is_learned", [False, True])
def test_temperature(is_learned):
    head = GlobalHead(8, 6, AlignmentConfig(temperature=0.2, learn_temperature=is_learned, head_width=5, width=4))
    assert (head.log_temperature is not None) == is_learned
    features = head(torch.randn(3, 8), torch.randn(3, 6))
    assert features.scale.item() == pytest.approx(5)
    assert torch.allclose(features.image_BE.norm(dim=1), torch.ones(3))
    if is_learned:
        torch.nn.init.constant_(head.log_temperature, -9.0)
        assert head(torch.randn(3, 8), torch.randn(3, 6)).scale == 100  # as CLIP


def test_autocast_leaves_the_comparison_in_float32():
    image, report, scale = (x.detach().float() for x in leaves(8))
    features = GlobalFeatures(image, report, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = info_nce(features, alone)
    assert loss.dtype == torch.float32 and torch.equal(loss, info_nce(features, alone)[0])
