"""How much longer the slowest process computes than the mean, with consecutive pairs and with balanced ones.

    python benchmarks/balance.py             # the captions of the demo corpus
    python benchmarks/balance.py --check     # and exit with 1 where a balanced batch is above 1.02, or no gain
    python benchmarks/balance.py --root data/pretrain_arrows --datasets roco medicat --tokenizer roberta-base
    python benchmarks/balance.py --root data/finetune_arrows --questions vqa_vqa_rad

Of a process's share of 32 pairs the FLOPs of the packed step at the official configuration are taken, forward and
backward, after the texts' real numbers of tokens, masked words as in training, and the labels of image-text matching
that the loader would draw. A pair needs c0 + c1 t + c2 t^2 + c3 m + c4 t m + c5 f of them: t tokens, m of them masked,
f = 1 with a false image. The six numbers come from counting six single pairs (fastm3ae/training/flops.py), and a mixed
batch that is counted as a whole must have their sum to the last FLOP, or nothing is reported.

With ``--questions``, whose images are shared: how many images all parts of a batch decode and encode, and the fullest.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import harness
import numpy as np
import torch
from flops import official_config, packed
from original_step import make_batch

from fastm3ae.config import DataConfig, MaskingConfig
from fastm3ae.data.arrow import dataset_files
from fastm3ae.data.collate import BatchRequest
from fastm3ae.data.collate_pairs import PretrainBatches, VqaBatches
from fastm3ae.data.datasets import PairDataset, VqaDataset
from fastm3ae.data.demo import write_demo_corpus
from fastm3ae.data.loader import Place
from fastm3ae.data.text import encode, load_tokenizer
from fastm3ae.masking import select_words
from fastm3ae.training.flops import count_flops, model_without_values

MOST = 1.02
NUM_RANKS, PAIRS_PER_RANK, NUM_BATCHES = (2, 8, 64), 32, 50
QUESTION_BATCHES = ((64, 4), (64, 8), (256, 8))  # pairs, parts
MAX_TOKENS = DataConfig.max_text_tokens
POINTS = ((10, 2, 0), (20, 2, 0), (30, 2, 0), (10, 5, 0), (20, 5, 0), (10, 2, 1))


class PairFlops:
    """The FLOPs of pairs with so many tokens, so many of them masked, and a false image or none."""

    def __init__(self) -> None:
        self.config = official_config()
        self.model = model_without_values(self.config)
        counts = [self.count([point]) for point in POINTS]
        self.coefficients = np.linalg.solve(_terms(*np.array(POINTS).T), np.array(counts, np.float64))

    def count(self, pairs: Sequence[tuple[int, int, int]]) -> int:
        """Counts those of a batch."""
        lengths, masked, is_false = map(list, zip(*pairs, strict=True))
        batch = make_batch(self.config, lengths, masked, MAX_TOKENS)
        batch = dataclasses.replace(
            batch,
            itm_labels_B=1 - torch.tensor(is_false),
            false_image_FCHW=batch.image_BCHW[: sum(is_false)],
            itm_index_B=None,
            itm_rows_B=None,
        )
        return count_flops(self.model, packed(self.model, batch.to("meta")))["all"].total()

    def __call__(self, num_tokens: np.ndarray, num_masked: np.ndarray, is_false: np.ndarray) -> np.ndarray:
        return (_terms(num_tokens, num_masked, is_false) @ self.coefficients).round()

    def verify(self, seed: int) -> None:
        """Exits unless a batch that is counted as a whole has the sum of its pairs."""
        num_tokens = np.random.default_rng(seed).integers(6, MAX_TOKENS + 1, size=8)
        num_masked, is_false = np.maximum(1, num_tokens * 15 // 100), np.arange(8) % 2
        whole = self.count(list(zip(*(x.tolist() for x in (num_tokens, num_masked, is_false)), strict=True)))
        if whole != self(num_tokens, num_masked, is_false).sum():
            sys.exit("The FLOPs of a batch are not the sum of its pairs'.")


def _terms(t: np.ndarray, m: np.ndarray, f: np.ndarray) -> np.ndarray:
    return np.stack([np.ones_like(t), t, t * t, m, t * m, f], axis=1).astype(np.float64)


def batches_of(num_pairs: int, batch_size: int, seed: int) -> Iterator[BatchRequest]:
    """Gives batches of a permutation after the other; pairs repeat where there are fewer than a batch needs."""
    rng = np.random.default_rng(seed)
    for number in range(NUM_BATCHES):
        permutations = [rng.permutation(num_pairs) for _ in range(-(-batch_size // num_pairs))]
        yield BatchRequest(0, number, np.concatenate(permutations)[:batch_size].tolist())


def shares(request: BatchRequest, num_ranks: int, work=None) -> list[list[int]]:
    """Returns the pairs of each process, as the loader divides them."""
    places = [Place(rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    return [place.pieces(len(request.pairs), True, work)[0] for place in places]


def measure(arguments: argparse.Namespace, root: Path, tokenizer: str | Path) -> bool:
    """Prints the table of pre-training, and returns whether the targets are met."""
    seed, tokenizer = arguments.seed, load_tokenizer(tokenizer)
    dataset = PairDataset(dataset_files(root, arguments.datasets, arguments.split))
    batches = PretrainBatches(
        dataset, tokenizer, None, max_text_tokens=MAX_TOKENS, masking=MaskingConfig(), num_patches=0, seed=seed
    )
    rng, token_frac = np.random.default_rng(seed), MaskingConfig.token_frac
    encodings = [encode(tokenizer, dataset.text(pair), MAX_TOKENS) for pair in range(len(dataset))]
    num_tokens = np.array([len(encoding.ids) for encoding in encodings])
    num_masked = np.array([select_words(encoding.word_ids, token_frac, rng).sum() for encoding in encodings])
    flops = PairFlops()
    flops.verify(seed)
    print(
        f"{len(dataset)} pairs with {num_tokens.mean():.1f} tokens, standard deviation {num_tokens.std():.1f}; "
        f"{NUM_BATCHES} batches each, seed {seed}\n"
    )
    print(f"{'FLOPs of the slowest / mean':30}{'consecutive':>13}{'worst':>9}{'balanced':>13}{'worst':>9}")
    is_met, slowest = True, 0.0
    for num_ranks in NUM_RANKS:
        found = []
        for request in batches_of(len(dataset), PAIRS_PER_RANK * num_ranks, seed):
            work, pairs = batches.work(request), np.array(request.pairs)
            flops_B = flops(num_tokens[pairs], num_masked[pairs], work.further_images_B)
            divisions = shares(request, num_ranks), shares(request, num_ranks, work)
            mean = flops_B.sum() / num_ranks
            found.append([max(flops_B[share].sum() for share in each) / mean for each in divisions])
        (before, after), (worst_before, worst_after) = np.mean(found, axis=0), np.max(found, axis=0)
        print(
            f"{num_ranks:3} processes of {PAIRS_PER_RANK} pairs{before:19.4f}{worst_before:9.4f}{after:13.4f}"
            f"{worst_after:9.4f}"
        )
        is_met &= after < before and worst_after <= MOST
        slowest = max(slowest, worst_after)
    print(f"\nthe worst of the balanced batches: {slowest:.4f} (target: at most {MOST}, and less than before)")
    return is_met


def measure_questions(arguments: argparse.Namespace, root: Path) -> bool:
    """Prints the table of questions, and returns whether no division needs more images than before."""
    files = dataset_files(root, arguments.questions, arguments.split)
    batches = VqaBatches(VqaDataset(files), None, None, max_text_tokens=MAX_TOKENS, shares_images=True)
    num_questions = len(batches.dataset)
    print(f"{num_questions} questions about {len(batches.dataset.table)} images, seed {arguments.seed}\n")
    print(f"{'images, mean':30}{'consecutive':>13}{'fullest':>9}{'balanced':>13}{'fullest':>9}")
    is_met = True
    for num_pairs, num_parts in QUESTION_BATCHES:
        found = []
        for request in batches_of(num_questions, num_pairs, arguments.seed):
            work = batches.work(request)
            divisions = shares(request, num_parts), shares(request, num_parts, work)
            images = [[len(np.unique(work.image_B[share])) for share in each] for each in divisions]
            found.append([figure for each in images for figure in (sum(each), max(each))])
        before, fullest_before, after, fullest_after = np.mean(found, axis=0)
        print(
            f"{num_pairs:3} questions in {num_parts} parts{before:22.1f}{fullest_before:9.1f}{after:13.1f}"
            f"{fullest_after:9.1f}"
        )
        is_met &= after <= before and fullest_after <= fullest_before
    return is_met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument("--root", type=Path, help="folder of arrow files; default: the demo corpus, drawn now")
    parser.add_argument("--datasets", nargs="+", default=["demo"])
    parser.add_argument("--questions", nargs="+", help="data sets of questions, instead")
    parser.add_argument("--split", default="train")
    parser.add_argument("--tokenizer", default="roberta-base", help="(default: %(default)s; of the demo its own)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.questions and not arguments.root:
        parser.error("--questions needs --root")
    print(f"balanced batches of the packed step\n{harness.machine()}\n")
    if arguments.questions:
        is_met = measure_questions(arguments, arguments.root)
    elif arguments.root:
        is_met = measure(arguments, arguments.root, arguments.tokenizer)
    else:
        with tempfile.TemporaryDirectory() as folder:
            corpus = write_demo_corpus(folder, image_size_px=16, num_val=1, num_test=1)  # no picture is looked at
            is_met = measure(arguments, corpus.root, corpus.tokenizer)
    if arguments.check and not is_met:
        sys.exit(1)


if __name__ == "__main__":
    main()
