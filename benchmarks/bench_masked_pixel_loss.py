"""The masked pixel loss at the official shape: 288 px, patch 16, 3/4 of 324 patches hidden, on float32 predictions.

    python benchmarks/bench_masked_pixel_loss.py            # the table
    python benchmarks/bench_masked_pixel_loss.py --check    # and exit with 1 below a target
    pytest benchmarks/bench_masked_pixel_loss.py --benchmark-json=history.json

Bytes: forward, the hidden patches of prediction and image are read once; with the backward pass, the gradient of what
was predicted is written once (zeros where visible). Whatever a variant moves beyond that is its own doing. "hidden" are
predictions of the hidden patches alone, from an image as the model sees it or of 8-bit levels: at B = 256, with the
bfloat16 predictions of a GPU, 382 MB and 239 MB forward and backward.
"""

from functools import partial

import torch
from op_benchmark import DEVICE, OpBenchmark, Target, Workload, main, pytest_cases

from fastm3ae.kernels import masked_pixel_loss

IMAGE_SIZE_PX, PATCH_SIZE_PX, HIDDEN_FRAC = 288, 16, 0.75
PRED_DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def eager(pred, image, hidden, mean=None, std=None):
    """As MAE's and M3AE's code writes it, of all patches or of those whose numbers are given."""
    if mean is not None:
        image = (image / 255 - mean) / std
    B, p, g = len(image), PATCH_SIZE_PX, IMAGE_SIZE_PX // PATCH_SIZE_PX
    target = torch.einsum("nchpwq->nhwpqc", image.reshape(B, 3, g, p, g, p)).reshape(B, g * g, p * p * 3)
    if hidden.dtype != torch.bool:
        target = target.gather(1, hidden[..., None].expand(pred.shape))
    average, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    target = (target - average) / (var + 1e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(dim=-1)
    if hidden.dtype != torch.bool:
        return loss.mean()
    mask = hidden.float()
    return (loss * mask).sum() / mask.sum()


def ours(pred, image, hidden, mean=None, std=None):
    options = {"patch_size_px": PATCH_SIZE_PX, "normalize_target": True}
    return masked_pixel_loss(pred, image, hidden, mean=mean, std=std, **options)


def forward(function, pred, *inputs):
    with torch.no_grad():
        return function(pred, *inputs)


def forward_backward(function, pred, *inputs):
    return torch.autograd.grad(function(pred, *inputs), pred)[0]


def make(batch_size):
    num_patches, num_pixels = (IMAGE_SIZE_PX // PATCH_SIZE_PX) ** 2, PATCH_SIZE_PX**2 * 3
    num_hidden = int(HIDDEN_FRAC * num_patches)
    shape = (batch_size, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    order = torch.rand(batch_size, num_patches, device=DEVICE).argsort(dim=1)
    image, levels = torch.randn(shape, device=DEVICE), torch.randint(256, shape, device=DEVICE, dtype=torch.uint8)
    statistics = torch.full((2, 3, 1, 1), 0.5, device=DEVICE)
    pred = torch.randn(batch_size, num_patches, num_pixels, device=DEVICE).to(PRED_DTYPE).requires_grad_()
    hidden_pred = pred[:, :num_hidden].detach().clone().requires_grad_()
    hidden = order[:, :num_hidden].contiguous()
    functions = {"eager": eager, "torch.compile": torch.compile(eager, fullgraph=True, dynamic=False), "ours": ours}
    cases = {
        "forward": (forward, pred, image, order < num_hidden),
        "forward+backward": (forward_backward, pred, image, order < num_hidden),
        "hidden, forward+backward": (forward_backward, hidden_pred, image, hidden),
        "hidden of uint8, forward+backward": (forward_backward, hidden_pred, levels, hidden, *statistics),
    }
    made = {}
    for name, (direction, *inputs) in cases.items():
        runs = {variant: partial(direction, function, *inputs) for variant, function in functions.items()}
        exact = [x.detach().double() if x.is_floating_point() else x for x in inputs]
        truth = direction(eager, exact[0].requires_grad_(), *exact[1:])
        for variant, run in runs.items():
            error = (run() - truth).abs().max() / truth.abs().max()
            bound = 1e-5 + (torch.finfo(PRED_DTYPE).eps if direction is forward_backward else 0)
            assert error < bound, f"{variant} is not timed: its {name} is wrong by {error:.1e}"
        num_read = batch_size * num_hidden * num_pixels * (inputs[0].element_size() + inputs[1].element_size())
        num_written = inputs[0].numel() * inputs[0].element_size() if direction is forward_backward else 0
        made[name] = Workload(runs, num_read + num_written)
    return made


SPEC = OpBenchmark(
    op="masked_pixel_loss",
    shape=f"{IMAGE_SIZE_PX} px, patch {PATCH_SIZE_PX}, predictions {PRED_DTYPE}",
    workloads=("forward", "forward+backward", "hidden, forward+backward", "hidden of uint8, forward+backward"),
    variants=("eager", "torch.compile", "ours"),
    make=make,
    batch_size={"cuda": 256, "cpu": 16},
    targets={
        "cuda": (
            Target("forward+backward", "eager", 12.0),
            Target("hidden, forward+backward", "torch.compile", 2.2),
            Target("hidden, forward+backward", "copy", 0.89),
            Target("hidden of uint8, forward+backward", "torch.compile", 1.8),
            Target("hidden of uint8, forward+backward", "copy", 0.86),
        ),
        "cpu": (Target("forward+backward", "eager", 3.0),),
    },
    rounds={"cuda": 100, "cpu": 20},
)
test_masked_pixel_loss = pytest_cases(SPEC)

if __name__ == "__main__":
    main(SPEC, __doc__)
