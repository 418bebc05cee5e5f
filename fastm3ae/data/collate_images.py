"""From images without texts to batches, with their classes or with the pixels of a finding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastm3ae.data.batch import ImageBatch, LabelBatch, MaskBatch
from fastm3ae.data.collate import Batches, BatchRequest, stack
from fastm3ae.data.datasets import ImageDataset, Images
from fastm3ae.errors import BadSample

__all__ = ["ImageBatches", "LabelBatches", "MaskBatches"]


class ImageBatches(Batches):
    """Images of which nothing is expected."""

    def __getitem__(self, request: BatchRequest) -> ImageBatch:
        """Returns the requested batch; images that cannot be used are left out."""
        samples, bad_samples = self._collect(request, lambda pair, rng: (pair, self._image(pair, rng)))
        pairs = [pair for pair, _ in samples]
        return ImageBatch(**_fields(self.dataset, pairs, [image for _, image in samples], bad_samples))


class LabelBatches(Batches):
    """Images with their classes."""

    dataset: ImageDataset

    def __getitem__(self, request: BatchRequest) -> LabelBatch:
        """Returns the requested batch; images that cannot be used are left out."""
        samples, bad_samples = self._collect(request, lambda pair, rng: (pair, self._image(pair, rng)))
        pairs = [pair for pair, _ in samples]
        return LabelBatch(
            **_fields(self.dataset, pairs, [image for _, image in samples], bad_samples),
            groups=[self.dataset.groups[pair] for pair in pairs],
            label_BC=torch.from_numpy(self.dataset.labels[np.array(pairs, dtype=np.int64)]),
        )


class MaskBatches(Batches):
    """Images with the pixels of a finding; ``transform`` is one of ``fastm3ae.data.images.make_mask_transform``."""

    dataset: ImageDataset

    def __getitem__(self, request: BatchRequest) -> MaskBatch:
        """Returns the requested batch; images that cannot be used, or whose masks cannot, are left out."""
        samples, bad_samples = self._collect(request, self._sample)
        masks = [mask for _, _, mask in samples]
        pairs = [pair for pair, _, _ in samples]
        fields = _fields(self.dataset, pairs, [image for _, image, _ in samples], bad_samples)
        fields["groups"] = [self.dataset.groups[pair] for pair in pairs]
        return MaskBatch(**fields, mask_BHW=torch.stack(masks) if masks else torch.empty((0, 0, 0), dtype=torch.bool))

    def _sample(self, pair: int, rng: np.random.Generator) -> tuple[int, Tensor, Tensor]:
        return pair, *self._transformed(rng, self.dataset.image(pair), self.dataset.mask(pair))


def _fields(
    dataset: Images, pairs: list[int], images: Sequence[Tensor], bad_samples: list[BadSample]
) -> dict[str, Any]:
    """Returns the fields that all these batches have."""
    return {
        "image_BCHW": stack(images, (3, 0, 0)),
        "item_ids": [dataset.image_id(pair) for pair in pairs],
        "bad_samples": bad_samples,
        "pairs": pairs,
    }
