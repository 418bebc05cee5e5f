"""out[i] = sum_j w[i, j] v[j] with w[i, j] = softmax_j(q[i] . k[j] / sqrt(d)), over j of i's sequence and the memory.

The tokens of many sequences lie one after another, without padding; the memory's slots are keys of every sequence. With
dropout a weight is 0, or divided by the share of weights that are kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastm3ae.kernels.common import FLOAT_DTYPES, check_one_device, describe, philox, triton_kernels
from fastm3ae.kernels.packed_attention_cpu import packed_attention_backward_cpu, packed_attention_cpu

__all__ = ["CUDA_DTYPES", "CUDA_HEAD_DIMS", "packed_attention", "packed_attention_reference", "philox_is_kept"]

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_HEAD_DIMS = (32, 64)


def packed_attention_reference(
    q_QHd: Tensor,
    k_SHd: Tensor,
    v_SHd: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    *,
    memory: tuple[Tensor, Tensor] | None = None,
    is_kept: Sequence[Tensor] | None = None,
    kept_frac: float = 1.0,
) -> Tensor:
    """Attention by a loop over sequences: the specification, differentiable as often as wanted.

    Args:
        q_QHd: As in ``packed_attention``.
        k_SHd: As there.
        v_SHd: As there.
        q_offsets: As there.
        k_offsets: As there.
        memory: As there.
        is_kept: For each sequence (H, q_len, M + k_len) bool, the weights that dropout keeps, those of slots first.
        kept_frac: By what kept weights are divided.

    Returns:
        (Q, H, d) in q's dtype.
    """
    sum_dtype = torch.promote_types(q_QHd.dtype, torch.float32)
    memory = memory or (k_SHd[:0], v_SHd[:0])
    slots = [x_MHd.transpose(0, 1).to(sum_dtype) for x_MHd in memory]
    q_ends, k_ends = q_offsets.tolist(), k_offsets.tolist()
    out = []
    for i in range(len(q_ends) - 1):
        q = q_QHd[q_ends[i] : q_ends[i + 1]].transpose(0, 1).to(sum_dtype)
        k, v = (x_SHd[k_ends[i] : k_ends[i + 1]].transpose(0, 1).to(sum_dtype) for x_SHd in (k_SHd, v_SHd))
        k, v = (torch.cat(pair, dim=1) for pair in zip(slots, (k, v), strict=True))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
        if is_kept is not None:
            weights = weights * is_kept[i] / kept_frac
        out.append((weights @ v).transpose(0, 1))
    return torch.cat([*out, q_QHd[:0].to(sum_dtype)]).to(q_QHd.dtype)


def philox_is_kept(
    seed: Tensor, num_dropped: int, q_offsets: Tensor, k_offsets: Tensor, num_heads: int, num_slots: int
) -> list[Tensor]:
    """The weights that dropout keeps on CUDA: those whose 16 bits of Philox-4x32-7 are at least ``num_dropped``.

    The counter of query row i, head h and the j-th slot is (j // 8, i, h, 1), that of the j-th key of the sequence
    (j // 8, i, h, 0), the key is the seed, and the bits are those from 16 * (j % 8) on of the 128.

    Args:
        seed: () int64.
        num_dropped: From 0 to 2^16.
        q_offsets: (num_sequences + 1,) int32.
        k_offsets: (num_sequences + 1,) int32.
        num_heads: H.
        num_slots: M.

    Returns:
        For each sequence (H, q_len, M + k_len) bool.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), section 4.3 and table 2.
    """
    h = torch.arange(num_heads, device=seed.device)[:, None, None]

    def keeps(rows: Tensor, num_keys: int, stream: int) -> Tensor:
        j = torch.arange(num_keys, device=seed.device)
        words = torch.stack(philox(seed, (j // 8, rows[:, None], h, stream), num_rounds=7))
        word = words.gather(0, (j % 8 // 2).expand(1, *words.shape[1:])).squeeze(0)
        return (word >> j % 2 * 16) & 0xFFFF >= num_dropped

    is_kept = []
    for q_start, q_end, k_len in zip(
        q_offsets[:-1].tolist(), q_offsets[1:].tolist(), k_offsets.diff().tolist(), strict=True
    ):
        rows = torch.arange(q_start, q_end, device=seed.device)
        is_kept.append(torch.cat([keeps(rows, num_slots, 1), keeps(rows, k_len, 0)], dim=2))
    return is_kept


def launch_packed_attention_cuda(*arguments) -> tuple[Tensor, Tensor]:
    """Runs the Triton kernel. Arguments and results are those of ``packed_attention_cpu``."""
    return triton_kernels("packed_attention").launch_packed_attention(*arguments)


def launch_packed_attention_backward_cuda(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs the Triton kernels of the backward pass, as ``packed_attention_backward_cpu``."""
    return triton_kernels("packed_attention_backward").launch_packed_attention_backward(*arguments)


def _empty_out(q_QHd: Tensor, *_) -> tuple[Tensor, Tensor]:
    Q, H, _ = q_QHd.shape
    # The logarithm of the sum of a query's exponentials; the CPU's backward pass makes the sum again.
    lse_HQ = q_QHd.new_empty((H, Q if q_QHd.is_cuda else 0), dtype=torch.promote_types(q_QHd.dtype, torch.float32))
    return q_QHd.new_empty(q_QHd.shape), lse_HQ


def _empty_gradients(
    grad_QHd, q_QHd, k_SHd, v_SHd, out_QHd, lse_HQ, q_offsets, k_offsets, memory_k_MHd, memory_v_MHd, *_
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (q_QHd, k_SHd, v_SHd, memory_k_MHd, memory_v_MHd))


_PLACES = (
    "Tensor q_offsets, Tensor k_offsets, Tensor memory_k_MHd, Tensor memory_v_MHd, Tensor? seed, "
    "SymInt max_q_len, SymInt max_k_len, int num_dropped"
)
torch.library.define(
    "fastm3ae::packed_attention",
    f"(Tensor q_QHd, Tensor k_SHd, Tensor v_SHd, {_PLACES}) -> (Tensor out_QHd, Tensor lse_HQ)",
)
torch.library.impl("fastm3ae::packed_attention", "cpu", packed_attention_cpu)
torch.library.impl("fastm3ae::packed_attention", "cuda", launch_packed_attention_cuda)
torch.library.register_fake("fastm3ae::packed_attention", _empty_out)

torch.library.define(
    "fastm3ae::packed_attention_backward",
    f"(Tensor grad_QHd, Tensor q_QHd, Tensor k_SHd, Tensor v_SHd, Tensor out_QHd, Tensor lse_HQ, {_PLACES}) -> "
    "(Tensor grad_q_QHd, Tensor grad_k_SHd, Tensor grad_v_SHd, Tensor grad_memory_k_MHd, Tensor grad_memory_v_MHd)",
)
torch.library.impl("fastm3ae::packed_attention_backward", "cpu", packed_attention_backward_cpu)
torch.library.impl("fastm3ae::packed_attention_backward", "cuda", launch_packed_attention_backward_cuda)
torch.library.register_fake("fastm3ae::packed_attention_backward", _empty_gradients)


def _save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q_QHd, k_SHd, v_SHd, *places, max_q_len, max_k_len, num_dropped = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q_QHd, k_SHd, v_SHd, *output, *places)
    ctx.numbers = max_q_len, max_k_len, num_dropped


@torch.autograd.function.once_differentiable
def _backward(ctx, grad_QHd: Tensor | None, _) -> tuple[Tensor | None, ...]:
    if grad_QHd is None:
        return (None,) * 11
    grads = torch.ops.fastm3ae.packed_attention_backward(grad_QHd, *ctx.saved_tensors, *ctx.numbers)
    grad_q_QHd, grad_k_SHd, grad_v_SHd, *grad_memory = grads
    return grad_q_QHd, grad_k_SHd, grad_v_SHd, None, None, *grad_memory, *[None] * 4


# Not an autograd.Function as around the other ops, because torch.compile takes none with the same tensor at two places:
# a sequence's own tokens share their offsets.
torch.library.register_autograd("fastm3ae::packed_attention", _backward, setup_context=_save_for_backward)


def packed_attention(
    q_QHd: Tensor,
    k_SHd: Tensor,
    v_SHd: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    *,
    max_q_len: int,
    max_k_len: int,
    dropout_frac: float = 0.0,
    seed: Tensor | None = None,
    memory: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Lets each query attend to the keys of its own sequence and to the memory's slots.

    Sequence i has the queries from ``q_offsets[i]`` to ``q_offsets[i + 1]`` and the keys from ``k_offsets[i]`` to
    ``k_offsets[i + 1]``. Either may be none; a query without keys and slots gets 0. Differentiable once with respect to
    q, k, v and the memory, with the same bits every time. Sums are in float32 (float64 of float64).

    Dropout keeps a weight where 16 random bits say so: the fraction is rounded to a multiple of 2^-16, and the scale is
    that of the rounded one. The same seed drops the same weights in both passes and every time, but others on the CPU
    (where they also follow the lengths) than on CUDA (where they are Philox of the place, see ``philox_is_kept``).
    Each call of a step needs a seed of its own.

    Args:
        q_QHd: (Q, H, d), the queries of all sequences; float32, bfloat16, float16, or on the CPU float64. Strided views
            such as parts of a fused product are read where they are, if their last dimension is contiguous.
            On CUDA d is 32 or 64.
        k_SHd: (S, H, d) in the same dtype.
        v_SHd: (S, H, d) in the same dtype.
        q_offsets: (num_sequences + 1,) int32, rising from 0 to Q.
        k_offsets: (num_sequences + 1,) int32, rising from 0 to S.
        max_q_len: No sequence has more queries.
        max_k_len: No sequence has more keys.
        dropout_frac: The fraction of the weights that is dropped, in [0, 1).
        seed: () int64 on the tensors' device; needed only with dropout. A tensor, so that a captured or compiled step
            can change it.
        memory: Keys and values of M slots that every sequence sees besides its own, (M, H, d) each in the same dtype.

    Returns:
        (Q, H, d) in q's dtype.

    Raises:
        ValueError: A shape, dtype, device or number is not as above. Offsets are checked on the CPU; on CUDA that would
            wait for the device, so that only TRITON_DEBUG=1 makes wrong ones an error.
    """
    if q_QHd.dim() != 3 or not q_QHd.shape[2] or q_QHd.dtype not in FLOAT_DTYPES:
        raise ValueError(f"q must be (Q, H, d) in a floating-point dtype, d > 0, got {describe(q_QHd)}")
    _, H, d = q_QHd.shape
    for name, x_SHd in (("k", k_SHd), ("v", v_SHd)):
        if x_SHd.dim() != 3 or x_SHd.shape != (len(k_SHd), H, d) or x_SHd.dtype != q_QHd.dtype:
            raise ValueError(f"{name} must be (S, {H}, {d}) in q's dtype, as many as k, got {describe(x_SHd)}")
    for name, offsets in (("q_offsets", q_offsets), ("k_offsets", k_offsets)):
        if offsets.dim() != 1 or not len(offsets) or len(offsets) != len(q_offsets) or offsets.dtype != torch.int32:
            raise ValueError(f"{name} must be (num_sequences + 1,) int32, as many as q's, got {describe(offsets)}")
    memory_k_MHd, memory_v_MHd = memory or (k_SHd.new_empty((0, H, d)),) * 2
    for name, x_MHd in (("memory's keys", memory_k_MHd), ("memory's values", memory_v_MHd)):
        if x_MHd.dim() != 3 or x_MHd.shape != (len(memory_k_MHd), H, d) or x_MHd.dtype != q_QHd.dtype:
            raise ValueError(f"{name} must be (M, {H}, {d}) in q's dtype, as many as keys, got {describe(x_MHd)}")
    if not 0 <= dropout_frac < 1:
        raise ValueError(f"dropout_frac must be at least 0 and below 1, got {dropout_frac}")
    if seed is None and dropout_frac > 0:
        raise ValueError(f"seed must be () int64 for dropout_frac = {dropout_frac}, got None")
    if seed is not None and (seed.shape != () or seed.dtype != torch.int64):
        raise ValueError(f"seed must be () int64, got {describe(seed)}")
    offsets = {"q_offsets": q_offsets, "k_offsets": k_offsets}
    check_one_device(q=q_QHd, k=k_SHd, v=v_SHd, **offsets, memory_k=memory_k_MHd, memory_v=memory_v_MHd, seed=seed)
    if q_QHd.is_cuda and (d not in CUDA_HEAD_DIMS or q_QHd.dtype not in CUDA_DTYPES):
        raise ValueError(f"q must have d = 32 or 64 and no float64 on CUDA, got {describe(q_QHd)}")
    num_dropped = min(round(dropout_frac * (1 << 16)), (1 << 16) - 1)
    places = q_offsets, k_offsets, memory_k_MHd, memory_v_MHd, seed, max_q_len, max_k_len
    return torch.ops.fastm3ae.packed_attention(q_QHd, k_SHd, v_SHd, *places, num_dropped)[0]
