"""The original's data pipeline for pre-training, step by step as its code does it: the baseline of ``loader.py``.

Modelled: the arrow files as one table, of which an image becomes ``bytes``; ``RGBA`` for every image, then resize,
centre crop, ``RGB``, ToTensor, Normalize; a false image drawn, decoded and transformed for every pair; one call of the
tokenizer for each text, padded to the full length, with special tokens and offsets; a collate function that copies
image by image into float32 tensors, and the whole-word masking of transformers 4.6 over token strings.

Where the original depends on versions or has a choice, the faster way is taken: today's Pillow, torch and tokenizers,
worker processes that persist from one epoch to the next, ids turned into tokens in one call per text, special tokens
found with tensor operations.

Source: The original's datasets/base_dataset.py, transforms/transform.py, datamodules/multitask_datamodule.py.
"""

import functools
import io
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, RandomSampler
from torchvision import transforms
from transformers import PreTrainedTokenizerFast

from fastm3ae.masking import select_words_official

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC = Image.Resampling.BICUBIC
MASKED_TOKEN_FRAC = 0.15


class OriginalDataset(Dataset):
    """The pairs of one arrow file, each with its false image."""

    def __init__(self, file: Path, tokenizer: PreTrainedTokenizerFast, image_size_px: int, max_text_tokens: int):
        self.table = pa.ipc.RecordBatchFileReader(pa.memory_map(str(file))).read_all()
        self.texts = self.table["caption"].to_pylist()
        self.pairs = [(row, position) for row, texts in enumerate(self.texts) for position in range(len(texts))]
        self.tokenizer, self.max_text_tokens = tokenizer, max_text_tokens
        self.transform = transforms.Compose(
            [
                functools.partial(resize, size_px=image_size_px),
                transforms.CenterCrop(image_size_px),
                functools.partial(Image.Image.convert, mode="RGB"),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, pair):
        row, position = self.pairs[pair]
        text = self.texts[row][position]
        return {
            "image": self.image(pair),
            "false_image": self.image(random.randint(0, len(self.pairs) - 1)),
            "text": (text, self.encode(text)),
            "image_id": self.table["image_id"][row].as_py(),
        }

    def image(self, pair):
        row, _ = self.pairs[pair]
        data = io.BytesIO(self.table["image"][row].as_py())
        return self.transform(Image.open(data).convert("RGBA"))

    def encode(self, text):
        return self.tokenizer(
            text,
            padding="max_length",
            truncation=True,
            max_length=self.max_text_tokens,
            return_special_tokens_mask=True,
            return_offsets_mapping=True,
        )


def resize(image, size_px):
    """Resize of the shorter side in the two steps of one call to the original's Pillow: rows, then columns.

    From Pillow 13 on one call takes the columns of tall images first, which rounds otherwise.
    """
    width, height = (size_px * side // min(image.size) for side in image.size)
    if image.size == (width, height):
        return image
    weighted = image.convert("RGBa").resize((width, image.height), BICUBIC).resize((width, height), BICUBIC)
    return weighted.convert("RGBA")


def collate(samples, tokenizer):
    """Float32 images, and ids with and without masks, as the original's training step takes them."""
    batch = {"texts": [sample["text"][0] for sample in samples], "ids": [sample["image_id"] for sample in samples]}
    for key in ("image", "false_image"):
        batch[key] = torch.zeros(len(samples), *samples[0][key].shape)
        for index, sample in enumerate(samples):
            batch[key][index] = sample[key]
    encodings = [sample["text"][1] for sample in samples]
    batch["text_ids"] = torch.stack([torch.tensor(encoding["input_ids"]) for encoding in encodings])
    batch["text_masks"] = torch.stack([torch.tensor(encoding["attention_mask"]) for encoding in encodings])
    batch["text_labels"] = torch.full_like(batch["text_ids"], -100)
    batch["text_ids_mlm"], batch["text_labels_mlm"] = mask_words(encodings, tokenizer)
    return batch


def mask_words(encodings, tokenizer):
    ids_BT = torch.stack([torch.tensor(encoding["input_ids"]) for encoding in encodings])
    rows = [tokenizer.convert_ids_to_tokens(encoding["input_ids"]) for encoding in encodings]
    is_selected_BT = np.stack([select_words_official(tokens, MASKED_TOKEN_FRAC, random) for tokens in rows])
    is_special_BT = torch.isin(ids_BT, torch.tensor(tokenizer.all_special_ids))
    is_selected_BT = torch.from_numpy(is_selected_BT) & ~is_special_BT
    labels_BT = ids_BT.masked_fill(~is_selected_BT, -100)
    is_replaced_BT = torch.bernoulli(torch.full(ids_BT.shape, 0.8)).bool() & is_selected_BT
    is_random_BT = torch.bernoulli(torch.full(ids_BT.shape, 0.5)).bool() & is_selected_BT & ~is_replaced_BT
    ids_BT[is_replaced_BT] = tokenizer.mask_token_id
    ids_BT[is_random_BT] = torch.randint(len(tokenizer), ids_BT.shape)[is_random_BT]
    return ids_BT, labels_BT


def original_loader(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    *,
    image_size_px: int,
    max_text_tokens: int,
    batch_size: int,
    num_batches: int,
    num_workers: int,
) -> DataLoader:
    """The original's loader of the given files; an epoch is the first batches of a permutation of their pairs."""
    dataset = ConcatDataset([OriginalDataset(file, tokenizer, image_size_px, max_text_tokens) for file in files])
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=RandomSampler(dataset, num_samples=num_batches * batch_size),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=functools.partial(collate, tokenizer=tokenizer),
    )
