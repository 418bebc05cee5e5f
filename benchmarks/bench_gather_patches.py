"""CLS and the visible patches with their positions, at the official shape: 81 of 324 patches, D = 768.

    python benchmarks/bench_gather_patches.py            # the table
    python benchmarks/bench_gather_patches.py --check    # and exit with 1 below a target
    pytest benchmarks/bench_gather_patches.py --benchmark-json=history.json

Bytes at B = 256 in bfloat16: forward, the visible rows are read and the tokens written once, 65 MB; backward, the
tokens' gradient is read and that of all patches written once, 161 MB; accumulating, the tokens' gradient and the
visible rows are read and these are written once, 97 MB. Positions, CLS and indices are small beside them. "with order"
is forward with the random order of the patches drawn as well.

On the CPU (B = 32, float32) the op is PyTorch's own operations, so that the target there is only not to be slower.
"""

from functools import partial

import torch
from op_benchmark import DEVICE, OpBenchmark, Target, Workload, main, pytest_cases

from fastm3ae.kernels import gather_patches, random_patch_order_from_seed, scatter_patches_

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
NUM_PATCHES, NUM_KEPT, WIDTH = 324, 81, 768


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


def eager_with_order(x, positions, cls):
    order = torch.argsort(torch.rand(x.shape[:2], device=x.device), dim=1)
    restore = torch.argsort(order, dim=1)
    return eager(x, order[:, :NUM_KEPT], positions, cls), restore


def with_order(seed, x, positions, cls):
    sizes = {"batch_size": len(x), "num_patches": NUM_PATCHES, "num_kept": NUM_KEPT}
    keep, restore, _ = random_patch_order_from_seed(seed, **sizes)
    return gather_patches(x, keep, positions, cls), restore


def make(batch_size):
    randn = partial(torch.randn, device=DEVICE, dtype=DTYPE)
    x, positions, cls = randn(batch_size, NUM_PATCHES, WIDTH), randn(1 + NUM_PATCHES, WIDTH), randn(WIDTH)
    keep = torch.rand(batch_size, NUM_PATCHES, device=DEVICE).argsort(1)[:, :NUM_KEPT].contiguous()
    grad = randn(batch_size, 1 + NUM_KEPT, WIDTH)
    leaves = [value.clone().requires_grad_() for value in (x, positions, cls)]
    leaves = (leaves[0], keep, *leaves[1:])
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    gather = {"eager": eager, "torch.compile": compiled(eager), "ours": gather_patches}
    scatter_ = {"eager": eager_scatter_, "torch.compile": compiled(eager_scatter_), "ours": scatter_patches_}
    forward_runs = {name: partial(function, x, keep, positions, cls) for name, function in gather.items()}
    backward_runs = {name: backward(function, *leaves, grad) for name, function in gather.items()}
    order_runs = {
        "eager": partial(eager_with_order, x, positions, cls),
        "torch.compile": partial(compiled(eager_with_order), x, positions, cls),
        "ours": partial(with_order, torch.tensor(0, device=DEVICE), x, positions, cls),
    }
    scatter_runs = {name: partial(function, x.clone(), grad, keep) for name, function in scatter_.items()}
    exact = [value.detach().double().requires_grad_(value.requires_grad) for value in (leaves[0], *leaves[2:])]
    truth = eager(exact[0], keep, *exact[1:])
    check("forward", forward_runs, [truth])
    check("backward", backward_runs, torch.autograd.grad(truth, exact, grad.double()))
    for name, run in order_runs.items():
        tokens, restore = run()
        want = eager(x, restore.argsort(1)[:, :NUM_KEPT], positions, cls)
        assert (tokens - want).abs().max() < 0.1, f"{name} is not timed: its tokens are not those of its order"
    sums = {}
    for name, function in scatter_.items():
        sums[name] = x.clone()
        function(sums[name], grad, keep)
        assert torch.equal(sums[name], sums["eager"]), f"{name} is not timed: its sum is wrong"
    rows = batch_size * WIDTH * x.element_size()
    return {
        "forward": Workload(forward_runs, rows * (2 * NUM_KEPT + 1)),
        "with order": Workload(order_runs, rows * (2 * NUM_KEPT + 1) + 8 * batch_size * NUM_PATCHES),
        "backward": Workload(backward_runs, rows * (NUM_KEPT + 1 + NUM_PATCHES)),
        "accumulating": Workload(scatter_runs, rows * 3 * NUM_KEPT),
    }


def check(direction, runs, truth):
    """Holds every variant's results to float64: sums over the batch lose more bits in low precision."""
    for name, run in runs.items():
        results = run()
        for got, want in zip([results] if torch.is_tensor(results) else results, truth, strict=True):
            error = (got - want).abs().max() / want.abs().max()
            bound = 4 * torch.finfo(DTYPE).eps
            assert error < bound, f"{name} is not timed: its {direction} is wrong by {error:.1e}"


SPEC = OpBenchmark(
    op="gather_patches",
    shape=f"{NUM_KEPT} of {NUM_PATCHES} patches, width {WIDTH}, {DTYPE}",
    workloads=("forward", "with order", "backward", "accumulating"),
    variants=("eager", "torch.compile", "ours"),
    make=make,
    batch_size={"cuda": 256, "cpu": 32},
    targets={
        "cuda": (
            Target("forward", "eager", 10.0),
            Target("forward", "torch.compile", 1.2),
            Target("forward", "copy", 0.84),
            Target("with order", "torch.compile", 3.0),
            Target("with order", "copy", 0.60),
            Target("backward", "eager", 4.0),
            Target("backward", "torch.compile", 2.5),
            Target("backward", "copy", 0.87),
            Target("accumulating", "eager", 10.0),
            Target("accumulating", "torch.compile", 2.5),
            Target("accumulating", "copy", 0.83),
        ),
        "cpu": (Target("forward", "eager", 1.0), Target("backward", "eager", 0.8)),
    },
    rounds={"cuda": 100, "cpu": 30},
)
test_gather_patches = pytest_cases(SPEC)

if __name__ == "__main__":
    main(SPEC, __doc__)
