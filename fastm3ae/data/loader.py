"""The order of the pairs, the worker processes, and what happens to bad samples."""

import os
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import PretrainConfig
from fastm3ae.data.arrow import dataset_files
from fastm3ae.data.batch import ImageTextBatch
from fastm3ae.data.collate import OF_EPOCH, Batches, BatchRequest, PretrainBatches, keyed_rng
from fastm3ae.data.datasets import PairDataset
from fastm3ae.data.images import make_transform
from fastm3ae.errors import BadSample, UserError

__all__ = ["Loader", "pretrain_loader"]


class Loader:
    """Batches of an epoch, made by worker processes, in an order that depends only on the seed and the epoch.

    For training every epoch is a new permutation without its incomplete last batch. For validation every epoch is the
    same: the files' order, all pairs, the same draws.

    Attributes:
        bad_samples: What was left out since the current epoch was entered.

    Args:
        batches: Makes the batches.
        batch_size: Pairs per batch.
        is_training: Whether the pairs are permuted and every epoch draws anew.
        seed: Seed of the order.
        num_workers: Worker processes; 0: none. Never changes the batches.
        on_bad_sample: stop: raise the first bad sample. skip: leave it out and note it in ``bad_samples``.
        pin_memory: Whether the batches' tensors are put into page-locked memory.

    Raises:
        UserError: There are fewer pairs than a training batch needs.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        batch_size: int,
        is_training: bool,
        seed: int = 0,
        num_workers: int = 0,
        on_bad_sample: Literal["stop", "skip"] = "stop",
        pin_memory: bool = False,
    ) -> None:
        self.dataset = batches.dataset
        if is_training and len(self.dataset) < batch_size:
            raise UserError(f"A batch needs {batch_size} pairs, but the training split has only {len(self.dataset)}.")
        self.on_bad_sample = on_bad_sample
        self.bad_samples: list[BadSample] = []
        self._epoch, self._num_given = 0, 0
        self._order = _Order(len(self.dataset), batch_size, is_training, seed)
        self._loader = DataLoader(
            batches,
            sampler=self._order,
            batch_size=None,  # the sampler's items are requests for whole batches
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else it draws from torch's default one, on which dropout depends
        )

    def __len__(self) -> int:
        """Returns the number of batches of an epoch."""
        return self._order.num_batches

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[ImageTextBatch]:
        """Yields the batches of an epoch from number ``first_batch`` on; the ones before cost nothing.

        A batch without a pair that can be used is passed over.

        Raises:
            BadSample: A sample is bad and ``on_bad_sample`` is "stop".
            UserError: No pair of the epoch can be used.
        """
        self._epoch, self._num_given, self.bad_samples = epoch, first_batch, []
        self._order.epoch, self._order.first_batch = epoch, first_batch
        is_any_good = first_batch > 0
        for batch in self._loader:
            self._num_given += 1
            if batch.bad_samples and self.on_bad_sample == "stop":
                raise batch.bad_samples[0]
            self.bad_samples += batch.bad_samples
            if len(batch):
                is_any_good = True
                yield batch
        if not is_any_good:
            raise UserError(f"Not one pair can be used; the first of {len(self.bad_samples)}: {self.bad_samples[0]}")

    def state(self) -> tuple[int, int]:
        """Returns the arguments with which ``epoch`` continues after the last batch that was given."""
        return self._epoch, self._num_given


class _Order:
    """The requests of the epoch that was set last, from the batch that was set last."""

    def __init__(self, num_pairs: int, batch_size: int, is_training: bool, seed: int) -> None:
        self.num_pairs, self.batch_size, self.is_training, self.seed = num_pairs, batch_size, is_training, seed
        self.num_batches = num_pairs // batch_size if is_training else -(-num_pairs // batch_size)
        self.epoch, self.first_batch = 0, 0

    def __iter__(self) -> Iterator[BatchRequest]:
        epoch = self.epoch if self.is_training else 0
        pairs = np.arange(self.num_pairs)
        if self.is_training:
            pairs = keyed_rng(self.seed, epoch, OF_EPOCH, 0).permutation(pairs)
        # With several processes that train together, each would take its part of every batch here.
        for batch in range(self.first_batch, self.num_batches):
            part = pairs[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield BatchRequest(epoch, batch, part.tolist())


def pretrain_loader(
    config: PretrainConfig, tokenizer: PreTrainedTokenizerFast, split: Literal["train", "val"]
) -> Loader:
    """Returns the loader of a split of the configured data sets.

    Raises:
        UserError: A file is missing or cannot be read, the split is empty, or smaller than a training batch.
    """
    data, train, vision = config.data, config.train, config.model.vision
    is_training = split == "train"
    batches = PretrainBatches(
        PairDataset(dataset_files(data.root, data.datasets, split), alpha=data.alpha),
        tokenizer,
        make_transform(data.train_transform if is_training else data.val_transform, vision.image_size_px),
        max_text_tokens=data.max_text_tokens,
        masking=config.masking,
        num_patches=(vision.image_size_px // vision.patch_size_px) ** 2 if "mim" in config.model.objectives else 0,
        draw_false_images="itm" in config.model.objectives,
        seed=config.seed,
    )
    return Loader(
        batches,
        batch_size=train.batch_size,
        is_training=is_training,
        seed=config.seed,
        num_workers=min(train.num_workers, os.cpu_count() or 1),
        on_bad_sample=data.on_bad_sample,
        pin_memory=torch.cuda.is_available() and train.device != "cpu",
    )
