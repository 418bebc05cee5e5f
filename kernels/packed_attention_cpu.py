"""Packed attention on the CPU: neighbours of similar length are padded together, and scores stay in the cache.

PyTorch's own attention leaves its fast path on the CPU with dropout or a mask, and that path is no faster than this.
The weights are made again in the backward pass, because they would be most of a step's memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["packed_attention_backward_cpu", "packed_attention_cpu"]

# Scores that are made at a time: 2 MiB, and as much again for each of their gradients and random numbers.
_PIECE_SCORES = 1 << 19
# A group of its own costs the time of so many scores, so that less padding than this is cheaper than another group.
_GROUP_SCORES = 1 << 16


@dataclass(frozen=True)
class _Group:
    """Neighbouring sequences that are computed together: their rows and lengths, in the queries and in the keys."""

    q_rows: slice
    k_rows: slice
    q_lens: list[int]
    k_lens: list[int]
    num_heads: int
    num_slots: int

    def joined(self, other: "_Group") -> "_Group":
        q_rows = slice(self.q_rows.start, other.q_rows.stop)
        k_rows = slice(self.k_rows.start, other.k_rows.stop)
        q_lens, k_lens = self.q_lens + other.q_lens, self.k_lens + other.k_lens
        return _Group(q_rows, k_rows, q_lens, k_lens, self.num_heads, self.num_slots)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the scores: sequences times heads, queries, slots and keys."""
        return len(self.q_lens) * self.num_heads, max(self.q_lens), self.num_slots + max(self.k_lens)

    @property
    def num_scores(self) -> int:
        rows, queries, keys = self.shape
        return rows * queries * keys

    def pieces(self) -> list[slice]:
        """The rows of ``shape`` in pieces of a good size."""
        rows, queries, keys = self.shape
        step = max(1, _PIECE_SCORES // (queries * keys))
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def queries(self, x_QHd: Tensor) -> Tensor:
        return _stack(x_QHd[self.q_rows], self.q_lens).flatten(0, 1)

    def keys(self, x_SHd: Tensor, slots_MHd: Tensor) -> Tensor:
        """Memory slots first, then the keys, as if they were one sequence."""
        x_nHSd = _stack(x_SHd[self.k_rows], self.k_lens)
        if self.num_slots:
            slots_nHMd = slots_MHd.transpose(0, 1).to(x_nHSd.dtype).expand(len(self.k_lens), -1, -1, -1)
            x_nHSd = torch.cat([slots_nHMd, x_nHSd], dim=2)
        return x_nHSd.flatten(0, 1)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """What to add to the scores, minus infinity at padding; None where the keys have none."""
        if min(self.k_lens) == max(self.k_lens):
            return None
        bias_n1S = torch.zeros(len(self.k_lens), 1, self.shape[2], dtype=dtype)
        bias_n1S[:, 0, self.num_slots :].masked_fill_(_is_padding(self.k_lens), -torch.inf)
        return bias_n1S.repeat_interleave(self.num_heads, dim=0)


def _groups(q_offsets: Tensor, k_offsets: Tensor, num_heads: int, num_slots: int) -> Iterator[_Group]:
    """All sequences that have a score, in their order."""
    group = None
    q_ends, k_ends = q_offsets.tolist(), k_offsets.tolist()
    for q_start, q_end, k_start, k_end in zip(q_ends[:-1], q_ends[1:], k_ends[:-1], k_ends[1:], strict=True):
        rows, lens = (slice(q_start, q_end), slice(k_start, k_end)), ([q_end - q_start], [k_end - k_start])
        one = _Group(*rows, *lens, num_heads, num_slots)
        if group is not None and one.num_scores:
            both = group.joined(one)
            padding = both.num_scores - group.num_scores - one.num_scores
            if padding <= _GROUP_SCORES and both.num_scores <= _PIECE_SCORES:
                group = both
                continue
        if group is not None:
            yield group
        group = one if one.num_scores else None
    if group is not None:
        yield group


def _stack(x_S: Tensor, lens: list[int]) -> Tensor:
    """(n, H, L, ...) of the (S, H, ...) rows of n sequences, zeros after the shorter ones; at least float32."""
    if min(lens) == max(lens):
        x_nL = x_S.unflatten(0, (len(lens), lens[0]))
    else:
        x_nL = pad_sequence(x_S.split(lens), batch_first=True)
    return x_nL.transpose(1, 2).to(_sum_dtype(x_S))


def _unstack_(x_S: Tensor, lens: list[int], stacked: Tensor) -> None:
    """Writes (n * H, L, ...), or (n, H, L, ...), into the rows that ``_stack`` takes it from."""
    x_nL = stacked.view(len(lens), x_S.shape[1], max(lens), *x_S.shape[2:]).transpose(1, 2)
    if min(lens) == max(lens):
        x_S.unflatten(0, (len(lens), lens[0])).copy_(x_nL)
    else:
        x_S.copy_(x_nL[~_is_padding(lens)])


def _is_padding(lens: list[int]) -> Tensor:
    return torch.arange(max(lens)) >= torch.tensor(lens)[:, None]


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Buffer:
    """Memory for a piece's scores that is used again for the next piece: fresh memory costs a page fault a page."""

    def __init__(self, groups: list[_Group], dtype: torch.dtype) -> None:
        sizes = (group.pieces()[0].stop * group.shape[1] * group.shape[2] for group in groups)
        self._memory = torch.empty(max(sizes, default=0), dtype=dtype)

    def of_shape(self, rows: int, queries: int, keys: int) -> Tensor:
        return self._memory[: rows * queries * keys].view(rows, queries, keys)


def _softmax_(s: Tensor, p: Tensor, q: Tensor, k: Tensor, bias: Tensor | None) -> None:
    """Writes scores and weights."""
    if bias is not None:
        s.copy_(bias)
    s.baddbmm_(q, k.mT, beta=0 if bias is None else 1, alpha=q.shape[-1] ** -0.5)
    torch.softmax(s, dim=-1, out=p)


class _Dropout:
    """Random weights 0 and 1, the same ones for the same seed and order of calls."""

    def __init__(self, seed: Tensor | None, num_dropped: int) -> None:
        self._generator = torch.Generator()
        if seed is not None:
            number = seed.item()
            # The generator uses 32 bits of its seed.
            self._generator.manual_seed(number ^ number >> 32)
        self._first_kept = num_dropped - (1 << 15)

    def draw_(self, is_kept: Tensor) -> Tensor:
        # Four draws of 16 bits from one of 64, because drawing is the slow part.
        words = torch.empty(-(-is_kept.numel() // 4), dtype=torch.int64)
        draws = words.random_(-(2**63), None, generator=self._generator).view(torch.int16)[: is_kept.numel()]
        return torch.ge(draws.view_as(is_kept), self._first_kept, out=is_kept)


def packed_attention_cpu(
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
    """Attends. Arguments and results are those of ``fastm3ae::packed_attention``; the backward pass needs no lse.

    Raises:
        ValueError: The offsets do not divide the rows into sequences of at most the given lengths.
    """
    _check_offsets("q", q_offsets, len(q_QHd), max_q_len)
    _check_offsets("k", k_offsets, len(k_SHd), max_k_len)
    num_slots, num_heads, _ = memory_k_MHd.shape
    groups = list(_groups(q_offsets, k_offsets, num_heads, num_slots))
    kept_scale = 1 / (1 - num_dropped / (1 << 16))
    scores, weights = (_Buffer(groups, _sum_dtype(q_QHd)) for _ in range(2))
    dropout = _Dropout(seed, num_dropped)
    out_QHd = q_QHd.new_zeros(q_QHd.shape)
    for group in groups:
        q, k, v = group.queries(q_QHd), group.keys(k_SHd, memory_k_MHd), group.keys(v_SHd, memory_v_MHd)
        bias, out = group.bias(q.dtype), q.new_empty(q.shape)
        for piece in group.pieces():
            shape = piece.stop - piece.start, *group.shape[1:]
            s, p = scores.of_shape(*shape), weights.of_shape(*shape)
            _softmax_(s, p, q[piece], k[piece], None if bias is None else bias[piece])
            if num_dropped:
                p.mul_(dropout.draw_(s))
            out[piece].baddbmm_(p, v[piece], beta=0, alpha=kept_scale)
        _unstack_(out_QHd[group.q_rows], group.q_lens, out)
    return out_QHd, q_QHd.new_empty((num_heads, 0), dtype=_sum_dtype(q_QHd))


def packed_attention_backward_cpu(
    grad_QHd: Tensor,
    q_QHd: Tensor,
    k_SHd: Tensor,
    v_SHd: Tensor,
    out_QHd: Tensor,
    lse_HQ: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    memory_k_MHd: Tensor,
    memory_v_MHd: Tensor,
    seed: Tensor | None,
    max_q_len: int,
    max_k_len: int,
    num_dropped: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiates. Arguments and results are those of ``fastm3ae::packed_attention_backward``."""
    num_slots, num_heads, head_dim = memory_k_MHd.shape
    groups = list(_groups(q_offsets, k_offsets, num_heads, num_slots))
    scale, kept_scale = head_dim**-0.5, 1 / (1 - num_dropped / (1 << 16))
    scores, weights, grads = (_Buffer(groups, _sum_dtype(q_QHd)) for _ in range(3))
    dropout = _Dropout(seed, num_dropped)
    grad_q_QHd, grad_k_SHd, grad_v_SHd = (x.new_zeros(x.shape) for x in (q_QHd, k_SHd, v_SHd))
    grad_slots_HMd = [q_QHd.new_zeros((num_heads, num_slots, head_dim), dtype=_sum_dtype(q_QHd)) for _ in range(2)]
    for group in groups:
        q, k, v = group.queries(q_QHd), group.keys(k_SHd, memory_k_MHd), group.keys(v_SHd, memory_v_MHd)
        grad, bias = group.queries(grad_QHd), group.bias(q.dtype)
        grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        for piece in group.pieces():
            shape = piece.stop - piece.start, *group.shape[1:]
            s, p = scores.of_shape(*shape), weights.of_shape(*shape)
            _softmax_(s, p, q[piece], k[piece], None if bias is None else bias[piece])
            kept_p = dropout.draw_(s).mul_(p) if num_dropped else p
            grad_v[piece].baddbmm_(kept_p.mT, grad[piece], beta=0, alpha=kept_scale)
            # ds = p * (is_kept * dp - delta), where delta is the sum of p * is_kept * dp over the keys.
            ds = torch.bmm(grad[piece], v[piece].mT, out=grads.of_shape(*shape)).mul_(kept_p)
            ds.addcmul_(p, ds.sum(dim=-1, keepdim=True), value=-1)
            grad_q[piece].baddbmm_(ds, k[piece], beta=0, alpha=scale * kept_scale)
            grad_k[piece].baddbmm_(ds.mT, q[piece], beta=0, alpha=scale * kept_scale)
        _unstack_(grad_q_QHd[group.q_rows], group.q_lens, grad_q)
        for grad_SHd, grad_slots, stacked in zip(
            (grad_k_SHd, grad_v_SHd), grad_slots_HMd, (grad_k, grad_v), strict=True
        ):
            by_sequence = stacked.unflatten(0, (-1, num_heads))
            grad_slots += by_sequence[:, :, :num_slots].sum(dim=0)
            _unstack_(grad_SHd[group.k_rows], group.k_lens, by_sequence[:, :, num_slots:])
    grad_memory_k_MHd, grad_memory_v_MHd = (x.transpose(0, 1).to(q_QHd.dtype).contiguous() for x in grad_slots_HMd)
    return grad_q_QHd, grad_k_SHd, grad_v_SHd, grad_memory_k_MHd, grad_memory_v_MHd


def _check_offsets(name: str, offsets: Tensor, num_rows: int, max_len: int) -> None:
    lens = offsets.diff()
    if offsets[0] != 0 or offsets[-1] != num_rows or (lens < 0).any() or (lens > max_len).any():
        raise ValueError(
            f"{name}_offsets must rise from 0 to {name}'s number of rows, {num_rows}, in steps of at most "
            f"max_{name}_len = {max_len}, got {offsets.tolist()}"
        )
