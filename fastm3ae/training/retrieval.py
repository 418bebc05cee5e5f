"""How often an image finds its own report among others, over the pairs of a whole validation."""

import hashlib

import torch
from torch import Tensor

from fastm3ae.data.batch import PretrainBatch
from fastm3ae.model.alignment import GlobalFeatures
from fastm3ae.training.distributed import Processes

__all__ = ["NUM_CANDIDATES", "Retrieval"]

NUM_CANDIDATES = 64


class Retrieval:
    """Collects features and counts for how many images the nearest of 64 reports is one of their own.

    Pairs are put into an order that depends on their ids and texts alone, neither on the files' order nor on the number
    of processes, and divided into groups of 64; pairs that are left over count only as a group of their own if there
    is no other. One image's several reports all count as its own, and so does a report in the same words.
    """

    def __init__(self) -> None:
        self._found: list[tuple[str, str, Tensor]] = []

    def add(self, features: GlobalFeatures, batch: PretrainBatch) -> None:
        """Collects a batch."""
        stacked = features.stacked().float().cpu()
        self._found += zip(batch.item_ids, batch.texts, stacked, strict=True)

    def recall(self, processes: Processes) -> tuple[float, int]:
        """Returns the share of images whose nearest report is their own, and among how many it was looked for."""
        found = [pair for share in processes.gather(self._found) for pair in share]
        if not found:
            return 0.0, 0
        found.sort(key=lambda pair: hashlib.sha256(f"{pair[0]}\n{pair[1]}".encode()).digest())
        ids, texts, features = zip(*found, strict=True)
        image_AE, report_AE = torch.stack(features).unbind(1)
        size = min(NUM_CANDIDATES, len(found))
        num_groups = len(found) // size
        num_correct = 0
        for start in range(0, num_groups * size, size):
            nearest = (image_AE[start : start + size] @ report_AE[start : start + size].T).argmax(dim=1)
            for own, other in enumerate((start + nearest).tolist(), start):
                num_correct += ids[own] == ids[other] or texts[own] == texts[other]
        return num_correct / (num_groups * size), size
