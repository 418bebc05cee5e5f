"""Attention of packed sequences to themselves or to others, by the backend that is the fastest for them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastm3ae.kernels import packed_attention
from fastm3ae.model.rows import Layout

__all__ = ["attend", "backends"]

# On which devices the vision tower, which has no dropout, has PyTorch's attention for its whole images and again for
# its visible patches. As measured by benchmarks/bench_packed_attention.py ("by length" against "ours"): on a CPU it
# takes 0.85 of the time, for 4 images of 325 tokens and 4 of 82. On a GPU nothing is measured yet.
BY_LENGTH = {"cpu"}


def backends(device_type: str) -> str:
    """Returns in words what computes attention on a device."""
    if device_type not in BY_LENGTH:
        return "packed_attention"
    return "PyTorch's in the vision tower, else packed_attention"


def attend(
    q_QHd: Tensor,
    k_SHd: Tensor,
    v_SHd: Tensor,
    queries: Layout,
    keys: Layout,
    dropout_frac: float = 0.0,
    memory: tuple[Tensor, Tensor] | None = None,
    runs: tuple[tuple[int, int], ...] | None = None,
) -> Tensor:
    """Returns what each query gathers from the keys of its own sequence and the memory, heads joined: (Q, H * d).

    Args:
        q_QHd: The queries of all sequences.
        k_SHd: The keys.
        v_SHd: The values.
        queries: Where each sequence's queries stand.
        keys: Where its keys stand.
        dropout_frac: Which fraction of the weights is dropped.
        memory: Keys and values that all sequences see, (M, H, d) each.
        runs: If the sequences attend to themselves and have few lengths: how many of which one after another.
    """
    if runs is not None and dropout_frac == 0 and memory is None and q_QHd.device.type in BY_LENGTH:
        return attend_by_length(q_QHd, k_SHd, v_SHd, runs)
    # A seed from the device's own generator: nothing waits, and a resumed run draws the same.
    seed = torch.randint(2**62, (), device=q_QHd.device) if dropout_frac > 0 else None
    context_QHd = packed_attention(
        q_QHd,
        k_SHd,
        v_SHd,
        queries.offsets,
        keys.offsets,
        max_q_len=queries.max_length,
        max_k_len=keys.max_length,
        dropout_frac=dropout_frac,
        seed=seed,
        memory=None if memory is None else tuple(x_MHd.to(q_QHd.dtype) for x_MHd in memory),
    )
    return context_QHd.flatten(1)


def attend_by_length(q_SHd: Tensor, k_SHd: Tensor, v_SHd: Tensor, runs: tuple[tuple[int, int], ...]) -> Tensor:
    """Returns the self-attention of sequences, those of one length in one call: (S, H * d).

    Args:
        q_SHd: Queries.
        k_SHd: Keys.
        v_SHd: Values.
        runs: How many sequences of which length stand one after another.
    """
    sizes = [number * length for number, length in runs]
    parts = []
    for (number, length), *qkv in zip(runs, *(x_SHd.split(sizes) for x_SHd in (q_SHd, k_SHd, v_SHd)), strict=True):
        q, k, v = (x_SHd.unflatten(0, (number, length)).transpose(1, 2) for x_SHd in qkv)
        parts.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return (torch.cat(parts) if parts else q_SHd).flatten(1)
