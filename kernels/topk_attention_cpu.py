"""Attention to the best keys on the CPU: a head's queries in pieces, so that neither scores nor gathered rows are many.

Weighted sums of a few rows are what ``embedding_bag`` makes without gathering them. The gradients of keys and values
are such sums, too: of the queries that kept a key, after the pairs have been sorted by key.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["topk_attention_backward_cpu", "topk_attention_cpu"]

# Scores that are made at a time: 2 MiB.
_PIECE_SCORES = 1 << 19
# Pairs of a query and a key that are differentiated at a time: 16 MiB of values of 64 channels.
_PIECE_PAIRS = 1 << 16


@torch.autocast("cpu", enabled=False)  # the products are in the sums' dtype
def topk_attention_cpu(q_SHd: Tensor, k_MHd: Tensor, v_MHd: Tensor, num_kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attends.

    Args:
        q_SHd: As in ``topk_attention``.
        k_MHd: As there.
        v_MHd: As there.
        num_kept: As there.

    Returns:
        out_SHd: In q's dtype.
        index_HSK: (H, S, num_kept) int32, the kept keys.
        weights_HSK: Their weights, at least float32.
    """
    (S, H, d), M = q_SHd.shape, len(k_MHd)
    out_SHd, index_HSK, weights_HSK = (
        q_SHd.new_empty((S, H, d)),
        q_SHd.new_empty((H, S, num_kept), dtype=torch.int32),
        q_SHd.new_empty((H, S, num_kept), dtype=torch.promote_types(q_SHd.dtype, torch.float32)),
    )
    for h, piece in _pieces(H, S, _PIECE_SCORES // M):
        q_Sd, k_Md, v_Md = (_of_head(x, h) for x in (q_SHd[piece], k_MHd, v_MHd))
        best_SK, index_SK = _largest(q_Sd @ k_Md.T, num_kept)
        weights_SK = (best_SK * d**-0.5).softmax(dim=-1)
        out_SHd[piece, h] = F.embedding_bag(index_SK, v_Md, per_sample_weights=weights_SK, mode="sum")
        index_HSK[h, piece], weights_HSK[h, piece] = index_SK, weights_SK
    return out_SHd, index_HSK, weights_HSK


@torch.autocast("cpu", enabled=False)
def topk_attention_backward_cpu(
    grad_SHd: Tensor,
    q_SHd: Tensor,
    k_MHd: Tensor,
    v_MHd: Tensor,
    out_SHd: Tensor,
    index_HSK: Tensor,
    weights_HSK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiates, from what the forward pass returned. Returns the gradients of q, k and v."""
    (S, H, d), M, num_kept = q_SHd.shape, len(k_MHd), index_HSK.shape[2]
    grad_q_SHd = q_SHd.new_empty(q_SHd.shape)
    grad_k_HMd, grad_v_HMd = (weights_HSK.new_zeros((H, M, d)) for _ in range(2))
    for h, piece in _pieces(H, S, _PIECE_PAIRS // num_kept):
        grad_Sd, q_Sd, k_Md, v_Md = (_of_head(x, h) for x in (grad_SHd[piece], q_SHd[piece], k_MHd, v_MHd))
        index_SK, weights_SK = index_HSK[h, piece], weights_HSK[h, piece]
        products_SK = torch.bmm(v_Md[index_SK], grad_Sd[..., None]).squeeze(-1)
        ds_SK = weights_SK * (products_SK - (weights_SK * products_SK).sum(dim=-1, keepdim=True)) * d**-0.5
        grad_q_SHd[piece, h] = F.embedding_bag(index_SK, k_Md, per_sample_weights=ds_SK, mode="sum")
        keys, order = index_SK.flatten().sort(stable=True)
        starts_M = torch.searchsorted(keys, torch.arange(M, dtype=torch.int32))
        for grad_Md, x_Sd, factors_SK in ((grad_k_HMd[h], q_Sd, ds_SK), (grad_v_HMd[h], grad_Sd, weights_SK)):
            factors = factors_SK.flatten()[order]
            grad_Md += F.embedding_bag(order // num_kept, x_Sd, starts_M, per_sample_weights=factors, mode="sum")
    grad_k_MHd, grad_v_MHd = (x.transpose(0, 1).to(q_SHd.dtype).contiguous() for x in (grad_k_HMd, grad_v_HMd))
    return grad_q_SHd, grad_k_MHd, grad_v_MHd


def _pieces(num_heads: int, num_queries: int, size: int) -> Iterator[tuple[int, slice]]:
    """Each head with each piece of the queries."""
    size = max(1, size)
    for h in range(num_heads):
        for start in range(0, num_queries, size):
            yield h, slice(start, min(start + size, num_queries))


def _of_head(x_SHd: Tensor, h: int) -> Tensor:
    """(S, d), contiguous; at least float32."""
    return x_SHd[:, h].to(torch.promote_types(x_SHd.dtype, torch.float32)).contiguous()


def _largest(s_SM: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """The largest of each row and their indices; of equal ones the first, which ``topk`` does not promise."""
    best, index = s_SM.topk(min(num_kept + 1, s_SM.shape[1]), dim=-1)
    is_ambiguous_S = (best[:, num_kept - 1 :].diff(dim=-1) == 0).flatten() if best.shape[1] > num_kept else None
    best, index = best[:, :num_kept], index[:, :num_kept]
    if is_ambiguous_S is not None and is_ambiguous_S.any():
        ordered = s_SM[is_ambiguous_S].sort(dim=-1, descending=True, stable=True)
        best[is_ambiguous_S], index[is_ambiguous_S] = ordered.values[:, :num_kept], ordered.indices[:, :num_kept]
    return best, index
