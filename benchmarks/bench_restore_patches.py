"""Visible tokens back in image order with mask tokens and positions, at the official shape: 81 of 324 patches, D = 384.

    python benchmarks/bench_restore_patches.py            # the table
    python benchmarks/bench_restore_patches.py --check    # and exit with 1 below a target
    pytest benchmarks/bench_restore_patches.py --benchmark-json=history.json

Bytes at B = 256 in bfloat16: forward, the visible tokens are read and all tokens written once, 80 MB; backward, all
tokens' gradient is read and that of the visible ones written once, 80 MB. Positions and indices are small beside them.

On the CPU (B = 32, float32) the op is PyTorch's own operations, those that copy whole rows.
"""

from functools import partial

import torch
from op_benchmark import DEVICE, OpBenchmark, Target, Workload, main, pytest_cases

from fastm3ae.kernels import restore_patches

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
NUM_PATCHES, NUM_KEPT, WIDTH = 324, 81, 384


def eager(x, restore, mask_token, positions):
    """As MAE's and M3AE's code writes it."""
    mask_tokens = mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
    tokens = torch.cat([x[:, 1:], mask_tokens], dim=1)
    tokens = tokens.gather(1, restore[..., None].expand(-1, -1, x.shape[-1]))
    return torch.cat([x[:, :1], tokens], dim=1) + positions


def backward(function, x, restore, mask_token, positions, grad):
    """The backward pass alone, through a graph that is made once."""
    x, mask_token = x.clone().requires_grad_(), mask_token.clone().requires_grad_()
    tokens = function(x, restore, mask_token, positions)
    return lambda: torch.autograd.grad(tokens, (x, mask_token), grad, retain_graph=True)


def make(batch_size):
    randn = partial(torch.randn, device=DEVICE, dtype=DTYPE)
    x, mask_token, positions = randn(batch_size, 1 + NUM_KEPT, WIDTH), randn(WIDTH), randn(1 + NUM_PATCHES, WIDTH)
    restore = torch.rand(batch_size, NUM_PATCHES, device=DEVICE).argsort(1)
    grad = randn(batch_size, 1 + NUM_PATCHES, WIDTH)
    inputs = (x, restore, mask_token, positions)
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    functions = {"eager": eager, "torch.compile": compiled, "ours": restore_patches}
    forward_runs = {name: partial(function, *inputs) for name, function in functions.items()}
    backward_runs = {name: backward(function, *inputs, grad) for name, function in functions.items()}
    exact = (x.double(), restore, mask_token.double(), positions.double())
    true_tokens, true_grads = eager(*exact), backward(eager, *exact, grad.double())()
    for name in functions:
        for got, want in zip((forward_runs[name](), *backward_runs[name]()), (true_tokens, *true_grads), strict=True):
            error = (got - want).abs().max() / want.abs().max()
            # Of the 62,208 terms of the mask token's gradient float32 loses 1e-6, then it is rounded.
            assert error < 2 * torch.finfo(DTYPE).eps + 1e-5, f"{name} is not timed: it is wrong by {error:.1e}"
    num_bytes = batch_size * (2 + NUM_KEPT + NUM_PATCHES) * WIDTH * x.element_size()
    return {"forward": Workload(forward_runs, num_bytes), "backward": Workload(backward_runs, num_bytes)}


SPEC = OpBenchmark(
    op="restore_patches",
    shape=f"{NUM_KEPT} of {NUM_PATCHES} patches, width {WIDTH}, {DTYPE}",
    workloads=("forward", "backward"),
    variants=("eager", "torch.compile", "ours"),
    make=make,
    batch_size={"cuda": 256, "cpu": 32},
    targets={
        "cuda": (
            Target("forward", "eager", 11.0),
            Target("forward", "torch.compile", 1.2),
            Target("forward", "copy", 0.85),
            Target("backward", "eager", 9.0),
            Target("backward", "torch.compile", 2.5),
            Target("backward", "copy", 0.81),
        ),
        "cpu": (Target("forward", "eager", 2.0), Target("backward", "eager", 3.0)),
    },
    rounds={"cuda": 100, "cpu": 30},
)
test_restore_patches = pytest_cases(SPEC)

if __name__ == "__main__":
    main(SPEC, __doc__)
