"""Visible patches straight from the image, at the official shape: 81 of 324 patches of 16 px, 288 px, for one product.

    python benchmarks/bench_gather_image_patches.py            # the table
    python benchmarks/bench_gather_image_patches.py --check    # and exit with 1 below a target
    pytest benchmarks/bench_gather_image_patches.py --benchmark-json=history.json

Bytes: the visible quarter of the image is read once, 1 byte a value (uint8) or 4 (float32), and written once in the
product's dtype: at B = 256 in bfloat16 48 MB and 96 MB.

On the CPU (B = 8, float32) the op is PyTorch's own operations, those that copy whole rows.
"""

from functools import partial

import torch
from op_benchmark import DEVICE, OpBenchmark, Target, Workload, main, pytest_cases

from fastm3ae.kernels import gather_image_patches

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
IMAGE_SIZE_PX, PATCH_SIZE_PX, NUM_KEPT = 288, 16, 81


def eager(image, keep, mean, std):
    """Normalise, cut into all patches, then gather."""
    B, p, g = len(image), PATCH_SIZE_PX, IMAGE_SIZE_PX // PATCH_SIZE_PX
    if mean is not None:
        image = (image.float() / 255 - mean[:, None, None]) / std[:, None, None]
    pixels = torch.einsum("nchpwq->nhwcpq", image.reshape(B, 3, g, p, g, p)).reshape(B, g * g, 3 * p * p)
    return pixels.gather(1, keep[..., None].expand(-1, -1, 3 * p * p)).to(DTYPE)


def ours(image, keep, mean, std):
    return gather_image_patches(image, keep, patch_size_px=PATCH_SIZE_PX, mean_C=mean, std_C=std, dtype=DTYPE)


def make(batch_size):
    num_patches, num_pixels = (IMAGE_SIZE_PX // PATCH_SIZE_PX) ** 2, 3 * PATCH_SIZE_PX**2
    mean, std = torch.rand(2, 3, device=DEVICE) + 0.1
    keep = torch.rand(batch_size, num_patches, device=DEVICE).argsort(1)[:, :NUM_KEPT].contiguous()
    shape = (batch_size, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    inputs = {
        "uint8": (torch.randint(256, shape, dtype=torch.uint8, device=DEVICE), keep, mean, std),
        "float32": (torch.randn(shape, device=DEVICE), keep, None, None),
    }
    functions = {"eager": eager, "torch.compile": torch.compile(eager, fullgraph=True, dynamic=False), "ours": ours}
    made = {}
    for source, arguments in inputs.items():
        runs = {name: partial(function, *arguments) for name, function in functions.items()}
        for name, run in runs.items():
            # The compiled division is not rounded as the others are.
            error = (run() - eager(*arguments)).abs().max() / eager(*arguments).abs().max()
            assert error < 2 * torch.finfo(DTYPE).eps, f"{name} is not timed: its pixels are wrong by {error:.1e}"
        value_bytes = arguments[0].element_size() + torch.finfo(DTYPE).bits // 8
        made[source] = Workload(runs, batch_size * NUM_KEPT * num_pixels * value_bytes)
    return made


SPEC = OpBenchmark(
    op="gather_image_patches",
    shape=f"{NUM_KEPT} patches of {PATCH_SIZE_PX} px of {IMAGE_SIZE_PX} px, to {DTYPE}",
    workloads=("uint8", "float32"),
    variants=("eager", "torch.compile", "ours"),
    make=make,
    batch_size={"cuda": 256, "cpu": 8},
    targets={
        "cuda": (Target("uint8", "eager", 4.0), Target("float32", "eager", 4.0), Target("uint8", "torch.compile", 1.0)),
        "cpu": (Target("uint8", "eager", 2.0), Target("float32", "eager", 2.0)),
    },
    rounds={"cuda": 100, "cpu": 30},
)
test_gather_image_patches = pytest_cases(SPEC)

if __name__ == "__main__":
    main(SPEC, __doc__)
