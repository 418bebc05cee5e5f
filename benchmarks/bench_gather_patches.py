"""CLS and the visible patches with their positions, at the official shape: 81 of 324 patches, D = 768.

    python benchmarks/bench_gather_patches.py            # the table
    python benchmarks/bench_gather_patches.py --check    # and exit with 1 below the target
    pytest benchmarks/bench_gather_patches.py --benchmark-json=history.json

Bytes at B = 256 in bfloat16: forward, the visible rows are read and the tokens written once, 65 MB; backward, the
tokens' gradient is read and that of all patches written once, 161 MB; accumulating, the tokens' gradient and the
visible rows are read and these are written once, 97 MB. Positions, CLS and indices are small beside them.

On the CPU (B = 32, float32) the op is PyTorch's own operations, so that the target there is only not to be slower.
"""

import functools

import harness
import pytest
import torch

from fastm3ae.kernels import gather_patches, scatter_patches_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH_SIZE, DTYPE = (256, torch.bfloat16) if DEVICE == "cuda" else (32, torch.float32)
NUM_PATCHES, NUM_KEPT, WIDTH = 324, 81, 768
TARGET = 4.0 if DEVICE == "cuda" else 0.8
VARIANTS = ("eager", "torch.compile", "ours")
DIRECTIONS = ("forward", "backward", "accumulating")


def eager(x, keep, positions, cls):
    """As MAE's and M3AE's code writes it: positions for all patches, then the visible ones, then CLS."""
    x = (x + positions[1:]).gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
    return torch.cat([(cls + positions[0]).expand(len(x), 1, -1), x], dim=1)


def eager_scatter_(x, update, keep):
    """As automatic differentiation does it: the visible patches' gradient among zeros, then a sum."""
    x += torch.zeros_like(x).scatter(1, keep[..., None].expand(-1, -1, x.shape[-1]), update[:, 1:])


def backward(function, x, keep, positions, cls, grad):
    """The backward pass alone, through a graph that is made once."""
    tokens = function(x, keep, positions, cls)
    return lambda: torch.autograd.grad(tokens, (x, positions, cls), grad, retain_graph=True)


@functools.cache
def workloads():
    torch.manual_seed(0)
    make = functools.partial(torch.randn, device=DEVICE, dtype=DTYPE)
    x, positions, cls = make(BATCH_SIZE, NUM_PATCHES, WIDTH), make(1 + NUM_PATCHES, WIDTH), make(WIDTH)
    keep = torch.rand(BATCH_SIZE, NUM_PATCHES, device=DEVICE).argsort(1)[:, :NUM_KEPT].contiguous()
    grad = make(BATCH_SIZE, 1 + NUM_KEPT, WIDTH)
    leaves = [value.clone().requires_grad_() for value in (x, positions, cls)]
    leaves = (leaves[0], keep, *leaves[1:])
    gather = {
        "eager": eager,
        "torch.compile": torch.compile(eager, fullgraph=True),
        "ours": gather_patches,
    }
    scatter_ = {
        "eager": eager_scatter_,
        "torch.compile": torch.compile(eager_scatter_, fullgraph=True),
        "ours": scatter_patches_,
    }
    runs = {
        "forward": {name: functools.partial(gather[name], x, keep, positions, cls) for name in VARIANTS},
        "backward": {name: backward(gather[name], *leaves, grad) for name in VARIANTS},
        "accumulating": {name: functools.partial(scatter_[name], x.clone(), grad, keep) for name in VARIANTS},
    }
    exact = [value.detach().double().requires_grad_(value.requires_grad) for value in (leaves[0], *leaves[2:])]
    truth = eager(exact[0], keep, *exact[1:])
    _check("forward", runs, [truth])
    _check("backward", runs, torch.autograd.grad(truth, exact, grad.double()))
    sums = {}
    for name in VARIANTS:
        sums[name] = x.clone()
        scatter_[name](sums[name], grad, keep)
        assert torch.equal(sums[name], sums["eager"]), f"{name} is not timed: its sum is wrong"
    size, rows = x.element_size(), BATCH_SIZE * WIDTH
    num_bytes = {
        "forward": rows * (2 * NUM_KEPT + 1) * size,
        "backward": rows * (NUM_KEPT + 1 + NUM_PATCHES) * size,
        "accumulating": rows * 3 * NUM_KEPT * size,
    }
    return {name: harness.Workload(runs[name], num_bytes[name]) for name in DIRECTIONS}


def _check(direction, runs, truth):
    """Holds every variant's results to float64: sums over the batch lose more bits in low precision."""
    for name, run in runs[direction].items():
        results = run()
        for got, want in zip([results] if torch.is_tensor(results) else results, truth, strict=True):
            error = (got - want).abs().max() / want.abs().max()
            bound = 4 * torch.finfo(DTYPE).eps
            assert error < bound, f"{name} is not timed: its {direction} is wrong by {error:.1e}"


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gather_patches(benchmark, variant, direction):
    workload = workloads()[direction]
    run = workload.variants[variant]
    timings = harness.measure({"eager": workload.variants["eager"], "this": run}, rounds=10)
    benchmark.extra_info["ratio_to_eager"] = timings["eager"].median_s / timings["this"].median_s
    benchmark.extra_info["num_bytes"] = workload.num_bytes
    benchmark.pedantic(run, rounds=20, warmup_rounds=3)


if __name__ == "__main__":
    harness.main(
        __doc__,
        f"gather_patches, batch {BATCH_SIZE}, {NUM_KEPT} of {NUM_PATCHES} patches, width {WIDTH}, {DTYPE}, {DEVICE}",
        workloads,
        baseline="eager",
        ours="ours",
        gate="backward",
        target=TARGET,
    )
