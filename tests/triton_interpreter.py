"""Every Triton kernel under Triton's interpreter on the CPU, against its reference.

TRITON_INTERPRET=1 holds for a whole process, so test_triton_interpreter.py runs this file in one of its own.
"""

import pytest
import test_gather_image_patches as image_patches
import test_gather_patches as patches
import test_packed_attention as attention
import test_random_patch_order as order
import test_restore_patches as restored
import test_topk_attention as topk
import torch

from fastm3ae.kernels import (
    gather_image_patches_triton,
    gather_patches_triton,
    packed_attention_backward_triton,
    packed_attention_triton,
    random_patch_order_triton,
    restore_patches_triton,
    topk_attention_triton,
)
from fastm3ae.kernels.gather_image_patches import gather_image_patches_reference
from fastm3ae.kernels.gather_patches import (
    gather_patches_backward_reference,
    gather_patches_reference,
    scatter_patches_reference_,
)
from fastm3ae.kernels.packed_attention import philox_is_kept
from fastm3ae.kernels.random_patch_order import random_patch_order_from_seed_reference, random_patch_order_reference
from fastm3ae.kernels.restore_patches import restore_patches_backward_reference, restore_patches_reference
from fastm3ae.kernels.topk_attention import topk_attention_reference

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


# The interpreter rounds bfloat16 towards zero.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "autocast": (torch.float16, torch.float32),
    "float64": (torch.float64, torch.float64),
}
each_dtype = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())


def cases(table):
    """The cases of an op's own tests but the official ones, over which the interpreter takes a minute."""
    small = {name: case for name, case in table.items() if not name.startswith("official")}
    return pytest.mark.parametrize("case", small.values(), ids=small.keys())


def assert_sums_agree(got, eager, exact):
    """Holds a sum's error to eager's, or in float64, where eager is what counts as exact, to the sum's own rounding."""
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    else:
        patches.assert_at_most_twice_the_error([got], [eager], [exact])


@cases(order.CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_patch_order(case, dtype):
    for noise in (case.noise(dtype=dtype), case.hard_noise(dtype=dtype)):
        got = random_patch_order_triton.launch_random_patch_order(noise, case.num_kept)
        order.assert_all_equal(got, random_patch_order_reference(noise, case.num_kept))


@cases(order.CASES)
def test_random_patch_order_from_seed(case):
    sizes = case.sizes.values()
    for seed in map(torch.tensor, order.SEEDS[:1] if case.num_patches > 64 else order.SEEDS):  # for the time it takes
        got = random_patch_order_triton.launch_random_patch_order_from_seed(seed, *sizes)
        order.assert_all_equal(got, random_patch_order_from_seed_reference(seed, *sizes))


@cases(patches.CASES)
@each_dtype
def test_gather_patches(case, dtypes):
    inputs = case.inputs(*dtypes)
    assert torch.equal(gather_patches_triton.launch_gather_patches(*inputs), gather_patches_reference(*inputs))


@cases(patches.CASES)
@each_dtype
def test_gather_patches_backward(case, dtypes):
    if case.num_kept * case.width > 600 and dtypes != DTYPES["autocast"]:
        pytest.skip("large cases take the interpreter too long for every dtype")
    keep, grad = case.inputs()[1], case.grad(torch.promote_types(*dtypes))
    for needs_positions in (True, False):
        arguments = (keep, case.num_patches, dtypes[0], needs_positions)
        grad_x, grad_positions = gather_patches_triton.launch_gather_patches_backward(grad, *arguments)
        want_x, eager = gather_patches_backward_reference(grad, *arguments)
        _, exact = gather_patches_backward_reference(grad.double(), *arguments)
        assert grad_x.dtype == dtypes[0] and torch.equal(grad_x, want_x)
        assert_sums_agree(grad_positions, eager, exact)


@cases(patches.CASES)
@each_dtype
def test_scatter_patches(case, dtypes):
    x, keep, _, _ = case.inputs(dtypes[0])
    want, update = x.clone(), case.grad(dtypes[0])
    scatter_patches_reference_(want, update, keep)
    gather_patches_triton.launch_scatter_patches_(x, update, keep)
    assert torch.equal(x, want)


@cases(image_patches.CASES)
@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gather_image_patches(case, image_dtype, dtype):
    image, keep, mean, std = case.inputs(image_dtype)
    arguments = (image, keep, case.patch_size_px, mean, std, dtype)
    got = gather_image_patches_triton.launch_gather_image_patches(*arguments)
    assert torch.equal(got, gather_image_patches_reference(*arguments))


@cases(restored.CASES)
@each_dtype
def test_restore_patches(case, dtypes):
    inputs = case.inputs(*dtypes)
    assert torch.equal(restore_patches_triton.launch_restore_patches(*inputs), restore_patches_reference(*inputs))


@cases(restored.CASES)
@each_dtype
def test_restore_patches_backward(case, dtypes):
    restore, grad = case.inputs()[1], case.grad(dtypes[0])
    got_x, got = restore_patches_triton.launch_restore_patches_backward(grad, restore, case.num_kept)
    want_x, eager = restore_patches_backward_reference(grad, restore, case.num_kept)
    _, exact = restore_patches_backward_reference(grad.double(), restore, case.num_kept)
    assert torch.equal(got_x, want_x)
    assert_sums_agree(got, eager, exact)


@cases(attention.CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("num_dropped", [0, attention.NUM_DROPPED])
def test_packed_attention(case, dtype, num_dropped):
    inputs, seed = case.inputs(dtype), torch.tensor(-(2**40) - 3)
    kept = {}
    if num_dropped:
        kept["is_kept"] = philox_is_kept(seed, num_dropped, *case.offsets(), case.num_heads, case.num_slots)
    q, k, v, *memory, q_offsets, k_offsets, lens, grad = inputs
    places = (q_offsets, k_offsets, *memory, seed, *lens.values(), num_dropped)
    out, lse = packed_attention_triton.launch_packed_attention(q, k, v, *places)
    launch_backward = packed_attention_backward_triton.launch_packed_attention_backward
    got = out, *launch_backward(grad, q, k, v, out, lse, *places)
    exact = attention.out_and_grads(inputs.map(torch.Tensor.double), attention.eager, **kept)
    attention.assert_at_most_twice_the_error(got, attention.out_and_grads(inputs, attention.eager, **kept), exact)


@pytest.mark.parametrize("blocks", [(16, 16), (32, 64)], ids=str)
def test_packed_attention_drops_the_same_whatever_the_blocks(blocks, monkeypatch):
    case, seed = attention.CASES["prime"], torch.tensor(11)
    q, k, v, *memory, q_offsets, k_offsets, lens, _ = case.inputs()
    places = (q_offsets, k_offsets, *memory, seed, *lens.values(), attention.NUM_DROPPED)
    want, _ = packed_attention_triton.launch_packed_attention(q, k, v, *places)
    sizes = {"BLOCK_Q": blocks[0], "BLOCK_K": blocks[1]}
    monkeypatch.setattr(packed_attention_triton, "forward_blocks", lambda dtype, max_q_len: sizes)
    got, _ = packed_attention_triton.launch_packed_attention(q, k, v, *places)
    torch.testing.assert_close(got, want)


def test_packed_attention_of_strided_inputs():
    q, k, v, *memory, q_offsets, k_offsets, lens, grad = attention.CASES["odd"].inputs()
    places = (q_offsets, k_offsets, *memory, None, *lens.values(), 0)
    fused = torch.stack([k, v, k], dim=1)
    variants = [(q, k, v, grad), (q.mT.contiguous().mT, fused[:, 2], fused[:, 1], grad.mT.contiguous().mT)]
    results = []
    for *qkv, grad in variants:
        out, lse = packed_attention_triton.launch_packed_attention(*qkv, *places)
        launch_backward = packed_attention_backward_triton.launch_packed_attention_backward
        results.append((out, *launch_backward(grad, *qkv, out, lse, *places)))
    patches.assert_all_equal(*results)


@cases(topk.CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_topk_attention(case, dtype):
    inputs = case.inputs(dtype)
    q, k, v, num_kept, grad = inputs
    out, is_kept, log2_lse = topk_attention_triton.launch_topk_attention(q, k, v, num_kept)
    bits = (is_kept[..., None] >> torch.arange(32) & 1).bool().flatten(-2)
    assert torch.equal(bits[..., : case.num_keys], topk.chosen(q, k, v, num_kept))
    assert not bits[..., case.num_keys :].any()
    saved = out, is_kept, log2_lse
    got = out, *topk_attention_triton.launch_topk_attention_backward(grad, q, k, v, *saved)
    exact = topk.out_and_grads(inputs.map(torch.Tensor.double), topk_attention_reference)
    attention.assert_at_most_twice_the_error(got, topk.out_and_grads(inputs, topk.eager), exact)


def test_topk_attention_keeps_as_many_of_rounded_products():
    q, k, v, num_kept, _ = topk.CASES["prime"].inputs().map(lambda x: x * 3**0.5)
    _, is_kept, _ = topk_attention_triton.launch_topk_attention(q, k, v, num_kept)
    assert ((is_kept[..., None] >> torch.arange(32) & 1).sum(dim=(-1, -2)) == num_kept).all()


@pytest.mark.parametrize("name", ["q", "k"])
def test_topk_attention_of_nan(name):
    q, k, v, num_kept, _ = inputs = topk.CASES["all_but_one"].inputs()
    getattr(inputs, name)[2, 1, 3] = torch.nan
    out, _, _ = topk_attention_triton.launch_topk_attention(q, k, v, num_kept)
    reached = out[2:3] if name == "q" else out
    assert reached[:, 1].isnan().all() and out.isnan().sum() == reached[:, 1].numel()


def test_topk_attention_of_strided_inputs():
    q, k, v, num_kept, grad = topk.ODD.inputs()
    fused = torch.stack([k, v, k], dim=1)
    variants = [(q, k, v, grad), (q.mT.contiguous().mT, fused[:, 2], fused[:, 1], grad.mT.contiguous().mT)]
    results = []
    for *qkv, grad in variants:
        saved = topk_attention_triton.launch_topk_attention(*qkv, num_kept)
        results.append((*saved, *topk_attention_triton.launch_topk_attention_backward(grad, *qkv, *saved)))
    patches.assert_all_equal(*results)
