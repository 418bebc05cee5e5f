"""transformers' ViTMAEForPreTraining beside itself with the ops of examples/vitmae.py, which runs this.

    python examples/vitmae.py                            # ViT-MAE-base, 224 px, float32
    python examples/vitmae.py --check                    # and exit with 1 if a figure misses its target
    python examples/vitmae.py --config small --rounds 3  # in seconds; its targets say only that nothing is broken

Both models have the same weights, images and noise. Nothing is timed unless their losses and gradients agree: the loss
to 1e-5 of itself, the gradient of all parameters together to 1e-5 of its norm.

Then the parts, forward and backward. Each is run by the models' own code, with the layers around it taken out and what
they would give put in: masking (patches are there; which are visible, positions, CLS), unshuffle (mask tokens,
positions, without CLS), patchify and loss. "embedding" is masking with the product that makes the patches, of which
ours makes a quarter; it is not among the parts. Then the whole step, without an optimiser, and the most memory that it
takes in a process of its own: resident on the CPU, allocated on a GPU.

Variants run in turn in one process; a figure is the median of the rounds' ratios. Times are those of the processors on
the CPU, where other programs may run beside this one, and those on the clock on a GPU.
"""

import argparse
import copy
import ctypes
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import harness
import torch
import transformers
import vitmae
import whole_step
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from whole_step import Figure

MAX_ERROR = 1e-5
M_MMAP_THRESHOLD = -3  # of malloc.h
VARIANTS = ("transformers", "ours")
PARTS = ("masking", "unshuffle", "patchify and loss")
Runs = Mapping[str, Callable[[], object]]
Samples = Mapping[str, Sequence[float]]
"""What each variant took in each round."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model, how many images its parts, its step and its memory are measured with, how often, and the targets."""

    config: ViTMAEConfig
    parts_batch: int
    step_batch: int
    rounds: int
    step_rounds: int
    peak_batch: int | None
    parts_target: float
    step_target: float


SMALL = ViTMAEConfig(
    hidden_size=96,
    num_hidden_layers=1,
    num_attention_heads=3,
    intermediate_size=192,
    decoder_hidden_size=64,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=128,
    image_size=112,
    norm_pix_loss=True,
)
SIZES = {
    "base": Size(
        config=ViTMAEConfig(norm_pix_loss=True),
        parts_batch=32,
        step_batch=4,
        rounds=40,
        step_rounds=30,  # the parts are one hundredth of it, and single rounds scatter by more
        peak_batch=8,
        parts_target=3.0,
        step_target=1.0,
    ),
    "small": Size(
        config=SMALL,
        parts_batch=16,
        step_batch=8,
        rounds=10,
        step_rounds=10,
        peak_batch=None,
        parts_target=1.0,
        step_target=0.5,
    ),
}


def make_model(config: ViTMAEConfig, device: str) -> ViTMAEForPreTraining:
    torch.manual_seed(0)
    return ViTMAEForPreTraining(config).to(device).train()


def is_ours(model: ViTMAEForPreTraining) -> bool:
    return "forward" in vars(model)


def make_models(config: ViTMAEConfig, device: str) -> dict[str, ViTMAEForPreTraining]:
    model = make_model(config, device)
    return {"transformers": model, "ours": vitmae.accelerate(copy.deepcopy(model))}


def make_batch(config: ViTMAEConfig, batch_size: int, device: str) -> tuple[Tensor, Tensor]:
    """Images and noise."""
    torch.manual_seed(1)
    image = torch.randn(batch_size, 3, config.image_size, config.image_size, device=device)
    return image, torch.rand(batch_size, (config.image_size // config.patch_size) ** 2, device=device)


def step(model: ViTMAEForPreTraining, image: Tensor, noise: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss = model(image, noise=noise).loss
    loss.backward()
    return loss.detach()


def check_numbers(models: Mapping[str, ViTMAEForPreTraining], image: Tensor, noise: Tensor) -> None:
    """Prints how far losses and gradients are apart, and exits where it is too far."""
    losses = [step(model, image, noise).double() for model in models.values()]
    grads = [torch.cat([p.grad.flatten() for p in m.parameters() if p.requires_grad]).double() for m in models.values()]
    loss_error = ((losses[1] - losses[0]) / losses[0]).abs().item()
    grad_error = ((grads[1] - grads[0]).norm() / grads[0].norm()).item()
    print(f"loss {losses[0]:.7f} and {losses[1]:.7f}, apart by {loss_error:.1e} of it (target: at most {MAX_ERROR})")
    print(f"gradients apart by {grad_error:.1e} of their norm (target: at most {MAX_ERROR})\n")
    if not (loss_error <= MAX_ERROR and grad_error <= MAX_ERROR):
        sys.exit("nothing is timed: loss or gradients differ")


class Given(nn.Module):
    """Stands for layers whose result is there already."""

    def __init__(self, result) -> None:
        super().__init__()
        self.result = result

    def forward(self, *_, **__):
        return self.result


def parts_of(model: ViTMAEForPreTraining, image: Tensor, noise: Tensor) -> dict[str, Callable[[], object]]:
    """Each part's forward and backward pass, and that of the whole embedding; takes the model apart."""
    config, embeddings, decoder = model.config, model.vit.embeddings, model.decoder
    tokens, mask, restore = (x.detach() for x in embeddings(image, noise))
    (batch_size, num_visible, width), grid = tokens.shape, config.image_size // config.patch_size

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=image.device, requires_grad=True)

    def passes(run: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], object]:
        grad = torch.randn_like(run())
        return lambda: torch.autograd.grad(run(), leaves, grad)

    weights = [parameter for parameter in embeddings.parameters() if parameter.requires_grad]
    made = {"embedding": passes(lambda: embeddings(image, noise)[0], *weights)}

    masked = copy.deepcopy(embeddings)
    if is_ours(model):
        patches = leaf(batch_size, num_visible - 1, width)

        def mask_patches() -> Tensor:
            _, (keep, *_) = vitmae.cut_visible(masked, image, noise)
            return vitmae.add_positions(masked, patches, keep)
    else:
        patches = leaf(batch_size, width, grid, grid)
        masked.patch_embeddings.projection = Given(patches)

        def mask_patches() -> Tensor:
            return masked(image, noise)[0]

    made["masking"] = passes(mask_patches, patches, masked.cls_token)

    decoder.decoder_embed = decoder.decoder_norm = decoder.decoder_pred = nn.Identity()
    decoder.decoder_layers = nn.ModuleList()
    hidden = leaf(batch_size, num_visible, config.decoder_hidden_size)
    made["unshuffle"] = passes(lambda: decoder(hidden, restore).logits, hidden, decoder.mask_token)

    logits = leaf(batch_size, grid**2, 3 * config.patch_size**2)
    outputs = {"mask": mask, "ids_restore": restore, "last_hidden_state": None}
    model.vit = Given(SimpleNamespace(**outputs, hidden_states=None, attentions=None))
    model.decoder = Given(SimpleNamespace(logits=logits))
    made["patchify and loss"] = passes(lambda: model(image).loss, logits)
    return made


def measure(title: str, runs: Runs, rounds: int, device: str) -> Samples:
    """Prints the medians and the ratio."""

    def finished(run: Callable) -> Callable:
        def run_to_the_end() -> None:
            run()
            torch.cuda.synchronize()

        return run_to_the_end if device != "cpu" else run

    timings = harness.measure({name: finished(run) for name, run in runs.items()}, rounds)
    samples = {name: timing.cpu_samples_s if device == "cpu" else timing.samples_s for name, timing in timings.items()}
    medians = [f"{statistics.median(times) * 1e3:14.2f}" for times in samples.values()]
    print(f"{f'{title}, {rounds} rounds':46} {' '.join(medians)} {ratio(samples):8.3f}", flush=True)
    return samples


def ratio(samples: Samples) -> float:
    """The median of how many times as fast ours was in each round."""
    return statistics.median(a / b for a, b in zip(*(samples[name] for name in VARIANTS), strict=True))


def print_peak(variant: str, size: Size, device: str) -> None:
    # glibc keeps memory that is freed, more or less of it from run to run; this makes it give back every tensor's.
    if device == "cpu":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    model = make_model(size.config, device)
    if variant == "ours":
        model = vitmae.accelerate(model)
    batch = make_batch(size.config, size.peak_batch, device)
    for _ in range(2):
        step(model, *batch)
    print(torch.cuda.max_memory_allocated() / 2**30 if device != "cpu" else whole_step.resident_gib())


def main(script: Path) -> None:
    """Runs the benchmark.

    Args:
        script: What the user started: it is run again in processes of their own, which say their peak of memory.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure misses its target")
    parser.add_argument("--config", choices=SIZES, default="base", help="the model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="measurements of each variant")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size, device = SIZES[arguments.config], arguments.device
    torch.backends.cudnn.allow_tf32 = False  # the yardstick's convolution would be less exact than ours
    if arguments.peak_of:
        return print_peak(arguments.peak_of, size, device)

    rounds, step_rounds = (arguments.rounds or number for number in (size.rounds, size.step_rounds))
    print(f"ViTMAEForPreTraining, {arguments.config}, {size.config.image_size} px, float32, {device}, seeds 0 and 1")
    print(f"{harness.machine()}, transformers {transformers.__version__}\n")
    models = make_models(size.config, device)
    batch = make_batch(size.config, size.step_batch, device)
    check_numbers(models, *batch)

    print(f"{'milliseconds, medians':46} {VARIANTS[0]:>14} {VARIANTS[1]:>14} {'ratio':>8}")
    images = make_batch(size.config, size.parts_batch, device)
    runs = {name: parts_of(copy.deepcopy(model), *images) for name, model in models.items()}
    samples = {}
    for part in ("embedding", *PARTS):
        of_part = {name: made[part] for name, made in runs.items()}
        samples[part] = measure(f"{part}, {size.parts_batch} images", of_part, rounds, device)
    del runs
    total = {
        name: [sum(times) for times in zip(*(samples[part][name] for part in PARTS), strict=True)] for name in VARIANTS
    }
    steps = {name: (lambda model=model: step(model, *batch)) for name, model in models.items()}
    step_samples = measure(f"the whole step, {size.step_batch} images", steps, step_rounds, device)
    del models, steps

    peak = None
    if size.peak_batch:
        print(f"\nmemory of the whole step, {size.peak_batch} images")
        options = ("--config", arguments.config, "--device", device)
        peaks = {name: whole_step.peak_gib(str(script), name, *options) for name in VARIANTS}
        peak = peaks["ours"] / peaks["transformers"]
    print()
    figures = [
        Figure("masking, unshuffle, patchify and loss, times as fast", ratio(total), size.parts_target),
        Figure("the whole step, times as fast", ratio(step_samples), size.step_target),
        Figure("its peak memory over that of transformers", peak, 1.0, is_at_most=True),
    ]
    whole_step.report(figures, arguments.check)
