"""A small corpus whose images can be told apart by their grey level."""

import io
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastm3ae.config import MaskingConfig
from fastm3ae.data.arrow import write_pairs
from fastm3ae.data.collate_pairs import PretrainBatches
from fastm3ae.data.datasets import PairDataset
from fastm3ae.data.images import make_transform
from fastm3ae.data.text import load_tokenizer

TOKENIZERS = Path(__file__).parent / "data" / "golden" / "data" / "tok"
TOKENIZER = load_tokenizer(TOKENIZERS / "bert-base-uncased")
WORDS = (
    "acute axial brain chest cm ct figure gland hyperintense image knee large left lesion lobe mri unknownword".split()
)
SIZE = 16


def png(level, size=SIZE):
    stream = io.BytesIO()
    Image.fromarray(np.full((size, size), level, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def caption_rows(num_images, first_level=0, bad=()):
    """Image i is of one grey level, first_level + i, and has 1 + i % 3 texts; bad ones are cut short."""
    rng = np.random.default_rng(first_level)
    for i in range(num_images):
        data = png(first_level + i)
        texts = [" ".join(rng.choice(WORDS, size=rng.integers(3, 30))) for _ in range(1 + i % 3)]
        image = data[: len(data) // 2] if i in bad else data
        yield {"image": image, "caption": texts, "image_id": f"img/{first_level + i}.png", "split": "train"}


def write_corpus(folder, bad=()):
    """Two data sets with levels 0-11 and 100-104: 24 + 9 pairs."""
    write_pairs(folder / "one_train.arrow", caption_rows(12, 0, bad))
    write_pairs(folder / "two_train.arrow", caption_rows(5, 100))
    return [folder / "one_train.arrow", folder / "two_train.arrow"]


def pretrain_batches(files, transform="clip", words="whole_word", tokenizer=TOKENIZER, **options):
    options = {"max_text_tokens": 32, "masking": MaskingConfig(words=words), "num_patches": 4, "seed": 3} | options
    return PretrainBatches(PairDataset(files), tokenizer, make_transform(transform, SIZE), **options)


def assert_equal(got, want):
    assert type(got) is type(want)
    for field in fields(got):
        left, right = getattr(got, field.name), getattr(want, field.name)
        if isinstance(left, torch.Tensor):
            assert torch.equal(left, right), field.name
        else:
            assert np.array_equal(left, right) if isinstance(left, np.ndarray) else left == right, field.name
