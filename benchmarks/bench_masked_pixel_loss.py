"""The masked pixel loss at the official shape: 288 px, patch 16, 3/4 of 324 patches hidden, float32, on the CPU.

    python benchmarks/bench_masked_pixel_loss.py            # the table
    python benchmarks/bench_masked_pixel_loss.py --check    # and exit with 1 below 3x eager, forward + backward
    pytest benchmarks/bench_masked_pixel_loss.py --benchmark-json=history.json

Bytes: forward, the hidden patches of prediction and image are read once; backward, the gradient of all patches is
written once (zeros where visible). Whatever a variant moves beyond that is its own doing.
"""

import functools

import harness
import pytest
import torch

from fastm3ae.kernels import masked_pixel_loss

BATCH_SIZE, IMAGE_SIZE_PX, PATCH_SIZE_PX, HIDDEN_FRAC = 32, 288, 16, 0.75


def eager(pred, image, is_hidden):
    """As MAE's and M3AE's code writes it."""
    B, p, g = len(image), PATCH_SIZE_PX, IMAGE_SIZE_PX // PATCH_SIZE_PX
    target = torch.einsum("nchpwq->nhwpqc", image.reshape(B, 3, g, p, g, p)).reshape(B, g * g, p * p * 3)
    mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    target = (target - mean) / (var + 1e-6) ** 0.5
    loss, mask = ((pred - target) ** 2).mean(dim=-1), is_hidden.float()
    return (loss * mask).sum() / mask.sum()


def ours(pred, image, is_hidden):
    return masked_pixel_loss(pred, image, is_hidden, patch_size_px=PATCH_SIZE_PX, normalize_target=True)


VARIANTS = {"eager": eager, "torch.compile": torch.compile(eager, fullgraph=True), "ours": ours}


def forward(function, pred, image, is_hidden):
    with torch.no_grad():
        return function(pred, image, is_hidden)


def forward_backward(function, pred, image, is_hidden):
    return torch.autograd.grad(function(pred, image, is_hidden), pred)[0]


DIRECTIONS = {"forward": forward, "forward+backward": forward_backward}


@functools.cache
def workloads():
    torch.manual_seed(0)
    num_patches, num_pixels = (IMAGE_SIZE_PX // PATCH_SIZE_PX) ** 2, PATCH_SIZE_PX**2 * 3
    pred = torch.randn(BATCH_SIZE, num_patches, num_pixels, requires_grad=True)
    image = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    is_hidden = torch.rand(BATCH_SIZE, num_patches).argsort(dim=1) < int(HIDDEN_FRAC * num_patches)
    num_bytes = {"forward": 2 * is_hidden.sum().item() * num_pixels * 4}
    num_bytes["forward+backward"] = num_bytes["forward"] + pred.numel() * 4
    exact = (pred.double(), image.double(), is_hidden)
    made = {}
    for name, direction in DIRECTIONS.items():
        runs = {
            variant: functools.partial(direction, function, pred, image, is_hidden)
            for variant, function in VARIANTS.items()
        }
        truth = direction(eager, *exact)
        for variant, run in runs.items():
            error = (run() - truth).abs().max() / truth.abs().max()
            assert error < 1e-5, f"{variant} is not timed: its {name} is wrong by {error:.1e}"
        made[name] = harness.Workload(runs, num_bytes[name])
    return made


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_pixel_loss(benchmark, variant, direction):
    workload = workloads()[direction]
    run = workload.variants[variant]
    timings = harness.measure({"eager": workload.variants["eager"], "this": run}, rounds=10)
    benchmark.extra_info["ratio_to_eager"] = timings["eager"].median_s / timings["this"].median_s
    benchmark.extra_info["num_bytes"] = workload.num_bytes
    benchmark.pedantic(run, rounds=20, warmup_rounds=3)


if __name__ == "__main__":
    harness.main(
        __doc__,
        f"masked_pixel_loss, batch {BATCH_SIZE}, {IMAGE_SIZE_PX} px, patch {PATCH_SIZE_PX}, float32",
        workloads,
        baseline="eager",
        ours="ours",
        gate="forward+backward",
        target=3.0,
    )
