"""Visible tokens back in image order with mask tokens and positions, at the official shape: 81 of 324 patches, D = 384.

    python benchmarks/bench_restore_patches.py            # the table
    python benchmarks/bench_restore_patches.py --check    # and exit with 1 below the target
    pytest benchmarks/bench_restore_patches.py --benchmark-json=history.json

Bytes at B = 256 in bfloat16: forward, the visible tokens are read and all tokens written once, 80 MB; backward, all
tokens' gradient is read and that of the visible ones written once, 80 MB. Positions and indices are small beside them.

On the CPU (B = 32, float32) the op is PyTorch's own operations, so that the target there is only not to be slower.
"""

import functools

import harness
import pytest
import torch

from fastm3ae.kernels import restore_patches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH_SIZE, DTYPE = (256, torch.bfloat16) if DEVICE == "cuda" else (32, torch.float32)
NUM_PATCHES, NUM_KEPT, WIDTH = 324, 81, 384
TARGET = 9.0 if DEVICE == "cuda" else 0.8
DIRECTIONS = ("forward", "backward")


def eager(x, restore, mask_token, positions):
    """As MAE's and M3AE's code writes it."""
    mask_tokens = mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
    tokens = torch.cat([x[:, 1:], mask_tokens], dim=1)
    tokens = tokens.gather(1, restore[..., None].expand(-1, -1, x.shape[-1]))
    return torch.cat([x[:, :1], tokens], dim=1) + positions


VARIANTS = {"eager": eager, "torch.compile": torch.compile(eager, fullgraph=True), "ours": restore_patches}


def backward(function, x, restore, mask_token, positions, grad):
    """The backward pass alone, through a graph that is made once."""
    x, mask_token = x.clone().requires_grad_(), mask_token.clone().requires_grad_()
    tokens = function(x, restore, mask_token, positions)
    return lambda: torch.autograd.grad(tokens, (x, mask_token), grad, retain_graph=True)


@functools.cache
def workloads():
    torch.manual_seed(0)
    make = functools.partial(torch.randn, device=DEVICE, dtype=DTYPE)
    x, mask_token, positions = make(BATCH_SIZE, 1 + NUM_KEPT, WIDTH), make(WIDTH), make(1 + NUM_PATCHES, WIDTH)
    restore = torch.rand(BATCH_SIZE, NUM_PATCHES, device=DEVICE).argsort(1)
    grad = make(BATCH_SIZE, 1 + NUM_PATCHES, WIDTH)
    inputs = (x, restore, mask_token, positions)
    forward_runs = {name: functools.partial(function, *inputs) for name, function in VARIANTS.items()}
    backward_runs = {name: backward(function, *inputs, grad) for name, function in VARIANTS.items()}
    exact = (x.double(), restore, mask_token.double(), positions.double())
    true_tokens, true_grads = eager(*exact), backward(eager, *exact, grad.double())()
    for name in VARIANTS:
        for got, want in zip((forward_runs[name](), *backward_runs[name]()), (true_tokens, *true_grads), strict=True):
            error = (got - want).abs().max() / want.abs().max()
            # Of the 62,208 terms of the mask token's gradient float32 loses 1e-6, then it is rounded.
            assert error < 2 * torch.finfo(DTYPE).eps + 1e-5, f"{name} is not timed: it is wrong by {error:.1e}"
    num_bytes = BATCH_SIZE * (2 + NUM_KEPT + NUM_PATCHES) * WIDTH * x.element_size()
    runs = {"forward": forward_runs, "backward": backward_runs}
    return {direction: harness.Workload(runs[direction], num_bytes) for direction in DIRECTIONS}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_restore_patches(benchmark, variant, direction):
    workload = workloads()[direction]
    run = workload.variants[variant]
    timings = harness.measure({"eager": workload.variants["eager"], "this": run}, rounds=10)
    benchmark.extra_info["ratio_to_eager"] = timings["eager"].median_s / timings["this"].median_s
    benchmark.extra_info["num_bytes"] = workload.num_bytes
    benchmark.pedantic(run, rounds=20, warmup_rounds=3)


if __name__ == "__main__":
    harness.main(
        __doc__,
        f"restore_patches, batch {BATCH_SIZE}, {NUM_KEPT} of {NUM_PATCHES} patches, width {WIDTH}, {DTYPE}, {DEVICE}",
        workloads,
        baseline="eager",
        ours="ours",
        gate="backward",
        target=TARGET,
    )
