"""The scores of all pairs of images and texts: the original's way, every pair by the whole model, beside PairScorer.

    python benchmarks/retrieval.py                             # the figures; 7 minutes of a processor core
    python benchmarks/retrieval.py --check [--output FILE]     # and exit with 1 if one misses its target; FILE: as JSON

The original (``compute_irtr_recall`` in its modules/objectives.py) repeats an image over a batch of texts, which are
padded to the longest text that the model takes, and runs both towers and the fusion: 113 GFLOP for each pair at the
official sizes. Of these must be computed: each tower once for each image or text, the first fusion layer's
self-attention and what cross-attention reads there likewise, and for the pair the rest of that layer (9 of 14 products
of width x width for each token), four layers, and CLS of the last one: 36 GFLOP at 64 tokens, 33 at 40. They are
counted as fastm3ae/training/flops.py says, for an image, a text and a pair, and added up for 2,000 images and 2,000
texts.

The time is that of 64 images with 64 texts of 16 to 64 tokens, float32, at the official depth (11 blocks, 12 and 6
layers), a quarter of the width (192) and 224 px, so that all pairs take minutes; the share of the FLOPs that is left
then is printed beside it. Both ways run in turn on eight images at a time. Ours encodes the texts again each time,
which counts against it. The figure is the ratio of the medians. All scores are compared.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import harness
import numpy as np
import original_step
import torch
import whole_step
from flops import official_config
from torch import Tensor
from whole_step import Figure, with_vocabulary

from fastm3ae.config import M3AEConfig
from fastm3ae.data.batch import ImageTextBatch
from fastm3ae.model.m3ae import M3AE
from fastm3ae.model.pair_scores import PairScorer
from fastm3ae.training.flops import FlopsByPart, model_without_values

NUM_TOKENS, NUM_COUNTED = 64, 2000
SIZES_PX, LENGTHS = (288, 384), (64, 40)
NUM_TIMED, NUM_AT_A_TIME, SHORTEST = 64, 8, 16
TEXTS_PER_PASS = 8  # of the original's way, which is faster so on a CPU than with its 64
MAX_DIFFERENCE, MAX_FLOPS_FRAC, MIN_RATIO = 1e-5, 0.36, 2.5


@torch.inference_mode()
def original_scores(model: M3AE, batch: ImageTextBatch, texts_per_pass: int = TEXTS_PER_PASS) -> Tensor:
    """Scores (I, T) of the batch's images with its texts; there may be more or fewer of one than of the other."""
    layers, scores = original_step.separated(model), []
    for image_CHW in batch.image_BCHW:
        for start in range(0, len(batch.text_ids_BT), texts_per_pass):
            texts = slice(start, start + texts_per_pass)
            part = dataclasses.replace(
                batch, is_padding_BT=batch.is_padding_BT[texts], num_tokens_B=batch.num_tokens_B[texts]
            )
            ids_BT = batch.text_ids_BT[texts]
            image_BCHW = image_CHW.repeat(len(ids_BT), 1, 1, 1)
            scores.append(model.retrieval_head(original_step.infer(model, layers, part, ids_BT, image_BCHW).cls_BE))
    return torch.cat(scores).view(len(batch.image_BCHW), -1)


def our_scores(model: M3AE, batch: ImageTextBatch) -> Tensor:
    scorer = PairScorer(model)
    images, texts = scorer.encode_images(batch.image_BCHW), scorer.encode_texts(batch.text_ids_BT, batch.num_tokens_B)
    image_P, text_P = np.divmod(np.arange(len(images) * len(texts)), len(texts))
    return scorer.scores(images, texts, image_P, text_P).view(len(images), -1)


WAYS: dict[str, Callable[[M3AE, ImageTextBatch], Tensor]] = {"original": original_scores, "ours": our_scores}


def counted_config(image_size_px: int) -> M3AEConfig:
    config = official_config()
    vision = dataclasses.replace(config.vision, image_size_px=image_size_px)
    return dataclasses.replace(config, vision=vision, objectives=("retrieval",))


def timed_config() -> M3AEConfig:
    config = counted_config(224)
    return dataclasses.replace(
        with_vocabulary(config, 1000),
        vision=dataclasses.replace(config.vision, width=192),
        text=dataclasses.replace(config.text, width=192, num_heads=3, mlp_width=768, vocab_size=1000),
        fusion=dataclasses.replace(config.fusion, width=192, num_heads=3),
        init_std=0.05,
    )


def make_texts(config: M3AEConfig, lengths: list[int]) -> ImageTextBatch:
    """As many random images as texts of these lengths."""
    return original_step.make_batch(config, lengths, 0, NUM_TOKENS)


def count_flops(config: M3AEConfig, num_tokens: int) -> dict[str, int]:
    """FLOPs of the original's pair, and ours of an image, a text, and a pair."""
    model = model_without_values(config).eval()
    batch = make_texts(config, [num_tokens])
    batch = dataclasses.replace(batch.to("meta"), num_tokens_B=batch.num_tokens_B)
    scorer, pair_P = PairScorer(model), np.zeros(1, np.int64)
    flops = {}
    with FlopsByPart(model) as counter:
        original_scores(model, batch)
        flops["original pair"] = counter.take().total()
        images = scorer.encode_images(batch.image_BCHW)
        flops["image"] = counter.take().total()
        texts = scorer.encode_texts(batch.text_ids_BT, batch.num_tokens_B)
        flops["text"] = counter.take().total()
        scorer.scores(images, texts, pair_P, pair_P)
        flops["pair"] = counter.take().total()
    return flops


def flops_frac(flops: dict[str, int], num_images: int, num_texts: int) -> float:
    """All of ours over all of the original's."""
    ours = num_images * flops["image"] + num_texts * flops["text"] + num_images * num_texts * flops["pair"]
    return ours / (num_images * num_texts * flops["original pair"])


def print_flops() -> list[Figure]:
    print(f"{'GFLOP, forward':24}{'original pair':>15}{'image':>12}{'text':>12}{'pair':>12}{'of all':>12}")
    fracs = []
    for size in SIZES_PX:
        for num_tokens in LENGTHS:
            flops = count_flops(counted_config(size), num_tokens)
            fracs.append(flops_frac(flops, NUM_COUNTED, NUM_COUNTED))
            cells = f"{flops['original pair'] / 1e9:15.3f}" + "".join(
                f"{flops[name] / 1e9:12.3f}" for name in ("image", "text", "pair")
            )
            print(f"{f'{size} px, {num_tokens} tokens':24}{cells}{fracs[-1]:12.4f}")
    print()
    name = f"largest share of the original's FLOPs, {NUM_COUNTED:,} x {NUM_COUNTED:,} pairs"
    return [Figure(name, max(fracs), MAX_FLOPS_FRAC, is_at_most=True)]


def score_in_turn(model: M3AE, batch: ImageTextBatch, rounds: int) -> tuple[dict, dict[str, Tensor]]:
    """Times of each way on the next of the images with all texts, and the scores of all that were scored."""
    parts = [dataclasses.replace(batch, image_BCHW=image_BCHW) for image_BCHW in batch.image_BCHW.split(NUM_AT_A_TIME)]
    scores: dict[str, list[Tensor]] = {name: [] for name in WAYS}

    def run_next(name: str) -> None:
        of_way = scores[name]
        of_way.append(WAYS[name](model, parts[len(of_way) % len(parts)]))

    timings = whole_step.compare({name: lambda name=name: run_next(name) for name in WAYS}, rounds, warm_up_rounds=0)
    return timings, {name: torch.cat(of_way) for name, of_way in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure misses its target")
    parser.add_argument("--rounds", type=int, default=NUM_TIMED // NUM_AT_A_TIME, help="of eight images each")
    parser.add_argument("--output", type=Path, help="write the figures there, too, as report.py reads them")
    arguments = parser.parse_args()

    figures = print_flops()
    model = whole_step.make_model(timed_config()).eval()
    lengths = np.linspace(SHORTEST, NUM_TOKENS, NUM_TIMED).round().astype(int)
    batch = make_texts(model.config, np.random.default_rng(0).permutation(lengths).tolist())
    frac = flops_frac(count_flops(model.config, int(lengths.mean())), NUM_AT_A_TIME, NUM_TIMED)
    print(f"{NUM_TIMED} images with {NUM_TIMED} texts, {NUM_AT_A_TIME} images at a time, float32\n{harness.machine()}")
    print(f"{frac:.3f} of the original's FLOPs are left\n")
    few = dataclasses.replace(batch, image_BCHW=batch.image_BCHW[:1])
    differences = [(original_scores(model, few) - our_scores(model, few)).abs().max().item()]  # also warms up
    if differences[0] > MAX_DIFFERENCE:
        raise SystemExit(f"The scores differ by {differences[0]:.1e}, so nothing is timed.")
    timings, scores = score_in_turn(model, batch, arguments.rounds)
    differences.append((scores["original"] - scores["ours"]).abs().max().item())
    print(f"\n{scores['ours'].numel():,} scores with a deviation of {scores['ours'].std():.3f}, ", end="")
    print(f"largest difference of one: {differences[1]:.1e} (target: at most {MAX_DIFFERENCE:.0e})")
    errors = [f"the scores differ by {differences[1]:.1e}"] if differences[1] > MAX_DIFFERENCE else []
    ratio = timings["original"].median_s / timings["ours"].median_s
    figures.append(Figure("time of the original's way over ours", ratio, MIN_RATIO))
    if arguments.output:
        first = timings["original"]
        num_pairs = NUM_AT_A_TIME * NUM_TIMED
        rows = [whole_step.row_of(num_pairs, name, timing, first, None) for name, timing in timings.items()]
        whole_step.write_json(arguments.output, "retrieval", rows, figures, errors)
    whole_step.report(figures, arguments.check, errors)


if __name__ == "__main__":
    main()
