"""Attention of each query to the 32 of 2,048 memory slots that match it best in a head: 12 heads of 64.

    python benchmarks/bench_topk_attention.py            # the table
    python benchmarks/bench_topk_attention.py --check    # and exit with 1 below a target
    pytest benchmarks/bench_topk_attention.py --benchmark-json=history.json

The queries are those of B pairs, 49 visible patches and 64 text tokens each (256 pairs in bfloat16 on a GPU, 4 in
float32 on the CPU). Needed are the products of all queries and keys and, of the 32 that are kept, one product more
forward and four backward: 94 and 103 GFLOP for 256 pairs. Bytes: queries, keys and values are read and the result is
written, and in both directions the same with gradients; the scores are each variant's own doing. Ours makes the scores
about ten times instead of writing them, which in bfloat16 would be 1.4 GB.

Eager PyTorch and torch.compile choose by scores that are rounded to the inputs' dtype, in bfloat16 often another key
than the 32nd; so they are held to less.
"""

from functools import partial

import torch
from op_benchmark import DEVICE, OpBenchmark, Target, Workload, main, pytest_cases
from torch import Tensor

from fastm3ae.kernels import topk_attention

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
NUM_HEADS, HEAD_DIM = 12, 64
NUM_SLOTS, NUM_KEPT, TOKENS_PER_PAIR = 2048, 32, 49 + 64


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    best, index = (q @ k.mT * HEAD_DIM**-0.5).topk(NUM_KEPT, dim=-1)
    weights = torch.zeros(*best.shape[:2], NUM_SLOTS, dtype=best.dtype, device=best.device)
    return (weights.scatter(-1, index, best.softmax(dim=-1)) @ v).transpose(0, 1)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return topk_attention(q, k, v, NUM_KEPT)


VARIANTS = {"eager": eager, "torch.compile": torch.compile(eager, fullgraph=True, dynamic=False), "ours": ours}


def forward(function, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [function(*leaves)]


def forward_backward(function, leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*leaves), leaves, grad)


def check_numbers(variant, direction, leaves, grad) -> None:
    """Against float32's eager results, by the norm of the error, to which a few keys of nearly equal score add little.

    In bfloat16 eager's rounded scores exchange the last of most queries' keys, a tenth of the result.
    """
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    is_exact_choice = variant == "ours" or DTYPE == torch.float32
    bound = 4 * torch.finfo(DTYPE).eps + 0.003 if is_exact_choice else 0.15
    truth = direction(eager, exact, grad.float())
    for one, want in zip(direction(VARIANTS[variant], leaves, grad), truth, strict=True):
        error = (one - want).norm() / want.norm()
        assert error < bound, f"{variant} is not timed: it is wrong by {error:.1e}"


def make(batch_size):
    S = batch_size * TOKENS_PER_PAIR
    randn = partial(torch.randn, device=DEVICE, dtype=DTYPE)
    leaves = [randn(rows, NUM_HEADS, HEAD_DIM).requires_grad_() for rows in (S, NUM_SLOTS, NUM_SLOTS)]
    grad = randn(S, NUM_HEADS, HEAD_DIM)
    num_values, flops_per_key = (S + NUM_SLOTS) * NUM_HEADS * HEAD_DIM, 2 * S * NUM_HEADS * HEAD_DIM
    made = {}
    for name, direction, num_tensors, num_products in (
        ("forward", forward, 2, 1),
        ("forward+backward", forward_backward, 6, 5),
    ):
        for variant in VARIANTS:
            check_numbers(variant, direction, leaves, grad)
        runs = {variant: partial(direction, function, leaves, grad) for variant, function in VARIANTS.items()}
        num_flops = flops_per_key * (NUM_SLOTS + num_products * NUM_KEPT)
        made[name] = Workload(runs, num_tensors * num_values * grad.element_size(), num_flops)
    return made


SPEC = OpBenchmark(
    op="topk_attention",
    shape=f"{TOKENS_PER_PAIR} queries of a pair, {NUM_KEPT} of {NUM_SLOTS} slots, {NUM_HEADS} x {HEAD_DIM}, {DTYPE}",
    workloads=("forward", "forward+backward"),
    variants=tuple(VARIANTS),
    make=make,
    batch_size={"cuda": 256, "cpu": 4},
    targets={
        "cuda": (
            Target("forward", "eager", 2.0),
            Target("forward+backward", "eager", 2.0),
            Target("forward+backward", "torch.compile", 1.5),
        ),
        "cpu": (Target("forward", "eager", 1.0), Target("forward+backward", "eager", 1.4)),
    },
    rounds={"cuda": 30, "cpu": 10},
)
test_topk_attention = pytest_cases(SPEC)

if __name__ == "__main__":
    main(SPEC, __doc__)
