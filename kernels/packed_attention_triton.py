"""Packed attention with an online softmax: a program attends a block of a sequence's queries in one head.

It loops over blocks of the memory's slots, then over blocks of the sequence's keys, so that slots and keys never lie in
one tensor. Dropout draws its bits by place, as ``philox_is_kept`` says, whatever the size of the blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["CHANGING", "LOG2_E", "contiguous_rows", "launch_packed_attention", "load_rows", "load_sequence", "keeps"]

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

# Numbers that change from batch to batch, of which Triton would otherwise compile the multiples of 16 apart.
CHANGING = ("Q", "S", "M", "num_sequences", "max_q_len", "max_k_len", "num_blocks", "num_dropped")


@triton.jit
def load_sequence(offsets_ptr, i, num_rows, num_sequences, max_len):
    """The first row of sequence i, and its length."""
    start = tl.load(offsets_ptr + i)
    end = tl.load(offsets_ptr + i + 1)
    tl.device_assert((start >= 0) & (start <= end) & (end <= start + max_len), "offsets must rise by at most max_len")
    is_complete = ((i > 0) | (start == 0)) & ((i < num_sequences - 1) | (end == num_rows))
    tl.device_assert(is_complete, "offsets must rise from 0 to the number of rows")
    return start, end - start


@triton.jit
def load_rows(x_ptr, first_row, place, num_rows, h, stride_row, stride_head, D: tl.constexpr):
    """(block, D) of one head: the rows at these places after the first row, zeros from ``num_rows`` on."""
    row = (first_row + place).to(tl.int64)
    x_ptrs = x_ptr + h.to(tl.int64) * stride_head + row[:, None] * stride_row + tl.arange(0, D)[None, :]
    return tl.load(x_ptrs, mask=(place < num_rows)[:, None], other=0.0)


@triton.jit
def keeps(seed, num_dropped, row, first_key, h, STREAM: tl.constexpr, BLOCK_K: tl.constexpr):
    """(rows, BLOCK_K): which weights dropout keeps; ``first_key`` is a multiple of 8."""
    zero = tl.zeros((row.shape[0], BLOCK_K // 8), dtype=tl.int32)
    eighth = first_key // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
    # Of 7 rounds and up no statistical test tells the words from random ones.
    w0, w1, w2, w3 = tl.philox(seed, zero + eighth, zero + row[:, None], zero + h, zero + STREAM, n_rounds=7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(row.shape[0], BLOCK_K // 2)
    draws = tl.join(words & 0xFFFF, words >> 16).reshape(row.shape[0], BLOCK_K)
    return draws.to(tl.int32) >= num_dropped


@triton.jit
def _attend(
    acc,
    largest,
    total,
    q,
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
    seed,
    num_dropped,
    STREAM: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The running sums after these keys."""
    for start in range(0, num_keys, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        k = load_rows(k_ptr, first_row, j, num_keys, h, stride_ks, stride_kh, D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale
        s = tl.where((j < num_keys)[None, :], s, float("-inf"))
        larger = tl.maximum(largest, tl.max(s, axis=1))
        p = tl.exp2(s - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(p, axis=1)
        if HAS_DROPOUT:
            p = tl.where(keeps(seed, num_dropped, q_row, start, h, STREAM, BLOCK_K), p, 0.0)
        v = load_rows(v_ptr, first_row, j, num_keys, h, stride_vs, stride_vh, D)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        largest = larger
    return acc, largest, total


@triton.jit(do_not_specialize=CHANGING)
def _packed_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_offsets_ptr,
    k_offsets_ptr,
    memory_k_ptr,
    memory_v_ptr,
    seed_ptr,
    out_ptr,
    log2_lse_ptr,
    Q,
    S,
    H,
    M,
    num_sequences,
    max_q_len,
    max_k_len,
    num_blocks,
    stride_qs,
    stride_qh,
    stride_ks,
    stride_kh,
    stride_vs,
    stride_vh,
    log2_scale,
    kept_frac,
    num_dropped,
    HAS_MEMORY: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The blocks of one sequence run side by side, because they read the same keys.
    i = tl.program_id(0) // num_blocks
    h = tl.program_id(1)
    q_start, q_len = load_sequence(q_offsets_ptr, i, Q, num_sequences, max_q_len)
    k_start, k_len = load_sequence(k_offsets_ptr, i, S, num_sequences, max_k_len)
    place = tl.program_id(0) % num_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    if tl.program_id(0) % num_blocks * BLOCK_Q >= q_len:
        return
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    q = load_rows(q_ptr, q_start, place, q_len, h, stride_qs, stride_qh, D)
    acc = tl.zeros((BLOCK_Q, D), dtype=tl.float32)
    largest = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    q_row = q_start + place
    if HAS_MEMORY:
        acc, largest, total = _attend(
            acc, largest, total, q, memory_k_ptr, memory_v_ptr, 0, M, q_row, h, H * D, D, H * D, D,
            log2_scale, seed, num_dropped, 1, HAS_DROPOUT, D, BLOCK_K,
        )  # fmt: skip
    acc, largest, total = _attend(
        acc, largest, total, q, k_ptr, v_ptr, k_start, k_len, q_row, h, stride_ks, stride_kh, stride_vs, stride_vh,
        log2_scale, seed, num_dropped, 0, HAS_DROPOUT, D, BLOCK_K,
    )  # fmt: skip
    # Without any key there is nothing to divide by, and the result is 0.
    is_attended = total > 0.0
    out = acc / tl.where(is_attended, total * kept_frac, 1.0)[:, None]
    log2_lse = largest + tl.log2(tl.where(is_attended, total, 1.0))
    is_query = place < q_len
    out_ptrs = out_ptr + (q_row.to(tl.int64) * H + h)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=is_query[:, None])
    tl.store(log2_lse_ptr + h.to(tl.int64) * Q + q_row, log2_lse, mask=is_query)


def contiguous_rows(x_SHd: Tensor) -> Tensor:
    """The tensor itself where each head's row is contiguous: the kernels take the strides of rows and heads."""
    return x_SHd if x_SHd.stride(-1) == 1 else x_SHd.contiguous()


def forward_blocks(dtype: torch.dtype, max_q_len: int) -> dict[str, int]:
    """A warp group per 64 queries, whose sums fill half of its registers.

    Two groups share the keys that they load, where there are so many queries. float32 without tensor cores keeps both
    operands of a product in registers, so that its blocks are small.
    """
    if dtype == torch.float32:
        return {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    if max_q_len <= 64:
        return {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}


def launch_packed_attention(
    q_QHd: Tensor,
    k_SHd: Tensor,
    v_SHd: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    memory_k_MHd: Tensor,
    memory_v_MHd: Tensor,
    seed: Tensor | None,
    max_q_len: int,
    max_k_len: int,
    num_dropped: int,
) -> tuple[Tensor, Tensor]:
    """Runs the forward kernel. Arguments and results are those of ``packed_attention_cpu``, the logarithm to base 2."""
    (Q, H, d), num_sequences = q_QHd.shape, len(q_offsets) - 1
    q_QHd, k_SHd, v_SHd = map(contiguous_rows, (q_QHd, k_SHd, v_SHd))
    out_QHd, log2_lse_HQ = q_QHd.new_empty((Q, H, d)), q_QHd.new_empty((H, Q), dtype=torch.float32)
    if out_QHd.numel():
        blocks = forward_blocks(q_QHd.dtype, max_q_len)
        num_blocks = triton.cdiv(max_q_len, blocks["BLOCK_Q"])
        with torch.cuda.device_of(q_QHd):
            _packed_attention_fwd_kernel[num_sequences * num_blocks, H](
                q_QHd,
                k_SHd,
                v_SHd,
                q_offsets.contiguous(),
                k_offsets.contiguous(),
                memory_k_MHd.contiguous(),
                memory_v_MHd.contiguous(),
                seed,
                out_QHd,
                log2_lse_HQ,
                Q,
                len(k_SHd),
                H,
                len(memory_k_MHd),
                num_sequences,
                max_q_len,
                max_k_len,
                num_blocks,
                *q_QHd.stride()[:2],
                *k_SHd.stride()[:2],
                *v_SHd.stride()[:2],
                d**-0.5 * LOG2_E.value,
                1 - num_dropped / (1 << 16),
                num_dropped,
                HAS_MEMORY=len(memory_k_MHd) > 0,
                HAS_DROPOUT=num_dropped > 0,
                D=d,
                **blocks,
            )
    return out_QHd, log2_lse_HQ
