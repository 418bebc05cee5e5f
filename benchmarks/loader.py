"""The loader alone, with 2 worker processes: pairs per second against the original's pipeline on the same arrow files.

    python benchmarks/loader.py                             # drawn figures in the formats of ROCO and MediCaT
    python benchmarks/loader.py --check                     # and exit with 1 below 1.6x
    python benchmarks/loader.py --arrows data/pretrain_arrows --datasets roco medicat --tokenizer roberta-base

Work per pair: the original decodes two images, resizes them as RGBA and collates them as float32: 2 MB. Ours decodes
1.5 images, resizes only what the square keeps of them and grey as one channel, and collates bytes: 0.4 MB. It leaves
the normalisation to the device; the row "and normalised" does it here, in the process that takes the batches, and is
what --check holds.

Before anything is timed, a batch of ours must be the original's to the last bit: images after the normalisation, token
ids, padding. Each run is a whole epoch of a few batches, from the request for the first to the receipt of the last;
worker processes persist.
"""

import argparse
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import figures
import harness
import torch
from original_pipeline import original_loader
from torch.utils.data import DataLoader

from fastm3ae.config import DataConfig, MaskingConfig, PretrainConfig, TrainConfig
from fastm3ae.data.arrow import dataset_files
from fastm3ae.data.batch import PretrainBatch
from fastm3ae.data.datasets import PairDataset
from fastm3ae.data.images import normalization, normalize
from fastm3ae.data.loader import Loader, pretrain_loader
from fastm3ae.data.text import load_tokenizer

TARGET = 1.6
BATCH_SIZE, NUM_BATCHES, NUM_WORKERS = 32, 8, 2
ORIGINAL, OURS, NORMALIZED = "original", "ours", "ours, and normalised"
MEAN, STD = normalization("clip")


@dataclass(frozen=True)
class Corpus:
    title: str
    root: Path
    datasets: tuple[str, ...]
    tokenizer: str


def drawn_corpora(folder: Path) -> list[Corpus]:
    corpora = []
    for image_format in ("JPEG", "PNG"):
        for texts_per_image in (1, 3):
            root = folder / f"{image_format}_{texts_per_image}"
            root.mkdir()
            figures.write_corpus(root, image_format, texts_per_image)
            title = f"{image_format}, {texts_per_image} text{'s' * (texts_per_image > 1)} per image"
            corpora.append(Corpus(title, root, ("figures",), str(root / "tokenizer")))
    return corpora


class Pipelines:
    """Both loaders of one corpus, whose files are read several times over if they do not fill an epoch."""

    def __init__(self, corpus: Corpus, num_workers: int = NUM_WORKERS) -> None:
        num_pairs = len(PairDataset(dataset_files(corpus.root, corpus.datasets, "train")))
        datasets = corpus.datasets * math.ceil(BATCH_SIZE * NUM_BATCHES / num_pairs)
        # The original drops alpha and counts padding when it selects words: here ours does the same.
        self.config = PretrainConfig(
            data=DataConfig(root=str(corpus.root), datasets=datasets, tokenizer=corpus.tokenizer, alpha="official"),
            masking=MaskingConfig(words="official"),
            train=TrainConfig(batch_size=BATCH_SIZE),
        )
        self.tokenizer = load_tokenizer(corpus.tokenizer)
        self.ours: Loader = pretrain_loader(self.config, self.tokenizer, "train", num_workers=num_workers)
        self.original: DataLoader = original_loader(
            dataset_files(corpus.root, datasets, "train"),
            self.tokenizer,
            image_size_px=self.config.model.vision.image_size_px,
            max_text_tokens=self.config.data.max_text_tokens,
            batch_size=BATCH_SIZE,
            num_batches=NUM_BATCHES,
            num_workers=num_workers,
        )
        self.epoch = 0

    def our_batches(self):
        self.epoch += 1
        for pieces in self.ours.epoch(self.epoch, first_batch=len(self.ours) - NUM_BATCHES):
            yield from pieces

    def run_original(self) -> None:
        assert sum(len(batch["texts"]) for batch in self.original) == BATCH_SIZE * NUM_BATCHES

    def run_ours(self) -> None:
        assert sum(map(len, self.our_batches())) == BATCH_SIZE * NUM_BATCHES

    def run_ours_normalized(self) -> None:
        for batch in self.our_batches():
            normalize(batch.image_BCHW, MEAN, STD)
            normalize(batch.false_image_FCHW, MEAN, STD)

    def check(self) -> None:
        """Asserts that a batch of ours is the original's: the images and the token ids of the same pairs."""
        batch: PretrainBatch = next(iter(self.our_batches()))
        dataset = self.ours.dataset
        pair_of = {(dataset.image_id(pair), dataset.text(pair)): pair for pair in range(len(dataset))}
        image_BCHW = normalize(batch.image_BCHW, MEAN, STD)
        assert len(batch) == BATCH_SIZE and len(batch.false_image_FCHW) == BATCH_SIZE // 2
        for index, name in enumerate(zip(batch.item_ids, batch.texts, strict=True)):
            original = self.original.dataset[pair_of[name]]
            text, encoding = original["text"]
            num_tokens = batch.text_ids_BT.shape[1]
            assert text == name[1]
            assert torch.equal(original["image"], image_BCHW[index]), f"{name[0]} is not timed: its pixels differ"
            assert encoding["input_ids"][:num_tokens] == batch.text_ids_BT[index].tolist(), f"{name[0]}: ids differ"
            assert encoding["attention_mask"][:num_tokens] == (~batch.is_padding_BT[index]).int().tolist()
            assert not any(encoding["attention_mask"][num_tokens:])


def print_rows(corpus: Corpus, rounds: int) -> dict[str, float]:
    """Measures one corpus; returns how many times faster than the original each variant is."""
    pipelines = Pipelines(corpus)
    pipelines.check()
    variants = {
        ORIGINAL: pipelines.run_original,
        OURS: pipelines.run_ours,
        NORMALIZED: pipelines.run_ours_normalized,
    }
    timings = harness.measure(variants, rounds, warm_up_rounds=1)
    num_pairs, ratios = BATCH_SIZE * NUM_BATCHES, {}
    for variant, timing in timings.items():
        ratios[variant] = timings[ORIGINAL].median_s / timing.median_s
        cpu_ratio = timings[ORIGINAL].median_cpu_s / timing.median_cpu_s
        print(
            f"{corpus.title:24} {variant:21} {num_pairs / timing.median_s:8.0f} "
            f"{num_pairs / timing.percentile_s(80):6.0f} {num_pairs / timing.percentile_s(20):6.0f} "
            f"{ratios[variant]:11.2f}x {timing.median_cpu_s / num_pairs * 1e3:9.2f} {cpu_ratio:11.2f}x",
            flush=True,
        )
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help=f"exit with 1 when the ratio is below {TARGET}")
    parser.add_argument("--rounds", type=int, default=11, help="measurements of each variant (default: %(default)s)")
    parser.add_argument("--arrows", type=Path, help="folder of arrow files; without it, figures are drawn")
    parser.add_argument("--datasets", nargs="+", help="data sets in that folder, each measured by itself")
    parser.add_argument("--tokenizer", help="hub name or local folder")
    arguments = parser.parse_args()
    own = (arguments.arrows, arguments.datasets, arguments.tokenizer)
    if any(own) and not all(own):
        parser.error("--arrows, --datasets and --tokenizer go together")
    # One text at a time has nothing to share among threads, and forked processes would warn that they have none.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # the workers have the cores; a second thread of this process would wait for one

    print(f"loader, batch {BATCH_SIZE}, 288 px, {NUM_WORKERS} worker processes, {NUM_BATCHES} batches a run")
    print(f"{harness.machine()}, {', '.join(f'{name} {version(name)}' for name in ('pillow', 'tokenizers'))}\n")
    header = ("", "", "pairs/s", "p20", "p80", "vs original", "CPU ms", "vs original")
    print("{:24} {:21} {:>8} {:>6} {:>6} {:>12} {:>9} {:>12}".format(*header))
    with tempfile.TemporaryDirectory() as folder:
        if arguments.arrows:
            corpora = [Corpus(name, arguments.arrows, (name,), arguments.tokenizer) for name in arguments.datasets]
        else:
            corpora = drawn_corpora(Path(folder))
        ratio = min(print_rows(corpus, arguments.rounds)[NORMALIZED] for corpus in corpora)
    print(f"\n{NORMALIZED} vs {ORIGINAL}, the least of these: {ratio:.2f}x (target: {TARGET}x)")
    if arguments.check and ratio < TARGET:
        sys.exit(1)


if __name__ == "__main__":
    main()
