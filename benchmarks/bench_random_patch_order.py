"""Which patches are kept, at the official shape: K = 81 of N = 324, float32 noise.

    python benchmarks/bench_random_patch_order.py            # the table
    python benchmarks/bench_random_patch_order.py --check    # and exit with 1 below a target
    pytest benchmarks/bench_random_patch_order.py --benchmark-json=history.json

Bytes: the noise is read once (not at all where it is drawn in the kernel); 8 bytes for each kept patch, and 8 + 1 for
each patch, are written once. The counting itself is N^2 comparisons per sample, 27 million at B = 256.

On the CPU the op is one sort and a scatter, so that the target there says only that the op adds next to nothing.
"""

from functools import partial

import torch
from op_benchmark import DEVICE, OpBenchmark, Target, Workload, main, pytest_cases

from fastm3ae.kernels import random_patch_order, random_patch_order_from_seed

NUM_PATCHES, NUM_KEPT = 324, 81


def eager(noise):
    """As MAE's and M3AE's code writes it, with a stable sort."""
    order = torch.argsort(noise, dim=1, stable=True)
    restore = torch.argsort(order, dim=1)
    is_hidden = torch.ones_like(noise)
    is_hidden[:, :NUM_KEPT] = 0
    return order[:, :NUM_KEPT], restore, is_hidden.gather(1, restore).bool()


def eager_drawn(batch_size):
    return eager(torch.rand(batch_size, NUM_PATCHES, device=DEVICE))


def make(batch_size):
    noise = torch.rand(batch_size, NUM_PATCHES, device=DEVICE)
    seed = torch.tensor(0, device=DEVICE)
    sizes = {"batch_size": batch_size, "num_patches": NUM_PATCHES, "num_kept": NUM_KEPT}
    given = {
        "eager": partial(eager, noise),
        "torch.compile": partial(torch.compile(eager, fullgraph=True, dynamic=False), noise),
        "ours": partial(random_patch_order, noise, NUM_KEPT),
    }
    drawn = {
        "eager": partial(eager_drawn, batch_size),
        "torch.compile": partial(torch.compile(eager_drawn, fullgraph=True, dynamic=False), batch_size),
        "ours": partial(random_patch_order_from_seed, seed, **sizes),
    }
    for variant, run in given.items():
        for got, want in zip(run(), eager(noise), strict=True):
            assert torch.equal(got, want), f"{variant} is not timed: its order is wrong"
    for variant, run in drawn.items():
        keep, restore, is_hidden = run()
        ranks = torch.arange(NUM_KEPT, device=DEVICE).expand(batch_size, -1)
        right = torch.equal(restore.gather(1, keep), ranks) and torch.equal(is_hidden, restore >= NUM_KEPT)
        assert right, f"{variant} is not timed: its order is wrong"
    num_written = batch_size * (8 * NUM_KEPT + 9 * NUM_PATCHES)
    return {
        "from noise": Workload(given, num_written + 4 * noise.numel()),
        "from a seed": Workload(drawn, num_written),
    }


SPEC = OpBenchmark(
    op="random_patch_order",
    shape=f"{NUM_KEPT} of {NUM_PATCHES} patches",
    workloads=("from noise", "from a seed"),
    variants=("eager", "torch.compile", "ours"),
    make=make,
    batch_size={"cuda": 256, "cpu": 32},
    targets={
        "cuda": (Target("from noise", "eager", 3.0), Target("from a seed", "eager", 3.0)),
        "cpu": (Target("from noise", "eager", 0.6),),
    },
    rounds={"cuda": 100, "cpu": 30},
)
test_random_patch_order = pytest_cases(SPEC)

if __name__ == "__main__":
    main(SPEC, __doc__)
