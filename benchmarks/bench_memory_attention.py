"""Attention to a sequence's own keys and 64 memory slots, at the shapes of memory-augmented fusion: 12 heads of 64.

    python benchmarks/bench_memory_attention.py            # the table
    python benchmarks/bench_memory_attention.py --check    # and exit with 1 below a target
    pytest benchmarks/bench_memory_attention.py --benchmark-json=history.json

Three shapes, for B samples (256 in bfloat16 on a GPU, 4 in float32 on the CPU), all without padding and dropout:
visible: 64 text tokens look at an image's 49 visible patches; whole: at all of 325 tokens; self: 325 at themselves.

Bytes: forward, queries, keys and values are read and the result written once, 306 MB for whole on a GPU; backward, the
same and the gradient are read, and three gradients written.

The peers put slots and keys into one tensor first, which packed_attention does not: eager PyTorch (products, softmax),
torch.compile of it, PyTorch's fused attention, and FlexAttention on a GPU. ``without slots`` is PyTorch's attention to
the keys alone: other numbers, and what the slots would cost at the least.
"""

from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from op_benchmark import DEVICE, OpBenchmark, Target, Workload, main, pytest_cases
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from fastm3ae.kernels import packed_attention

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
NUM_HEADS, HEAD_DIM, NUM_SLOTS = 12, 64, 64


@dataclass(frozen=True)
class Shape:
    """Of every sample: how many queries look at how many keys."""

    num_queries: int
    num_keys: int


SHAPES = {"visible": Shape(64, 49), "whole": Shape(64, 325), "self": Shape(325, 325)}


def attend(attention, batch_size: int, q: Tensor, k: Tensor, v: Tensor, *slots: Tensor) -> Tensor:
    """A batch's attention to slots and keys in one tensor."""
    q, k, v = (x.unflatten(0, (batch_size, -1)).transpose(1, 2) for x in (q, k, v))
    if slots:
        slots = (x.transpose(0, 1).expand(batch_size, -1, -1, -1) for x in slots)
        k, v = (torch.cat(pair, dim=2) for pair in zip(slots, (k, v), strict=True))
    return attention(q, k, v).transpose(1, 2).flatten(0, 1)


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * HEAD_DIM**-0.5).softmax(dim=-1) @ v


# Functions of their own, because torch.compile counts a function's variants, and refuses to make many.
def eager(batch_size: int, *leaves: Tensor) -> Tensor:
    return attend(products, batch_size, *leaves)


def flex(batch_size: int, *leaves: Tensor) -> Tensor:
    return attend(flex_attention, batch_size, *leaves)


def concatenated(batch_size: int, *leaves: Tensor) -> Tensor:
    return attend(F.scaled_dot_product_attention, batch_size, *leaves)


def without_slots(batch_size: int, q: Tensor, k: Tensor, v: Tensor, *slots: Tensor) -> Tensor:
    return attend(F.scaled_dot_product_attention, batch_size, q, k, v)


@cache
def offsets(batch_size: int, length: int) -> Tensor:
    """Made once, as the loader makes them."""
    return torch.arange(batch_size + 1, dtype=torch.int32, device=DEVICE) * length


def ours(batch_size: int, q: Tensor, k: Tensor, v: Tensor, *slots: Tensor) -> Tensor:
    lens = {"max_q_len": len(q) // batch_size, "max_k_len": len(k) // batch_size}
    q_offsets, k_offsets = (offsets(batch_size, length) for length in lens.values())
    return packed_attention(q, k, v, q_offsets, k_offsets, memory=slots, **lens)


VARIANTS = {
    "eager": eager,
    "torch.compile": torch.compile(eager, fullgraph=True, dynamic=False),
    "concat + SDPA": concatenated,
}
if DEVICE == "cuda":
    VARIANTS["FlexAttention"] = torch.compile(flex, fullgraph=True, dynamic=False)
VARIANTS |= {"without slots": without_slots, "ours": ours}


def forward(function, batch_size: int, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [function(batch_size, *leaves)]


def forward_backward(function, batch_size: int, leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(batch_size, *leaves), leaves, grad, allow_unused=True)


def check_numbers(variant, direction, batch_size, leaves, grad) -> None:
    """Against eager attention in float32, which is exact beside bfloat16; on the CPU float32 loses 1e-6."""
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    truth = direction(eager, batch_size, exact, grad.float())
    for one, want in zip(direction(VARIANTS[variant], batch_size, leaves, grad), truth, strict=True):
        error = (one - want).abs().max() / want.abs().max()
        assert error < 4 * torch.finfo(DTYPE).eps + 1e-5, f"{variant} is not timed: it is wrong by {error:.1e}"


def make(batch_size):
    randn = partial(torch.randn, device=DEVICE, dtype=DTYPE)
    made = {}
    for name, shape in SHAPES.items():
        Q, S = batch_size * shape.num_queries, batch_size * shape.num_keys
        leaves = [randn(rows, NUM_HEADS, HEAD_DIM).requires_grad_() for rows in (Q, S, S, NUM_SLOTS, NUM_SLOTS)]
        grad = randn(Q, NUM_HEADS, HEAD_DIM)
        row_bytes = NUM_HEADS * HEAD_DIM * grad.element_size()
        for passes, direction, times in (("forward", forward, 2), ("forward+backward", forward_backward, 6)):
            for variant in VARIANTS:
                if variant != "without slots":
                    check_numbers(variant, direction, batch_size, leaves, grad)
            runs = {key: partial(direction, function, batch_size, leaves, grad) for key, function in VARIANTS.items()}
            made[f"{name}, {passes}"] = Workload(runs, times * (Q + S) * row_bytes)
    return made


SPEC = OpBenchmark(
    op="memory_attention",
    shape=f"{NUM_SLOTS} slots, {NUM_HEADS} heads of {HEAD_DIM}, {DTYPE}",
    workloads=tuple(f"{name}, {passes}" for name in SHAPES for passes in ("forward", "forward+backward")),
    variants=tuple(VARIANTS),
    make=make,
    batch_size={"cuda": 256, "cpu": 4},
    targets={
        "cuda": (
            Target("whole, forward", "eager", 6.0),
            Target("whole, forward", "concat + SDPA", 2.4),
            Target("whole, forward", "FlexAttention", 3.0),
            Target("whole, forward+backward", "eager", 5.0),
            Target("whole, forward+backward", "concat + SDPA", 2.0),
            Target("self, forward", "eager", 8.0),
            Target("self, forward", "concat + SDPA", 1.4),
            Target("self, forward", "without slots", 0.8),
        ),
        # Sequences of one length, without dropout, lose nothing in a plain batch, to which ours adds its copies.
        "cpu": (Target("self, forward+backward", "eager", 0.9), Target("whole, forward+backward", "eager", 0.7)),
    },
    rounds={"cuda": 50, "cpu": 10},
)
test_memory_attention = pytest_cases(SPEC)

if __name__ == "__main__":
    main(SPEC, __doc__)
