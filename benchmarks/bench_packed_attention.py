"""Attention over sequences without padding, at the packed step's shapes, against padded attention of the same rows.

    python benchmarks/bench_packed_attention.py            # the table
    python benchmarks/bench_packed_attention.py --check    # and exit with 1 below a target
    pytest benchmarks/bench_packed_attention.py --benchmark-json=history.json

Three shapes, for B samples (256 in bfloat16 on a GPU, 4 in float32 on the CPU), 12 heads of 64:
vision: self-attention of B images of 325 tokens and B visible subsets of 82. fusion: the same with dropout 0.1, for
which no fast padded kernel takes a mask. cross: B texts of 25 to 64 tokens look at 325 tokens of an image and 64 slots.

Bytes: forward, queries, keys and values are read and the result written once, 640 MB for vision on a GPU; backward, the
same and the gradient are read, and three gradients written. Products, 4 * 64 per score and head forward and 2.5 times
as many backward, take the time of as many bytes on a GPU: 91 and 227 GFLOP for vision.

The padded variants gather the rows into a batch and take them out again, because the step around them has no padding.
``by length`` calls PyTorch's attention once per length, without a mask, where there are only two lengths.
"""

import importlib.util
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from op_benchmark import DEVICE, OpBenchmark, Target, Workload, main, pytest_cases
from torch import Tensor

from fastm3ae.kernels import packed_attention

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
NUM_HEADS, HEAD_DIM = 12, 64
WHOLE, VISIBLE = 325, 82
HAS_VARLEN = DEVICE == "cuda" and importlib.util.find_spec("torch.nn.attention.varlen") is not None


@dataclass(frozen=True)
class Shape:
    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    dropout_frac: float = 0.0
    num_slots: int = 0


def shapes(batch_size: int) -> dict[str, Shape]:
    images = (WHOLE,) * batch_size + (VISIBLE,) * batch_size
    texts = tuple((25 + 17 * torch.arange(batch_size) % 40).tolist())
    return {
        "vision": Shape(images, images),
        "fusion": Shape(images, images, dropout_frac=0.1),
        "cross": Shape(texts, (WHOLE,) * batch_size, num_slots=64),
    }


class Sequences:
    """Where rows of several lengths stand, packed and padded; made once, as the loader makes it."""

    def __init__(self, lens: tuple[int, ...]) -> None:
        self.lens, self.longest = lens, max(lens)
        lens_B = torch.tensor(lens)
        starts_B = lens_B.cumsum(0) - lens_B
        self.offsets = F.pad(lens_B.cumsum(0), (1, 0)).int().to(DEVICE)
        place_L = torch.arange(self.longest)
        is_token_BL = place_L < lens_B[:, None]
        self.rows_BL = (starts_B[:, None] + place_L.minimum(lens_B[:, None] - 1)).to(DEVICE)
        self.padded_S = is_token_BL.flatten().nonzero().flatten().to(DEVICE)
        self.is_token_BL = None if is_token_BL.all() else is_token_BL.to(DEVICE)


def padded(q, k, v, memory, queries: Sequences, keys: Sequences, dropout_frac: float) -> Tensor:
    """As one writes it without a kernel: gather into a batch, attend with a mask, take the rows out."""
    q, k, v = q[queries.rows_BL], k[keys.rows_BL], v[keys.rows_BL]
    mask = keys.is_token_BL
    if memory is not None:
        k, v = (torch.cat([slots.expand(len(x), -1, -1, -1), x], 1) for slots, x in zip(memory, (k, v), strict=True))
        mask = None if mask is None else F.pad(mask, (memory[0].shape[0], 0), value=True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_frac)
    return out.transpose(1, 2).flatten(0, 1)[queries.padded_S]


def by_length(q, k, v, memory, queries: Sequences, keys: Sequences, dropout_frac: float) -> Tensor:
    """One call for the images, one for the visible subsets."""
    batch_size = len(queries.lens) // 2
    rows, out = [batch_size * length for length in (WHOLE, VISIBLE)], []
    for part in zip(*(x.split(rows) for x in (q, k, v)), strict=True):
        part = (x.unflatten(0, (batch_size, -1)).transpose(1, 2) for x in part)
        out.append(F.scaled_dot_product_attention(*part, dropout_p=dropout_frac).transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


def varlen(q, k, v, memory, queries: Sequences, keys: Sequences, dropout_frac: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, queries.offsets, keys.offsets, queries.longest, keys.longest)


def ours(q, k, v, memory, queries: Sequences, keys: Sequences, dropout_frac: float) -> Tensor:
    options = {"max_q_len": queries.longest, "max_k_len": keys.longest, "memory": memory}
    if dropout_frac:
        options |= {"dropout_frac": dropout_frac, "seed": torch.zeros((), dtype=torch.int64, device=DEVICE)}
    return packed_attention(q, k, v, queries.offsets, keys.offsets, **options)


def variants(shape: Shape) -> dict[str, object]:
    found = {"padded": padded, "torch.compile": torch.compile(padded, fullgraph=True, dynamic=False)}
    if shape.q_lens == shape.k_lens:
        found["by length"] = by_length
    if HAS_VARLEN and not shape.dropout_frac and not shape.num_slots:
        found["varlen_attn"] = varlen
    return {**found, "ours": ours}


def forward_and_backward(run, leaves: list[Tensor], grad: Tensor):
    return lambda: torch.autograd.grad(run(), leaves, grad)


def make(batch_size):
    made = {}
    for name, shape in shapes(batch_size).items():
        queries, keys = Sequences(shape.q_lens), Sequences(shape.k_lens)
        Q, S, M = sum(shape.q_lens), sum(shape.k_lens), shape.num_slots
        randn = partial(torch.randn, device=DEVICE, dtype=DTYPE)
        leaves = [randn(rows, NUM_HEADS, HEAD_DIM).requires_grad_() for rows in (Q, S, S, *(M, M) * (M > 0))]
        grad = randn(Q, NUM_HEADS, HEAD_DIM)
        inputs = (*leaves[:3], tuple(leaves[3:]) or None, queries, keys)
        runs = {}
        for variant, function in variants(shape).items():
            # Dropout's random numbers differ, so that the results are compared without.
            check_numbers(variant, partial(function, *inputs, 0.0), leaves, grad, inputs)
            runs[variant] = partial(function, *inputs, shape.dropout_frac)
        row_bytes = NUM_HEADS * HEAD_DIM * grad.element_size()
        both = {variant: forward_and_backward(run, leaves, grad) for variant, run in runs.items()}
        made[f"{name}, forward"] = Workload(
            {key: no_grad(run) for key, run in runs.items()}, (2 * Q + 2 * S) * row_bytes
        )
        made[f"{name}, forward+backward"] = Workload(both, (6 * Q + 6 * S) * row_bytes)
    return made


def no_grad(run):
    return torch.no_grad()(run)


def check_numbers(variant, run, leaves, grad, inputs) -> None:
    """Against padded attention in float32, which is exact beside bfloat16; on the CPU float32 loses 1e-6."""
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    true = padded(*exact[:3], tuple(exact[3:]) or None, *inputs[4:], 0.0)
    out = run()
    got, want = (out, *torch.autograd.grad(out, leaves, grad)), (true, *torch.autograd.grad(true, exact, grad.float()))
    for one, expected in zip(got, want, strict=True):
        error = (one - expected).abs().max() / expected.abs().max()
        assert error < 2 * torch.finfo(DTYPE).eps + 1e-5, f"{variant} is not timed: it is wrong by {error:.1e}"


SPEC = OpBenchmark(
    op="packed_attention",
    shape=f"{NUM_HEADS} heads of {HEAD_DIM}, {DTYPE}",
    workloads=tuple(f"{name}, {passes}" for name in shapes(1) for passes in ("forward", "forward+backward")),
    variants=("padded", "torch.compile", "by length", *(["varlen_attn"] if HAS_VARLEN else []), "ours"),
    make=make,
    batch_size={"cuda": 256, "cpu": 4},
    targets={
        "cuda": (
            Target("fusion, forward+backward", "padded", 2.0),
            Target("vision, forward+backward", "by length", 1.0),
            Target("vision, forward+backward", "varlen_attn", 1.0),
            Target("cross, forward+backward", "padded", 2.0),
        ),
        "cpu": (Target("fusion, forward+backward", "padded", 2.0),),
    },
    rounds={"cuda": 50, "cpu": 10},
)
test_packed_attention = pytest_cases(SPEC)

if __name__ == "__main__":
    main(SPEC, __doc__)
