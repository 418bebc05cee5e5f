"""MPMA's step beside the same model in plain PyTorch (plain_mpma.py), forward and backward, at the preset's sizes.

    python benchmarks/mpma_step.py            # the figures
    python benchmarks/mpma_step.py --check    # and exit with 1 if one misses its target
    python benchmarks/mpma_step.py --demo     # at the demo's sizes, 32 pairs, without dropout; no target

ViT-B/16 at 224 px with BERT-base, reports of 20 to 100 tokens, as Open-i has them, padded to the longest, half of the
words and three quarters of the patches hidden, dropout 0.1. All run on one model, in turn, without an optimiser; a
figure is the ratio of the medians. On a CPU 8 pairs in float32; a peak of memory is that of a process of its own, with
the model and its gradients. Takes about 10 minutes and 5 GB. On a GPU 4 batches of 64 pairs in turn, in bf16 autocast,
ours also compiled; a peak is that of the tensors, model and gradients included.

"plain" materialises its attention, as the public code of MRM and MGCA does, and is what the targets are against.
"plain, fused" runs ``scaled_dot_product_attention``.
"""

import argparse
import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import harness
import numpy as np
import plain_mpma
import torch
import whole_step
from original_step import make_batch
from whole_step import Figure, Losses, with_vocabulary

from fastm3ae.config import MPMAConfig
from fastm3ae.config.presets import preset
from fastm3ae.data.batch import PretrainBatch
from fastm3ae.model.mpma import MPMA

VOCAB_SIZE = 28996  # Bio_ClinicalBERT's
LENGTHS = (20, 31, 43, 52, 61, 72, 85, 100)
NUM_GPU_BATCHES, GPU_BATCH_SIZE = 4, 64
MIN_RATIO = {"cpu": 1.3, "cuda": 2.0}


def plain(model: MPMA, batch: PretrainBatch, is_fused: bool = False) -> torch.Tensor:
    return sum(plain_mpma.losses(model, batch, is_fused).values())


VARIANTS: dict[str, Losses] = {
    "plain": plain,
    "plain, fused": partial(plain, is_fused=True),
    "ours": whole_step.packed,
}
GPU_VARIANTS = VARIANTS | {"ours, compiled": partial(whole_step.packed, compiled=True)}


def make_reports(config: MPMAConfig, lengths: Sequence[int], seed: int = 0) -> PretrainBatch:
    """Half of the words are hidden; texts are padded to a multiple of 8."""
    num_tokens = -(-max(lengths) // 8) * 8
    return make_batch(config, lengths, [(length - 2) // 2 for length in lengths], num_tokens, seed)


def make_steps(variants: dict[str, Losses], model: MPMA, batches: list[PretrainBatch]) -> dict[str, Callable]:
    is_gpu = batches[0].image_BCHW.is_cuda
    autocast = partial(torch.autocast, "cuda", torch.bfloat16) if is_gpu else nullcontext
    steps = {name: partial(whole_step.run, losses, model, autocast=autocast) for name, losses in variants.items()}
    return {name: whole_step.in_turn(step, batches) for name, step in steps.items()}


def print_demo(rounds: int) -> None:
    model = whole_step.make_model(with_vocabulary(preset("mpma-demo").model, 400))
    batch = make_reports(model.config, [16 + number % 12 for number in range(32)])
    print(f"MPMA's step at the demo's sizes, 32 pairs, float32\n{harness.machine()}\n")
    timings = whole_step.compare(make_steps(VARIANTS, model, [batch]), rounds)
    print()
    for name in ("plain", "plain, fused"):
        print(f"ours: {timings[name].median_s / timings['ours'].median_s:.2f} times as fast as {name}")


def cpu_peak(name: str) -> float:
    """Runs in a process of its own."""
    model = whole_step.make_model(with_vocabulary(preset("mpma").model, VOCAB_SIZE))
    step = make_steps(VARIANTS, model, [make_reports(model.config, LENGTHS)])[name]
    for _ in range(2):
        step()
    return whole_step.resident_gib()


def gpu_peak(step: Callable[[], None]) -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure misses its target")
    parser.add_argument("--rounds", type=int, help="measurements of each (default: 5, of the demo and a GPU 20)")
    parser.add_argument("--demo", action="store_true", help="at the demo's sizes, on the CPU")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.demo:
        return print_demo(arguments.rounds or 20)
    if arguments.peak_of:
        return print(cpu_peak(arguments.peak_of))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = whole_step.make_model(with_vocabulary(preset("mpma").model, VOCAB_SIZE), device)
    if device == "cuda":
        lengths = np.random.default_rng(0).integers(20, 101, (NUM_GPU_BATCHES, GPU_BATCH_SIZE)).tolist()
        variants, title = GPU_VARIANTS, f"{GPU_BATCH_SIZE} pairs of 20 to 100 tokens, bf16"
    else:
        lengths, variants, title = [LENGTHS], VARIANTS, f"{len(LENGTHS)} pairs of {LENGTHS} tokens, float32"
    batches = [make_reports(model.config, some, seed).to(device) for seed, some in enumerate(lengths)]
    print(f"MPMA's step at the preset's sizes, {title}\n{harness.machine()}\n")
    steps = make_steps(variants, model, batches)
    default_rounds = 20 if device == "cuda" else 5
    # On a GPU each batch is seen by what compiles for it before.
    warm_up_rounds = len(batches) if device == "cuda" else 2
    timings = whole_step.compare(steps, arguments.rounds or default_rounds, warm_up_rounds)
    median_s = {name: timing.median_s for name, timing in timings.items()}
    if device == "cuda":
        peaks = {name: gpu_peak(step) for name, step in steps.items()}
        print("".join(f"{name:16} {peak:6.2f} GiB at the peak\n" for name, peak in peaks.items()))
    else:
        del model, steps
        gc.collect()
        peaks = {name: whole_step.peak_gib(__file__, name) for name in variants}
        print()
    best = min((name for name in variants if name.startswith("ours")), key=median_s.get)
    print(f"{best}: {median_s['plain, fused'] / median_s[best]:.2f} times as fast as plain, fused")
    figures = [
        Figure(f"time of plain over that of {best}", median_s["plain"] / median_s[best], MIN_RATIO[device]),
        Figure(f"peak memory of {best} over that of plain", peaks[best] / peaks["plain"], 1.0, is_at_most=True),
    ]
    if arguments.json:
        rows = [
            whole_step.row_of(len(batches[0]), name, timing, timings["plain"], peaks[name])
            for name, timing in timings.items()
        ]
        whole_step.write_json(arguments.json, "MPMA", rows, figures)
    whole_step.report(figures, arguments.check)


if __name__ == "__main__":
    main()
