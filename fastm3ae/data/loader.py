"""The order of the pairs, their division among processes, the worker processes, and what happens to bad samples."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import PretrainConfig, RunConfig
from fastm3ae.data.arrow import dataset_files
from fastm3ae.data.balance import Work, divide
from fastm3ae.data.batch import ImageBatch
from fastm3ae.data.collate import OF_EPOCH, Batches, BatchRequest, keyed_rng
from fastm3ae.data.collate_pairs import PretrainBatches
from fastm3ae.data.datasets import PairDataset
from fastm3ae.data.images import make_transform
from fastm3ae.errors import BadSample, UserError

__all__ = ["Loader", "Place", "make_loader", "pretrain_loader", "transform_of"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which part of every batch this process works on, and in what pieces.

    Args:
        micro_batch: Pairs per piece, at most; None: whatever the part has.
        rank: Number of this process.
        num_ranks: How many processes share a batch.
    """

    micro_batch: int | None = None
    rank: int = 0
    num_ranks: int = 1

    def pieces(self, num_pairs: int, is_training: bool, work: Work | None = None) -> list[list[int]]:
        """Returns the pieces of a batch of ``num_pairs``: which of its pairs, in their order.

        In training every process gets its share, equal but for one pair. In validation the pieces are the same for any
        number of processes and dealt out in turn, because some controls look at a piece as a whole.

        Args:
            num_pairs: Pairs of the whole batch.
            is_training: Whether it is one of training.
            work: In what its pairs are unlike; the number of pieces and their sizes do not depend on it.
        """
        if is_training:
            share = divide(range(num_pairs), self.num_ranks, work)[self.rank]
            return divide(share, self._num_passes(len(share)), work)
        return divide(range(num_pairs), self._num_passes(num_pairs))[self.rank :: self.num_ranks]

    def _num_passes(self, num_pairs: int) -> int:
        return -(-num_pairs // (self.micro_batch or max(1, num_pairs)))


WHOLE = Place()
"""All of every batch, in one piece."""


class Loader:
    """Batches of an epoch, made by worker processes, in an order that depends only on the seed and the epoch.

    A batch comes as a list of pieces: those of this process, of a size that its device can hold at once.

    For training every epoch is a new permutation without its incomplete last batch. For validation every epoch is the
    same: the files' order, all pairs, the same draws.

    Attributes:
        num_pairs: Pairs of an epoch, those of an incomplete last batch included.
        bad_samples: What was left out since the current epoch was entered.
        on_piece: Is called after each piece; does nothing, unless it is set.

    Args:
        batches: Makes the batches.
        batch_size: Pairs per batch, over all processes.
        is_training: Whether the pairs are permuted and every epoch draws anew.
        place: Which part of each batch this process works on.
        seed: Seed of the order.
        num_workers: Worker processes; 0: none. Never changes the batches.
        on_bad_sample: stop: raise the first bad sample. skip: leave it out and note it in ``bad_samples``.
        pairs: Which of the data set's pairs are visited, rising; None: all.
        pin_memory: Whether the batches' tensors are put into page-locked memory.

    Raises:
        UserError: There are fewer pairs than a training batch needs, or fewer than processes in a batch.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        batch_size: int,
        is_training: bool,
        place: Place = WHOLE,
        seed: int = 0,
        num_workers: int = 0,
        on_bad_sample: Literal["stop", "skip"] = "stop",
        pairs: np.ndarray | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = batches.dataset
        pairs = np.arange(len(self.dataset)) if pairs is None else pairs
        self.num_pairs = len(pairs)
        if is_training and self.num_pairs < batch_size:
            raise UserError(
                f"A batch needs {batch_size} pairs, but there are only {self.num_pairs} to train on: lower "
                "train.batch_size."
            )
        if is_training and batch_size < place.num_ranks:
            raise UserError(f"{place.num_ranks} processes cannot share a batch of {batch_size} pairs.")
        self.on_bad_sample = on_bad_sample
        self.bad_samples: list[BadSample] = []
        self.on_piece: Callable[[], None] = lambda: None
        self._epoch, self._num_given = 0, 0
        self._workers: list[BaseProcess] = []
        self._order = _Order(batches, pairs, batch_size, is_training, place, seed)
        self._loader = DataLoader(
            batches,
            sampler=self._order,
            batch_size=None,  # the sampler's items are requests for whole batches
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # else it draws from torch's default one, on which dropout depends
        )

    def __len__(self) -> int:
        """Returns the number of batches of an epoch."""
        return self._order.num_batches

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[list[ImageBatch]]:
        """Yields this process's pieces of each batch of an epoch, from number ``first_batch`` on.

        The batches before cost nothing. A piece without a pair that can be used is left out.

        Raises:
            BadSample: A sample is bad and ``on_bad_sample`` is "stop".
            UserError: No pair of the epoch can be used, or a worker process died.
        """
        self._epoch, self._num_given, self.bad_samples = epoch, first_batch, []
        self._order.epoch, self._order.first_batch = epoch, first_batch
        is_any_good = first_batch > 0
        pieces = self._pieces()
        for batch in range(first_batch, len(self)):
            good = []
            for _ in range(self._order.num_pieces(batch)):
                piece = self._next(pieces)
                self.on_piece()
                if piece.bad_samples and self.on_bad_sample == "stop":
                    raise piece.bad_samples[0]
                self.bad_samples += piece.bad_samples
                good += [piece] if len(piece) else []
            self._num_given += 1
            is_any_good |= bool(good)
            yield good
        if not is_any_good and self.bad_samples:
            raise UserError(f"Not one pair can be used; the first of {len(self.bad_samples)}: {self.bad_samples[0]}")

    def _pieces(self) -> Iterator[ImageBatch]:
        """Returns the pieces; that a worker process died is found where they are waited for, within seconds."""
        # PyTorch would raise it wherever this process is just then: in the middle of a step, or of saving.
        is_told = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGCHLD) if is_told else None
        others = multiprocessing.active_children()
        with self._explained_death():
            pieces = iter(self._loader)
        self._workers += [process for process in multiprocessing.active_children() if process not in others]
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)
        return pieces

    def _next(self, pieces: Iterator[ImageBatch]) -> ImageBatch:
        with self._explained_death():
            return next(pieces)

    @contextmanager
    def _explained_death(self) -> Iterator[None]:
        """Says in a sentence that a worker process died, whichever error shows it."""
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            if not self._workers or not wait([worker.sentinel for worker in self._workers], timeout=1):
                raise
            raise UserError(
                f"A process that loads data died, perhaps for want of memory (fewer train.num_workers need less): "
                f"{error}"
            ) from error

    def close(self) -> None:
        """Ends the worker processes; there are no further epochs."""
        del self._loader

    def state(self) -> tuple[int, int]:
        """Returns the arguments with which ``epoch`` continues after the last batch that was given."""
        return self._epoch, self._num_given


class _Order:
    """The requests of the epoch that was set last, from the batch that was set last."""

    def __init__(
        self, batches: Batches, pairs: np.ndarray, batch_size: int, is_training: bool, place: Place, seed: int
    ) -> None:
        self.batches, self.pairs, self.batch_size, self.is_training = batches, pairs, batch_size, is_training
        self.place, self.seed = place, seed
        self.num_batches = len(pairs) // batch_size if is_training else -(-len(pairs) // batch_size)
        self.epoch, self.first_batch = 0, 0

    def num_pieces(self, batch: int) -> int:
        """Returns how many pieces of a batch this process works on."""
        num_pairs = min(self.batch_size, len(self.pairs) - batch * self.batch_size)
        return len(self.place.pieces(num_pairs, self.is_training))

    def __iter__(self) -> Iterator[BatchRequest]:
        epoch = self.epoch if self.is_training else 0
        pairs = self.pairs
        if self.is_training:
            pairs = keyed_rng(self.seed, epoch, OF_EPOCH, 0).permutation(pairs)
        for batch in range(self.first_batch, self.num_batches):
            whole = BatchRequest(epoch, batch, pairs[batch * self.batch_size : (batch + 1) * self.batch_size].tolist())
            work = self.batches.work(whole) if self.is_training else None
            for part in self.place.pieces(len(whole.pairs), self.is_training, work):
                yield replace(whole, part=part)


def _begin_worker(worker: int) -> None:
    """Leaves Ctrl-C, which reaches every process of the terminal, to the trainer, and ends when the trainer does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    """Ends this process when the one that started it is gone."""
    # A trainer that was killed would leave it waiting for ever for somebody who reads its batches.
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def make_loader(
    config: RunConfig,
    batches: Batches,
    is_training: bool,
    *,
    place: Place = WHOLE,
    num_workers: int = 0,
    pairs: np.ndarray | None = None,
) -> Loader:
    """Returns the loader of a run's batches.

    Args:
        config: The run.
        batches: Makes the batches.
        is_training: Whether each epoch is a permutation, in whole batches.
        place: Which part of each batch this process works on.
        num_workers: Worker processes of this process.
        pairs: Which of the data set's pairs are visited; None: all.
    """
    return Loader(
        batches,
        batch_size=config.train.batch_size,
        is_training=is_training,
        place=place,
        seed=config.seed,
        num_workers=num_workers,
        on_bad_sample=config.data.on_bad_sample,
        pairs=pairs,
        pin_memory=torch.cuda.is_available() and config.train.device != "cpu",
    )


def transform_of(config: RunConfig, is_training: bool) -> Callable[[Image.Image], torch.Tensor]:
    """Returns what makes the model's squares of images; those of training may be augmented."""
    name = config.data.train_transform if is_training else config.data.val_transform
    return make_transform(name, config.model.image_size_px)


def pretrain_loader(
    config: PretrainConfig,
    tokenizer: PreTrainedTokenizerFast,
    split: Literal["train", "val"],
    *,
    place: Place = WHOLE,
    num_workers: int = 0,
) -> Loader:
    """Returns the loader of a split of the configured data sets.

    Args:
        config: The run.
        tokenizer: Splits the texts.
        split: Which files are read.
        place: Which part of each batch this process works on.
        num_workers: Worker processes of this process.

    Raises:
        UserError: A file is missing or cannot be read, the split is empty, or smaller than a training batch.
    """
    data, model = config.data, config.model
    batches = PretrainBatches(
        PairDataset(dataset_files(data.root, data.datasets, split), alpha=data.alpha),
        tokenizer,
        transform_of(config, split == "train"),
        max_text_tokens=data.max_text_tokens,
        masking=config.masking,
        num_patches=model.num_noise_patches,
        false_images=data.itm_negatives if model.draws_false_images else None,
        seed=config.seed,
    )
    return make_loader(config, batches, split == "train", place=place, num_workers=num_workers)
