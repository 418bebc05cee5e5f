"""Which pixels of an image belong to a finding."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastm3ae.config import FinetuneConfig
from fastm3ae.data.batch import MaskBatch
from fastm3ae.data.collate_images import MaskBatches
from fastm3ae.data.datasets import ImageDataset
from fastm3ae.data.images import make_mask_transform
from fastm3ae.errors import UserError
from fastm3ae.tasks.evaluation import Evaluation
from fastm3ae.tasks.image_task import ImageTask
from fastm3ae.tasks.metrics import Interval, dice_metrics, dice_scores
from fastm3ae.tasks.task import NUM_HARDEST, Item
from fastm3ae.visualize import draw_outline

__all__ = ["SegmentationTask"]

EXPECTED, PREDICTED = (0.0, 1.0, 0.2), (1.0, 0.2, 0.1)  # colours of the outlines: green and red


class SegmentationTask(ImageTask):
    """The pixels of an image whose probability is above a half, measured by Dice at the size that the model sees.

    Source: The uni-modal benchmark of MGCA (Wang et al. 2022), which MPMA takes up.
    """

    objective, score = "segmentation", "dice"

    def items(self, output: Tensor, batch: MaskBatch) -> list[Item]:
        """Returns an item for each image of a batch."""
        predicted, expected = ((masks > 0).cpu().numpy() for masks in (output, batch.mask_BHW))
        scores = dice_scores(predicted, expected).tolist()
        return [
            {
                "pair": pair,
                "image_id": image_id,
                "group": group,
                "dice": score,
                "predicted_frac": float(predicted[number].mean()),
                "expected_frac": float(expected[number].mean()),
                "masks": (_pack(predicted[number]), _pack(expected[number])),
            }
            for number, (pair, image_id, group, score) in enumerate(
                zip(batch.pairs, batch.item_ids, batch.groups, scores, strict=True)
            )
        ]

    def metrics(self, items: Sequence[Item], **resampling: Any) -> dict[str, Interval]:
        """Returns the mean Dice of all images, and of those with a finding."""
        dice, groups = ([item[name] for item in items] for name in ("dice", "group"))
        return dice_metrics(dice, [item["expected_frac"] == 0 for item in items], groups, **resampling)

    def evaluation(self, items: Sequence[Item], square: Callable[[int], Tensor], **resampling: Any) -> Evaluation:
        """Returns the metrics, a row for each image, and those of the lowest Dice with both outlines."""
        wrong = [item for item in items if item["dice"] < 1]
        wrong.sort(key=lambda item: (item["dice"], -max(item["expected_frac"], item["predicted_frac"])))
        size_px = self.config.model.image_size_px
        columns = ("image_id", "dice", "expected_frac", "predicted_frac")
        return Evaluation(
            metrics=self.metrics(items, **resampling),
            predictions=[{name: item[name] for name in columns} for item in items],
            hardest=[(_outlined(square(item["pair"]), item), _lines(item)) for item in wrong[:NUM_HARDEST]],
            notes=[f"Dice is that of squares of {size_px} pixels, to which images and masks were resized."],
        )

    def squares(self, config: FinetuneConfig, dataset: ImageDataset) -> Callable[[int], Tensor]:
        """Returns what gives the image of an item as the model sees it, (3, S, S) in [0, 1]."""
        transform = make_mask_transform(config.data.val_transform, config.model.image_size_px)
        return lambda pair: transform(dataset.image(pair), dataset.mask(pair))[0].float() / 255

    def _open(self, files: Sequence[Path]) -> ImageDataset:
        dataset = super()._open(files)
        if not dataset.has_masks:
            raise UserError(f"{files[0]} has no column 'mask', which segmentation needs.")
        return dataset

    def _batches(
        self, config: FinetuneConfig, dataset: ImageDataset, tokenizer: None, is_training: bool
    ) -> MaskBatches:
        name = config.data.train_transform if is_training else config.data.val_transform
        return MaskBatches(dataset, make_mask_transform(name, config.model.image_size_px), seed=config.seed)

    def _longest(self, fields: Mapping[str, Any]) -> MaskBatch:
        image_BCHW = fields["image_BCHW"]
        mask_BHW = torch.zeros(len(image_BCHW), *image_BCHW.shape[2:], dtype=torch.bool)
        return MaskBatch(**fields, mask_BHW=mask_BHW, groups=fields["item_ids"])


def _pack(mask_HW: np.ndarray) -> bytes:
    """Returns a mask in few bytes, because all items of a data set are kept at once."""
    return zlib.compress(np.packbits(mask_HW).tobytes(), level=1)


def _unpack(packed: bytes, size_px: int) -> Tensor:
    bits = np.unpackbits(np.frombuffer(zlib.decompress(packed), np.uint8), count=size_px**2)
    return torch.from_numpy(bits.reshape(size_px, size_px)) > 0


def _outlined(image_CHW: Tensor, item: Item) -> Tensor:
    predicted_HW, expected_HW = (_unpack(packed, image_CHW.shape[-1]) for packed in item["masks"])
    return draw_outline(draw_outline(image_CHW, expected_HW, EXPECTED), predicted_HW, PREDICTED)


def _lines(item: Item) -> list[str]:
    return [
        item["image_id"],
        f"Dice {item['dice']:.2f}",
        f"green: expected, {item['expected_frac']:.1%} of the image",
        f"red: predicted, {item['predicted_frac']:.1%}",
    ]
