"""out[b, i] = sum_j w[b, i, j] v[j], w[b, i, j] = softmax_j(q[b, i] . k[j] / sqrt(d)), j in sample b and the memory.

Packed attention of a batch whose sequences have one length: for models that hold batches of (B, L, H, d).
"""

import torch
from torch import Tensor

from fastm3ae.kernels.common import describe
from fastm3ae.kernels.packed_attention import packed_attention

__all__ = ["memory_attention", "memory_attention_reference"]


def memory_attention_reference(
    q_BQHd: Tensor, k_BSHd: Tensor, v_BSHd: Tensor, memory_k_MHd: Tensor, memory_v_MHd: Tensor
) -> Tensor:
    """The attention in eager PyTorch: the specification. Arguments and result are those of ``memory_attention``."""
    sum_dtype = torch.promote_types(q_BQHd.dtype, torch.float32)
    q_BHQd, k_BHSd, v_BHSd = (x.transpose(1, 2).to(sum_dtype) for x in (q_BQHd, k_BSHd, v_BSHd))
    slots = (x.transpose(0, 1).to(sum_dtype).expand(len(q_BQHd), -1, -1, -1) for x in (memory_k_MHd, memory_v_MHd))
    k_BHSd, v_BHSd = (torch.cat(pair, dim=2) for pair in zip(slots, (k_BHSd, v_BHSd), strict=True))
    weights_BHQS = (q_BHQd @ k_BHSd.mT * q_BQHd.shape[-1] ** -0.5).softmax(dim=-1)
    return (weights_BHQS @ v_BHSd).transpose(1, 2).to(q_BQHd.dtype)


def memory_attention(
    q_BQHd: Tensor,
    k_BSHd: Tensor,
    v_BSHd: Tensor,
    memory_k_MHd: Tensor,
    memory_v_MHd: Tensor,
    *,
    dropout_frac: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Lets each query attend to the keys of its own sample and to slots that all samples share, without joining them.

    Differentiable once with respect to all five, with the same bits every time; see ``packed_attention`` for dropout.

    Args:
        q_BQHd: (B, Q, H, d), the queries; float32, bfloat16, float16, or on the CPU float64. On CUDA d is 32 or 64.
        k_BSHd: (B, S, H, d) in the same dtype.
        v_BSHd: (B, S, H, d) in the same dtype.
        memory_k_MHd: (M, H, d) in the same dtype, the slots' keys.
        memory_v_MHd: (M, H, d) in the same dtype, their values.
        dropout_frac: The fraction of the weights that is dropped, in [0, 1).
        seed: () int64 on the tensors' device; needed only with dropout.

    Returns:
        (B, Q, H, d) in q's dtype.

    Raises:
        ValueError: A shape, dtype, device or number is not as above.
    """
    for name, x in (("q", q_BQHd), ("k", k_BSHd), ("v", v_BSHd)):
        if x.dim() != 4 or len(x) != len(q_BQHd):
            raise ValueError(f"{name} must be (B, ., H, d), B as q's, got {describe(x)}")
    B, Q, S = len(q_BQHd), q_BQHd.shape[1], k_BSHd.shape[1]
    q_offsets, k_offsets = (torch.arange(B + 1, dtype=torch.int32, device=q_BQHd.device) * length for length in (Q, S))
    packed = (x.flatten(0, 1) for x in (q_BQHd, k_BSHd, v_BSHd))
    memory, dropout = (memory_k_MHd, memory_v_MHd), {"dropout_frac": dropout_frac, "seed": seed}
    out_SHd = packed_attention(*packed, q_offsets, k_offsets, max_q_len=Q, max_k_len=S, memory=memory, **dropout)
    return out_SHd.unflatten(0, (B, Q))
