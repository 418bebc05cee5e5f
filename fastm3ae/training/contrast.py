"""Pairs are contrasted with all pairs of the batch, also with those of other passes and other processes.

A pass needs the others' features before its loss. If every process makes one pass, they exchange them between their
forward and backward passes. If some process makes several, all features are made first, without gradients, by the
towers and the head alone, and each pass then makes its own again: with the same dropout, so that they are the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastm3ae.data.batch import PretrainBatch
from fastm3ae.errors import UserError
from fastm3ae.model.alignment import Gather, alone
from fastm3ae.model.mpma import MPMA
from fastm3ae.training.distributed import Processes

__all__ = ["Pass", "passes"]


@dataclass(frozen=True)
class Pass:
    """A pass over one piece of a batch.

    Args:
        gather: Gives the features of the whole batch.
        dropout: Gives the context in which the pass draws its dropout.
    """

    gather: Gather = alone
    dropout: Callable[[], AbstractContextManager] = nullcontext


def passes(
    model: MPMA,
    pieces: Sequence[PretrainBatch],
    num_own: int,
    processes: Processes,
    autocast: Callable[[], AbstractContextManager],
    options: Mapping[str, Any],
) -> list[Pass]:
    """Returns what each piece's pass needs, in order. All processes must call this, and then make their passes.

    Args:
        model: The model.
        pieces: This process's pieces.
        num_own: How many of them are the batch's; the others are spare ones, which no pair is contrasted with.
        processes: Those that share the batch.
        autocast: Gives the context in which the model computes.
        options: How the model computes, as its ``forward`` takes it.

    Raises:
        UserError: A process makes several passes of a compiled model, whose dropout can not be drawn again.
    """
    (num_several,) = processes.sum([len(pieces) > 1])
    if not num_several:
        return [Pass(lambda x_B2E: processes.gather_rows(x_B2E if num_own else x_B2E[:0]))]
    if options["compiled"]:
        raise UserError(
            "train.compiled draws its own dropout, but global_alignment in several passes needs the same twice: let "
            "train.micro_batch hold the whole batch of a process, or leave out train.compiled."
        )
    seeds = torch.randint(2**62, (len(pieces),)).tolist()
    dropouts = [partial(_dropout_from, seed, processes.device) for seed in seeds]
    features = []
    for piece, dropout in zip(pieces, dropouts, strict=True):
        with torch.no_grad(), autocast(), dropout():
            features.append(model(piece, only=("global_alignment",))["global_alignment"].stacked())
    num_pairs = sum(map(len, pieces[:num_own]))
    all_A2E, first = processes.gather_rows(torch.cat(features)[:num_pairs])
    found = []
    for piece, dropout in zip(pieces, dropouts, strict=True):
        found.append(Pass(partial(_found, all_A2E, first), dropout))
        first += len(piece)
    return found


def _found(all_A2E: Tensor, first: int, own_B2E: Tensor) -> tuple[Tensor, int]:
    return all_A2E, first


@contextmanager
def _dropout_from(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
