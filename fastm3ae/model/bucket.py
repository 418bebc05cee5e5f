"""Batches of different lengths brought to one shape, so that what was recorded for one runs on all: buckets.

The numbers of tokens, of rows that a head reads and of false images differ from batch to batch. A bucket has room for
somewhat more of each. What a batch leaves free is filled: with further texts that are nobody's and see no image, with
rows that the head passes over, with black images. Nothing is ever cut; a batch that does not fit needs a larger bucket.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F

from fastm3ae.data.batch import PretrainBatch
from fastm3ae.model.plan import Read, Reads
from fastm3ae.model.reads import OBJECTIVES

__all__ = ["Sizes", "fill_batch", "fill_reads"]

# How much more room there is than a batch needs, and to multiples of what it is rounded.
ROOM_FRAC = 1 / 16
MULTIPLE = 16


@dataclass(frozen=True)
class Sizes:
    """What differs from batch to batch: how much of it a batch has, or for how much a bucket has room.

    Args:
        tokens: For each objective the tokens of its texts.
        rows: For each objective whose head passes over further rows, how many it reads.
        false_images: The false images.
    """

    tokens: Mapping[str, int]
    rows: Mapping[str, int]
    false_images: int

    @classmethod
    def of(cls, reads: Mapping[str, Reads], batch: PretrainBatch) -> "Sizes":
        """Returns what a batch has, whose objectives read so much."""
        tokens = {name: int(read.texts.num_tokens_N.sum()) for name, read in reads.items()}
        rows = {name: sum(map(len, reads[name].text.positions)) for name in reads if OBJECTIVES[name].fill is not None}
        return cls(tokens, rows, len(batch.false_image_FCHW))

    def describe(self) -> str:
        """Returns the sizes in words."""
        tokens = f"{max(self.tokens.values(), default=0)} tokens"
        rows = [f"{number} of them read by {name}" for name, number in self.rows.items()]
        return ", ".join([tokens, *rows, f"{self.false_images} false images"])

    def fit(self, bucket: "Sizes", max_tokens: int) -> bool:
        """Returns whether a batch of these sizes fits into a bucket.

        Args:
            bucket: The bucket.
            max_tokens: T, tokens of the longest text.
        """
        return (
            self.false_images <= bucket.false_images
            and all(self.rows[name] <= bucket.rows[name] for name in self.rows)
            # The texts that fill have a token each, so that there is one to be read again.
            and all(
                n + num_filling(bucket.tokens[name], max_tokens) <= bucket.tokens[name]
                for name, n in self.tokens.items()
            )
        )

    def bucket(self, max_tokens: int, smaller: "Sizes | None" = None) -> "Sizes":
        """Returns a bucket for batches like one of these sizes, with at least the room of another.

        Args:
            max_tokens: T, tokens of the longest text.
            smaller: The other bucket.
        """
        smaller = smaller or Sizes(dict.fromkeys(self.tokens, 0), dict.fromkeys(self.rows, 0), 0)

        def room(size: int, least: int) -> int:
            return max(least, MULTIPLE * int(np.ceil(size * (1 + ROOM_FRAC) / MULTIPLE)))

        def room_for_tokens(size: int, least: int) -> int:
            found = room(size, least)
            while size + num_filling(found, max_tokens) > found:
                found += MULTIPLE
            return found

        return Sizes(
            {name: room_for_tokens(size, smaller.tokens[name]) for name, size in self.tokens.items()},
            {name: room(size, smaller.rows[name]) for name, size in self.rows.items()},
            room(self.false_images, smaller.false_images),
        )


def num_filling(room: int, max_tokens: int) -> int:
    """Returns how many texts, none longer than the longest, can fill any part of the room for tokens."""
    return -(-room // max_tokens)


def fill_batch(batch: PretrainBatch, bucket: Sizes) -> PretrainBatch:
    """Returns the batch, for packed passes, with what the bucket has room for of what does not stand in the plan."""
    for name, objective in OBJECTIVES.items():
        if objective.fill is not None:
            batch = objective.fill(batch, bucket.rows.get(name, 0))
    free = bucket.false_images - len(batch.false_image_FCHW)
    return dataclasses.replace(batch, false_image_FCHW=F.pad(batch.false_image_FCHW, (0, 0) * 3 + (0, free)))


def fill_reads(name: str, reads: Reads, bucket: Sizes, max_tokens: int) -> Reads:
    """Returns what an objective reads of a filled batch.

    Args:
        name: The objective.
        reads: What it reads of the batch.
        bucket: The bucket.
        max_tokens: T, tokens of the longest text.
    """
    texts, number = reads.texts, num_filling(bucket.tokens[name], max_tokens)
    free = bucket.tokens[name] - int(texts.num_tokens_N.sum())
    filled = dataclasses.replace(
        texts,
        num_tokens_N=np.concatenate([texts.num_tokens_N, _shares(free, number)]),
        index=np.concatenate([texts.index, len(texts.num_tokens_N) + np.arange(number)]),
    )
    images = dataclasses.replace(reads.images, index=np.concatenate([reads.images.index, np.full(number, -1)]))

    def fill(read: Read | None, num_rows: int | None) -> Read | None:
        if read is None or read.positions is None:
            return read
        num_more = 0 if num_rows is None else num_rows - sum(map(len, read.positions))
        again = [np.zeros(share, np.int64) for share in _shares(num_more, number)]  # the first token, so many times
        return dataclasses.replace(read, positions=[*read.positions, *again])

    return Reads(filled, images, fill(reads.text, bucket.rows.get(name)), fill(reads.image, None))


def _shares(total: int, number: int) -> np.ndarray:
    """Divides a total into so many parts that differ by one at most."""
    return total // number + (np.arange(number) < total % number).astype(np.int64)
