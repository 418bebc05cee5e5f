"""Attention to the best keys by a search for the product that divides them from the others; no score leaves a program.

A program takes a block of queries in one head. Its products with all keys fit nowhere, but the keys are few and lie in
the cache, so that it makes the products again whenever it needs them. Between a product that is certainly too small and
one that is certainly too large it counts, at three places at a time, how many products are larger, and goes on with
the quarter in which the number that is asked for lies: 16 times at the most, because float32 has 2^32 values, and 8
times in general, because it ends as soon as a number is right. Then one pass attends.

For the backward pass it stores one bit per query, head and key. The kernels there are those of attention with a mask:
with p the weights and delta[i] = out[i] . grad[i], dp = grad v^T, ds = p * (dp - delta), and grad_q = ds k / sqrt(d),
grad_k = ds^T q / sqrt(d), grad_v = p^T grad. Each row of a gradient is summed by one program, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastm3ae.kernels.packed_attention_triton import LOG2_E, contiguous_rows, load_rows

__all__ = ["launch_topk_attention", "launch_topk_attention_backward"]

_LOWEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)
# Numbers that Triton would otherwise compile for each multiple of 16 and for 1 apart.
_CHANGING = ("S", "M", "num_words", "num_kept")


@triton.jit
def _ordered(x):
    """float32 as int32 in the same order, -0 like 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(ordered):
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high):
    """Their mean, rounded down, whose sum would not fit."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _products(q, k_ptr, start, M, h, stride_km, stride_kh, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """(BLOCK_S, BLOCK_M): q . k, minus infinity after the last key."""
    m = start + tl.arange(0, BLOCK_M)
    k = load_rows(k_ptr, 0, m, M, h, stride_km, stride_kh, D)
    return tl.where((m < M)[None, :], tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))


@triton.jit
def _narrowed(low, high, num_low, num_high, place, num, num_kept):
    """The bounds and how many products are not smaller, after a place between them with its number."""
    raises_low = (num >= num_kept) & (place >= low)
    lowers_high = (num < num_kept) & (place < high)
    low, num_low = tl.where(raises_low, place, low), tl.where(raises_low, num, num_low)
    high, num_high = tl.where(lowers_high, place, high), tl.where(lowers_high, num, num_high)
    return low, high, num_low, num_high


@triton.jit(do_not_specialize=_CHANGING)
def _topk_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    is_kept_ptr,
    log2_lse_ptr,
    S,
    H,
    M,
    num_words,
    num_kept,
    stride_qs,
    stride_qh,
    stride_km,
    stride_kh,
    stride_vm,
    stride_vh,
    log2_scale,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    h = tl.program_id(1)
    place = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    is_query = place < S
    q = load_rows(q_ptr, 0, place, S, h, stride_qs, stride_qh, D)

    # Of each column of the blocks the largest is among the products, so that as many are at least the smallest of them.
    tops = tl.full((BLOCK_S, BLOCK_M), float("-inf"), dtype=tl.float32)
    for start in range(0, M, BLOCK_M):
        tops = tl.maximum(tops, _products(q, k_ptr, start, M, h, stride_km, stride_kh, D, BLOCK_M))
    largest = tl.max(tops, axis=1)
    low = tl.where(num_kept <= BLOCK_M, tl.min(tops, axis=1), _LOWEST)
    low, high = _ordered(tl.maximum(low, _LOWEST)), _ordered(largest) + 1
    num_low = tl.where(is_query, M, num_kept)
    num_high = tl.zeros((BLOCK_S,), dtype=tl.int32)
    while tl.max(((num_low != num_kept) & (low + 1 < high)).to(tl.int32), axis=0) > 0:
        second = _middle(low, high)
        first, third = _middle(low, second), _middle(second, high)
        num_first = tl.zeros((BLOCK_S,), dtype=tl.int32)
        num_second = tl.zeros((BLOCK_S,), dtype=tl.int32)
        num_third = tl.zeros((BLOCK_S,), dtype=tl.int32)
        for start in range(0, M, BLOCK_M):
            s = _products(q, k_ptr, start, M, h, stride_km, stride_kh, D, BLOCK_M)
            # Not smaller, because NaN counts among the largest.
            num_first += tl.sum(tl.where(s < _value(first)[:, None], 0, 1), axis=1)
            num_second += tl.sum(tl.where(s < _value(second)[:, None], 0, 1), axis=1)
            num_third += tl.sum(tl.where(s < _value(third)[:, None], 0, 1), axis=1)
        low, high, num_low, num_high = _narrowed(low, high, num_low, num_high, first, num_first, num_kept)
        low, high, num_low, num_high = _narrowed(low, high, num_low, num_high, second, num_second, num_kept)
        low, high, num_low, num_high = _narrowed(low, high, num_low, num_high, third, num_third, num_kept)

    # Kept are the products from `high` on and those between the bounds. Where these are too many they are equal, and
    # kept before `end`, an index that is searched for in the same way.
    smallest, above = _value(low)[:, None], _value(high)[:, None]
    begin, end = tl.zeros((BLOCK_S,), dtype=tl.int32), tl.full((BLOCK_S,), M, dtype=tl.int32)
    while tl.max(tl.where(num_low > num_kept, end - begin, 0), axis=0) > 1:
        middle = (begin + end) // 2
        num = num_high
        for start in range(0, M, BLOCK_M):
            s = _products(q, k_ptr, start, M, h, stride_km, stride_kh, D, BLOCK_M)
            is_before = (start + tl.arange(0, BLOCK_M))[None, :] < middle[:, None]
            num += tl.sum(((s >= smallest) & (s < above) & is_before).to(tl.int32), axis=1)
        begin, end = tl.where(num < num_kept, middle, begin), tl.where(num < num_kept, end, middle)

    total = tl.zeros((BLOCK_S,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_S, D), dtype=tl.float32)
    row = h.to(tl.int64) * S + place
    for start in range(0, M, BLOCK_M):
        s = _products(q, k_ptr, start, M, h, stride_km, stride_kh, D, BLOCK_M)
        is_before = (start + tl.arange(0, BLOCK_M))[None, :] < end[:, None]
        is_dropped = (s < smallest) | ((s < above) & ~is_before)
        p = tl.where(is_dropped, 0.0, tl.exp2((s - largest[:, None]) * log2_scale))
        total += tl.sum(p, axis=1)
        v = load_rows(v_ptr, 0, start + tl.arange(0, BLOCK_M), M, h, stride_vm, stride_vh, D)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        bits = tl.where(is_dropped, 0, 1).reshape(BLOCK_S, BLOCK_M // 32, 32) << tl.arange(0, 32)[None, None, :]
        word = start // 32 + tl.arange(0, BLOCK_M // 32)
        is_word = is_query[:, None] & (word < num_words)[None, :]
        tl.store(is_kept_ptr + row[:, None] * num_words + word[None, :], tl.xor_sum(bits, axis=2), mask=is_word)
    out_ptrs = out_ptr + (place.to(tl.int64) * H + h)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_query[:, None])
    tl.store(log2_lse_ptr + row, largest * log2_scale + tl.log2(total), mask=is_query)


@triton.jit
def _load_is_kept(is_kept_ptr, place, start, S, num_words, h, BLOCK_M: tl.constexpr):
    """(queries, BLOCK_M): whether these queries keep these keys; they keep none after the last."""
    word = start // 32 + tl.arange(0, BLOCK_M // 32)
    row = h.to(tl.int64) * S + place
    is_word = (place < S)[:, None] & (word < num_words)[None, :]
    words = tl.load(is_kept_ptr + row[:, None] * num_words + word[None, :], mask=is_word, other=0)
    bits = words[:, :, None] >> tl.arange(0, 32)[None, None, :] & 1
    return bits.reshape(place.shape[0], BLOCK_M) != 0


@triton.jit(do_not_specialize=_CHANGING)
def _topk_attention_bwd_queries_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    is_kept_ptr,
    log2_lse_ptr,
    delta_ptr,
    grad_q_ptr,
    S,
    H,
    M,
    num_words,
    stride_gs,
    stride_gh,
    stride_qs,
    stride_qh,
    stride_km,
    stride_kh,
    stride_vm,
    stride_vh,
    scale,
    log2_scale,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    h = tl.program_id(1)
    place = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    is_query = place < S
    row = h.to(tl.int64) * S + place
    q = load_rows(q_ptr, 0, place, S, h, stride_qs, stride_qh, D)
    grad = load_rows(grad_ptr, 0, place, S, h, stride_gs, stride_gh, D)
    out = load_rows(out_ptr, 0, place, S, h, H * D, D, D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + row, delta, mask=is_query)
    log2_lse = tl.load(log2_lse_ptr + row, mask=is_query, other=0.0)
    grad_q = tl.zeros((BLOCK_S, D), dtype=tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        k = load_rows(k_ptr, 0, m, M, h, stride_km, stride_kh, D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale
        is_kept = _load_is_kept(is_kept_ptr, place, start, S, num_words, h, BLOCK_M)
        p = tl.where(is_kept, tl.exp2(s - log2_lse[:, None]), 0.0)
        v = load_rows(v_ptr, 0, m, M, h, stride_vm, stride_vh, D)
        ds = p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
        grad_q = tl.dot(ds.to(k.dtype), k, grad_q, input_precision="ieee")
    grad_q_ptrs = grad_q_ptr + (place.to(tl.int64) * H + h)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(grad_q_ptrs, (grad_q * scale).to(grad_q_ptr.dtype.element_ty), mask=is_query[:, None])


@triton.jit(do_not_specialize=_CHANGING)
def _topk_attention_bwd_keys_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    is_kept_ptr,
    log2_lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    S,
    H,
    M,
    num_words,
    stride_gs,
    stride_gh,
    stride_qs,
    stride_qh,
    stride_km,
    stride_kh,
    stride_vm,
    stride_vh,
    scale,
    log2_scale,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    h = tl.program_id(1)
    first_key = tl.program_id(0) * BLOCK_M
    m = first_key + tl.arange(0, BLOCK_M)
    k = load_rows(k_ptr, 0, m, M, h, stride_km, stride_kh, D)
    v = load_rows(v_ptr, 0, m, M, h, stride_vm, stride_vh, D)
    grad_k = tl.zeros((BLOCK_M, D), dtype=tl.float32)
    grad_v = tl.zeros((BLOCK_M, D), dtype=tl.float32)
    for start in range(0, S, BLOCK_S):
        place = start + tl.arange(0, BLOCK_S)
        row = h.to(tl.int64) * S + place
        q = load_rows(q_ptr, 0, place, S, h, stride_qs, stride_qh, D)
        grad = load_rows(grad_ptr, 0, place, S, h, stride_gs, stride_gh, D)
        log2_lse = tl.load(log2_lse_ptr + row, mask=place < S, other=0.0)
        delta = tl.load(delta_ptr + row, mask=place < S, other=0.0)
        # Keys by queries, so that the weights are the left operand of the next product as they are.
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * log2_scale
        is_kept = tl.trans(_load_is_kept(is_kept_ptr, place, first_key, S, num_words, h, BLOCK_M))
        p = tl.where(is_kept, tl.exp2(s - log2_lse[None, :]), 0.0)
        ds = p * (tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :])
        grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision="ieee")
        grad_k = tl.dot(ds.to(q.dtype), q, grad_k, input_precision="ieee")
    offset = (m.to(tl.int64) * H + h)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(grad_k_ptr + offset, (grad_k * scale).to(grad_k_ptr.dtype.element_ty), mask=(m < M)[:, None])
    tl.store(grad_v_ptr + offset, grad_v.to(grad_v_ptr.dtype.element_ty), mask=(m < M)[:, None])


def forward_blocks(dtype: torch.dtype) -> dict[str, int]:
    """Many queries, because they share the keys that are loaded in each pass; for float32 see packed attention."""
    if dtype == torch.float32:
        return {"BLOCK_S": 32, "BLOCK_M": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_S": 128, "BLOCK_M": 64, "num_warps": 8, "num_stages": 2}


def query_blocks(dtype: torch.dtype) -> dict[str, int]:
    """The blocks of the queries' gradient."""
    if dtype == torch.float32:
        return {"BLOCK_S": 32, "BLOCK_M": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_S": 64, "BLOCK_M": 64, "num_warps": 8, "num_stages": 2}


def key_blocks(dtype: torch.dtype) -> dict[str, int]:
    """The blocks of the keys' and values' gradients: two sums and a block's products are held at a time."""
    if dtype == torch.float32:
        return {"BLOCK_S": 16, "BLOCK_M": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_S": 32, "BLOCK_M": 64, "num_warps": 4, "num_stages": 2}


def launch_topk_attention(q_SHd: Tensor, k_MHd: Tensor, v_MHd: Tensor, num_kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the forward kernel.

    Args:
        q_SHd: As in ``topk_attention``.
        k_MHd: As there.
        v_MHd: As there.
        num_kept: As there.

    Returns:
        out_SHd: In q's dtype.
        is_kept_HSW: (H, S, ceil(M / 32)) int32, whether key j is kept in bit j % 32 of word j // 32.
        log2_lse_HS: (H, S) float32, the logarithm to base 2 of the sum of the exponentials of the kept scores.
    """
    (S, H, d), M = q_SHd.shape, len(k_MHd)
    W = triton.cdiv(M, 32)
    q_SHd, k_MHd, v_MHd = map(contiguous_rows, (q_SHd, k_MHd, v_MHd))
    out_SHd, log2_lse_HS = q_SHd.new_empty((S, H, d)), q_SHd.new_empty((H, S), dtype=torch.float32)
    is_kept_HSW = q_SHd.new_empty((H, S, W), dtype=torch.int32)
    if out_SHd.numel():
        blocks = forward_blocks(q_SHd.dtype)
        with torch.cuda.device_of(q_SHd):
            _topk_attention_fwd_kernel[triton.cdiv(S, blocks["BLOCK_S"]), H](
                q_SHd, k_MHd, v_MHd, out_SHd, is_kept_HSW, log2_lse_HS, S, H, M, W, num_kept,
                *q_SHd.stride()[:2], *k_MHd.stride()[:2], *v_MHd.stride()[:2], d**-0.5 * LOG2_E.value, D=d, **blocks,
            )  # fmt: skip
    return out_SHd, is_kept_HSW, log2_lse_HS


def launch_topk_attention_backward(
    grad_SHd: Tensor,
    q_SHd: Tensor,
    k_MHd: Tensor,
    v_MHd: Tensor,
    out_SHd: Tensor,
    is_kept_HSW: Tensor,
    log2_lse_HS: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the backward kernels on what the forward kernel returned. Returns the gradients of q, k and v."""
    (S, H, d), M, W = q_SHd.shape, len(k_MHd), is_kept_HSW.shape[2]
    grad_SHd, q_SHd, k_MHd, v_MHd = map(contiguous_rows, (grad_SHd, q_SHd, k_MHd, v_MHd))
    out_SHd, is_kept_HSW, log2_lse_HS = (x.contiguous() for x in (out_SHd, is_kept_HSW, log2_lse_HS))
    grad_q_SHd, grad_k_MHd, grad_v_MHd = (x.new_empty(x.shape) for x in (q_SHd, k_MHd, v_MHd))
    delta_HS = torch.empty_like(log2_lse_HS)
    of_queries, of_keys = query_blocks(q_SHd.dtype), key_blocks(q_SHd.dtype)
    strides = [stride for x in (grad_SHd, q_SHd, k_MHd, v_MHd) for stride in x.stride()[:2]]
    numbers = S, H, M, W, *strides, d**-0.5, d**-0.5 * LOG2_E.value
    with torch.cuda.device_of(q_SHd):
        if grad_q_SHd.numel():
            _topk_attention_bwd_queries_kernel[triton.cdiv(S, of_queries["BLOCK_S"]), H](
                grad_SHd, q_SHd, k_MHd, v_MHd, out_SHd, is_kept_HSW, log2_lse_HS, delta_HS, grad_q_SHd,
                *numbers, D=d, **of_queries,
            )  # fmt: skip
        if grad_k_MHd.numel():
            _topk_attention_bwd_keys_kernel[triton.cdiv(M, of_keys["BLOCK_M"]), H](
                grad_SHd, q_SHd, k_MHd, v_MHd, is_kept_HSW, log2_lse_HS, delta_HS, grad_k_MHd, grad_v_MHd,
                *numbers, D=d, **of_keys,
            )  # fmt: skip
    return grad_q_SHd, grad_k_MHd, grad_v_MHd
