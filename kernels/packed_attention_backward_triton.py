"""Gradients of packed attention without atomics: each row of a gradient is summed by one program, in a fixed order.

With p the weights, z their dropout (0, or 1 / kept share) and delta[i] = out[i] . grad[i]: dp = grad v^T,
ds = p * (z * dp - delta), and grad_q = ds k / sqrt(d), grad_k = ds^T q / sqrt(d), grad_v = (z * p)^T grad. The first
kernel sums over keys, and stores delta for the second, which sums over queries. Slots belong to all sequences, so that
a third one sums them over a few sequences at a time; its partial sums are then added up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastm3ae.kernels.packed_attention_triton import CHANGING, LOG2_E, contiguous_rows, keeps, load_rows, load_sequence

__all__ = ["launch_packed_attention_backward"]

# Into so many parts the sequences are divided for the slots: a number of its own, so that the sums do not depend on
# the device. With 12 heads and 64 slots it makes 384 programs.
_NUM_SPLITS = 32


@triton.jit
def _query_gradient(
    grad_q,
    q,
    grad,
    log2_lse,
    delta,
    k_ptr,
    v_ptr,
    first_row,
    num_keys,
    q_row,
    h,
    stride_ks,
    stride_kh,
    stride_vs,
    stride_vh,
    log2_scale,
    kept_scale,
    seed,
    num_dropped,
    STREAM: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The queries' gradient, still to be scaled, after these keys."""
    for start in range(0, num_keys, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        k = load_rows(k_ptr, first_row, j, num_keys, h, stride_ks, stride_kh, D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale
        p = tl.where((j < num_keys)[None, :], tl.exp2(s - log2_lse[:, None]), 0.0)
        v = load_rows(v_ptr, first_row, j, num_keys, h, stride_vs, stride_vh, D)
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        if HAS_DROPOUT:
            dp = tl.where(keeps(seed, num_dropped, q_row, start, h, STREAM, BLOCK_K), dp * kept_scale, 0.0)
        ds = p * (dp - delta[:, None])
        grad_q = tl.dot(ds.to(k.dtype), k, grad_q, input_precision="ieee")
    return grad_q


@triton.jit(do_not_specialize=CHANGING)
def _packed_attention_bwd_queries_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    log2_lse_ptr,
    delta_ptr,
    q_offsets_ptr,
    k_offsets_ptr,
    memory_k_ptr,
    memory_v_ptr,
    seed_ptr,
    grad_q_ptr,
    Q,
    S,
    H,
    M,
    num_sequences,
    max_q_len,
    max_k_len,
    num_blocks,
    stride_gs,
    stride_gh,
    stride_qs,
    stride_qh,
    stride_ks,
    stride_kh,
    stride_vs,
    stride_vh,
    scale,
    kept_scale,
    num_dropped,
    HAS_MEMORY: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i = tl.program_id(0) // num_blocks
    h = tl.program_id(1)
    q_start, q_len = load_sequence(q_offsets_ptr, i, Q, num_sequences, max_q_len)
    k_start, k_len = load_sequence(k_offsets_ptr, i, S, num_sequences, max_k_len)
    place = tl.program_id(0) % num_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    if tl.program_id(0) % num_blocks * BLOCK_Q >= q_len:
        return
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    q_row = q_start + place
    is_query = place < q_len
    q = load_rows(q_ptr, q_start, place, q_len, h, stride_qs, stride_qh, D)
    grad = load_rows(grad_ptr, q_start, place, q_len, h, stride_gs, stride_gh, D)
    out = load_rows(out_ptr, q_start, place, q_len, h, H * D, D, D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + h.to(tl.int64) * Q + q_row, delta, mask=is_query)
    log2_lse = tl.load(log2_lse_ptr + h.to(tl.int64) * Q + q_row, mask=is_query, other=0.0)
    grad_q = tl.zeros((BLOCK_Q, D), dtype=tl.float32)
    if HAS_MEMORY:
        grad_q = _query_gradient(
            grad_q, q, grad, log2_lse, delta, memory_k_ptr, memory_v_ptr, 0, M, q_row, h, H * D, D, H * D, D,
            scale * LOG2_E, kept_scale, seed, num_dropped, 1, HAS_DROPOUT, D, BLOCK_K,
        )  # fmt: skip
    grad_q = _query_gradient(
        grad_q, q, grad, log2_lse, delta, k_ptr, v_ptr, k_start, k_len, q_row, h,
        stride_ks, stride_kh, stride_vs, stride_vh,
        scale * LOG2_E, kept_scale, seed, num_dropped, 0, HAS_DROPOUT, D, BLOCK_K,
    )  # fmt: skip
    grad_q_ptrs = grad_q_ptr + (q_row.to(tl.int64) * H + h)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(grad_q_ptrs, (grad_q * scale).to(grad_q_ptr.dtype.element_ty), mask=is_query[:, None])


@triton.jit
def _key_gradients(
    grad_k,
    grad_v,
    k,
    v,
    first_key,
    grad_ptr,
    q_ptr,
    log2_lse_ptr,
    delta_ptr,
    q_start,
    q_len,
    Q,
    h,
    stride_gs,
    stride_gh,
    stride_qs,
    stride_qh,
    scale,
    kept_scale,
    seed,
    num_dropped,
    STREAM: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradients of a block of keys and values, still to be scaled, after one sequence's queries.

    Queries beyond the last weigh in with a gradient of 0, keys beyond the last are rows that nobody stores.
    """
    for start in range(0, q_len, BLOCK_Q):
        place = start + tl.arange(0, BLOCK_Q)
        q_row = q_start + place
        q = load_rows(q_ptr, q_start, place, q_len, h, stride_qs, stride_qh, D)
        grad = load_rows(grad_ptr, q_start, place, q_len, h, stride_gs, stride_gh, D)
        log2_lse = tl.load(log2_lse_ptr + h.to(tl.int64) * Q + q_row, mask=place < q_len, other=0.0)
        delta = tl.load(delta_ptr + h.to(tl.int64) * Q + q_row, mask=place < q_len, other=0.0)
        # Keys by queries, so that the weights are the left operand of the next product as they are.
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2_E)
        p = tl.exp2(s - log2_lse[None, :])
        dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
        kept_p = p
        if HAS_DROPOUT:
            is_kept = tl.trans(keeps(seed, num_dropped, q_row, first_key, h, STREAM, BLOCK_K))
            kept_p = tl.where(is_kept, p * kept_scale, 0.0)
            dp = tl.where(is_kept, dp * kept_scale, 0.0)
        grad_v = tl.dot(kept_p.to(grad.dtype), grad, grad_v, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        grad_k = tl.dot(ds.to(q.dtype), q, grad_k, input_precision="ieee")
    return grad_k, grad_v


@triton.jit(do_not_specialize=CHANGING)
def _packed_attention_bwd_keys_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    log2_lse_ptr,
    delta_ptr,
    q_offsets_ptr,
    k_offsets_ptr,
    seed_ptr,
    grad_k_ptr,
    grad_v_ptr,
    Q,
    S,
    H,
    num_sequences,
    max_q_len,
    max_k_len,
    num_blocks,
    stride_gs,
    stride_gh,
    stride_qs,
    stride_qh,
    stride_ks,
    stride_kh,
    stride_vs,
    stride_vh,
    scale,
    kept_scale,
    num_dropped,
    HAS_DROPOUT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i = tl.program_id(0) // num_blocks
    h = tl.program_id(1)
    q_start, q_len = load_sequence(q_offsets_ptr, i, Q, num_sequences, max_q_len)
    k_start, k_len = load_sequence(k_offsets_ptr, i, S, num_sequences, max_k_len)
    first_key = tl.program_id(0) % num_blocks * BLOCK_K
    if first_key >= k_len:
        return
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    j = first_key + tl.arange(0, BLOCK_K)
    k = load_rows(k_ptr, k_start, j, k_len, h, stride_ks, stride_kh, D)
    v = load_rows(v_ptr, k_start, j, k_len, h, stride_vs, stride_vh, D)
    zero = tl.zeros((BLOCK_K, D), dtype=tl.float32)
    grad_k, grad_v = _key_gradients(
        zero, zero, k, v, first_key, grad_ptr, q_ptr, log2_lse_ptr, delta_ptr, q_start, q_len, Q, h,
        stride_gs, stride_gh, stride_qs, stride_qh,
        scale, kept_scale, seed, num_dropped, 0, HAS_DROPOUT, D, BLOCK_Q, BLOCK_K,
    )  # fmt: skip
    offset = ((k_start + j).to(tl.int64) * H + h)[:, None] * D + tl.arange(0, D)[None, :]
    is_key = (j < k_len)[:, None]
    tl.store(grad_k_ptr + offset, (grad_k * scale).to(grad_k_ptr.dtype.element_ty), mask=is_key)
    tl.store(grad_v_ptr + offset, grad_v.to(grad_v_ptr.dtype.element_ty), mask=is_key)


@triton.jit(do_not_specialize=CHANGING)
def _packed_attention_bwd_slots_kernel(
    grad_ptr,
    q_ptr,
    memory_k_ptr,
    memory_v_ptr,
    log2_lse_ptr,
    delta_ptr,
    q_offsets_ptr,
    seed_ptr,
    partial_k_ptr,
    partial_v_ptr,
    Q,
    H,
    M,
    num_sequences,
    max_q_len,
    stride_gs,
    stride_gh,
    stride_qs,
    stride_qh,
    scale,
    kept_scale,
    num_dropped,
    HAS_DROPOUT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(0)
    h = tl.program_id(1)
    first_slot = tl.program_id(2) * BLOCK_K
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    m = first_slot + tl.arange(0, BLOCK_K)
    k = load_rows(memory_k_ptr, 0, m, M, h, H * D, D, D)
    v = load_rows(memory_v_ptr, 0, m, M, h, H * D, D, D)
    grad_k = tl.zeros((BLOCK_K, D), dtype=tl.float32)
    grad_v = tl.zeros((BLOCK_K, D), dtype=tl.float32)
    for i in range(split, num_sequences, tl.num_programs(0)):
        q_start, q_len = load_sequence(q_offsets_ptr, i, Q, num_sequences, max_q_len)
        grad_k, grad_v = _key_gradients(
            grad_k, grad_v, k, v, first_slot, grad_ptr, q_ptr, log2_lse_ptr, delta_ptr, q_start, q_len, Q, h,
            stride_gs, stride_gh, stride_qs, stride_qh,
            scale, kept_scale, seed, num_dropped, 1, HAS_DROPOUT, D, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    offset = ((split * M + m).to(tl.int64) * H + h)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(partial_k_ptr + offset, grad_k * scale, mask=(m < M)[:, None])
    tl.store(partial_v_ptr + offset, grad_v, mask=(m < M)[:, None])


def query_blocks(dtype: torch.dtype) -> dict[str, int]:
    """The blocks of the first kernel, with which it spills no register on sm_80 either; for float32 see forward."""
    if dtype == torch.float32:
        return {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}


def key_blocks(dtype: torch.dtype) -> dict[str, int]:
    """The blocks of the others: two sums and a block's products are held at a time, so that they take fewer queries."""
    if dtype == torch.float32:
        return {"BLOCK_Q": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_Q": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}


def launch_packed_attention_backward(
    grad_QHd: Tensor,
    q_QHd: Tensor,
    k_SHd: Tensor,
    v_SHd: Tensor,
    out_QHd: Tensor,
    log2_lse_HQ: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    memory_k_MHd: Tensor,
    memory_v_MHd: Tensor,
    seed: Tensor | None,
    max_q_len: int,
    max_k_len: int,
    num_dropped: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs the backward kernels. Arguments and results are those of ``packed_attention_backward_cpu``."""
    (Q, H, d), S, M, num_sequences = q_QHd.shape, len(k_SHd), len(memory_k_MHd), len(q_offsets) - 1
    grad_QHd, q_QHd, k_SHd, v_SHd = map(contiguous_rows, (grad_QHd, q_QHd, k_SHd, v_SHd))
    out_QHd, q_offsets, k_offsets, memory_k_MHd, memory_v_MHd = (
        x.contiguous() for x in (out_QHd, q_offsets, k_offsets, memory_k_MHd, memory_v_MHd)
    )
    grad_q_QHd, grad_k_SHd, grad_v_SHd = (x.new_empty(x.shape) for x in (q_QHd, k_SHd, v_SHd))
    partial_k, partial_v = (q_QHd.new_empty((_NUM_SPLITS, M, H, d), dtype=torch.float32) for _ in range(2))
    delta_HQ = torch.empty_like(log2_lse_HQ)
    of_queries, of_keys = query_blocks(q_QHd.dtype), key_blocks(q_QHd.dtype)
    num_q_blocks, num_k_blocks = (
        triton.cdiv(max_q_len, of_queries["BLOCK_Q"]),
        triton.cdiv(max_k_len, of_keys["BLOCK_K"]),
    )
    grad_and_q_strides = *grad_QHd.stride()[:2], *q_QHd.stride()[:2]
    k_and_v_strides = *k_SHd.stride()[:2], *v_SHd.stride()[:2]
    numbers = d**-0.5, 1 / (1 - num_dropped / (1 << 16)), num_dropped
    constants = {"HAS_DROPOUT": num_dropped > 0, "D": d}
    with torch.cuda.device_of(q_QHd):
        if grad_q_QHd.numel():
            _packed_attention_bwd_queries_kernel[num_sequences * num_q_blocks, H](
                grad_QHd, q_QHd, k_SHd, v_SHd, out_QHd, log2_lse_HQ, delta_HQ, q_offsets, k_offsets,
                memory_k_MHd, memory_v_MHd, seed, grad_q_QHd,
                Q, S, H, M, num_sequences, max_q_len, max_k_len, num_q_blocks,
                *grad_and_q_strides, *k_and_v_strides, *numbers, HAS_MEMORY=M > 0, **constants, **of_queries,
            )  # fmt: skip
        if grad_k_SHd.numel():
            _packed_attention_bwd_keys_kernel[num_sequences * num_k_blocks, H](
                grad_QHd, q_QHd, k_SHd, v_SHd, log2_lse_HQ, delta_HQ, q_offsets, k_offsets, seed,
                grad_k_SHd, grad_v_SHd,
                Q, S, H, num_sequences, max_q_len, max_k_len, num_k_blocks,
                *grad_and_q_strides, *k_and_v_strides, *numbers, **constants, **of_keys,
            )  # fmt: skip
        if partial_k.numel():
            _packed_attention_bwd_slots_kernel[_NUM_SPLITS, H, triton.cdiv(M, of_keys["BLOCK_K"])](
                grad_QHd, q_QHd, memory_k_MHd, memory_v_MHd, log2_lse_HQ, delta_HQ, q_offsets, seed,
                partial_k, partial_v,
                Q, H, M, num_sequences, max_q_len, *grad_and_q_strides, *numbers, **constants, **of_keys,
            )  # fmt: skip
    grad_memory_k_MHd, grad_memory_v_MHd = (partial.sum(dim=0).to(q_QHd.dtype) for partial in (partial_k, partial_v))
    return grad_q_QHd, grad_k_SHd, grad_v_SHd, grad_memory_k_MHd, grad_memory_v_MHd
