"""Which patches are kept, at the official shape: K = 81 of N = 324, float32 noise.

    python benchmarks/bench_random_patch_order.py            # the table
    python benchmarks/bench_random_patch_order.py --check    # and exit with 1 below the target

Bytes: the noise is read once (not at all where it is drawn in the kernel); 8 bytes for each kept patch, and 8 + 1 for
each patch, are written once. The counting itself is N^2 comparisons per sample, 27 million at B = 256.

On the CPU the op is the two sorts themselves, so that the target there says only that the op adds next to nothing.
"""

import functools

import harness
import pytest
import torch

from fastm3ae.kernels import random_patch_order, random_patch_order_from_seed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH_SIZE, NUM_PATCHES, NUM_KEPT = (256 if DEVICE == "cuda" else 32), 324, 81
TARGET = 3.0 if DEVICE == "cuda" else 0.8


def eager(noise):
    """As MAE's and M3AE's code writes it, with a stable sort."""
    order = torch.argsort(noise, dim=1, stable=True)
    restore = torch.argsort(order, dim=1)
    is_hidden = torch.ones_like(noise)
    is_hidden[:, :NUM_KEPT] = 0
    return order[:, :NUM_KEPT], restore, is_hidden.gather(1, restore).bool()


def eager_drawn():
    return eager(torch.rand(BATCH_SIZE, NUM_PATCHES, device=DEVICE))


@functools.cache
def workloads():
    torch.manual_seed(0)
    noise = torch.rand(BATCH_SIZE, NUM_PATCHES, device=DEVICE)
    seed = torch.tensor(0, device=DEVICE)
    sizes = {"batch_size": BATCH_SIZE, "num_patches": NUM_PATCHES, "num_kept": NUM_KEPT}
    given = {
        "eager": functools.partial(eager, noise),
        "torch.compile": functools.partial(torch.compile(eager, fullgraph=True), noise),
        "ours": functools.partial(random_patch_order, noise, NUM_KEPT),
    }
    drawn = {
        "eager": eager_drawn,
        "torch.compile": torch.compile(eager_drawn, fullgraph=True),
        "ours": functools.partial(random_patch_order_from_seed, seed, **sizes),
    }
    for variant, run in given.items():
        for got, want in zip(run(), eager(noise), strict=True):
            assert torch.equal(got, want), f"{variant} is not timed: its order is wrong"
    for variant, run in drawn.items():
        keep, restore, is_hidden = run()
        ranks = torch.arange(NUM_KEPT, device=DEVICE).expand(BATCH_SIZE, -1)
        right = torch.equal(restore.gather(1, keep), ranks) and torch.equal(is_hidden, restore >= NUM_KEPT)
        assert right, f"{variant} is not timed: its order is wrong"
    num_written = BATCH_SIZE * (8 * NUM_KEPT + 9 * NUM_PATCHES)
    return {
        "from noise": harness.Workload(given, num_written + 4 * noise.numel()),
        "from a seed": harness.Workload(drawn, num_written),
    }


@pytest.mark.parametrize("source", ["from noise", "from a seed"])
@pytest.mark.parametrize("variant", ["eager", "torch.compile", "ours"])
def test_random_patch_order(benchmark, variant, source):
    workload = workloads()[source]
    run = workload.variants[variant]
    timings = harness.measure({"eager": workload.variants["eager"], "this": run}, rounds=10)
    benchmark.extra_info["ratio_to_eager"] = timings["eager"].median_s / timings["this"].median_s
    benchmark.extra_info["num_bytes"] = workload.num_bytes
    benchmark.pedantic(run, rounds=20, warmup_rounds=3)


if __name__ == "__main__":
    harness.main(
        __doc__,
        f"random_patch_order, batch {BATCH_SIZE}, {NUM_KEPT} of {NUM_PATCHES} patches, {DEVICE}",
        workloads,
        baseline="eager",
        ours="ours",
        gate="from noise",
        target=TARGET,
    )
