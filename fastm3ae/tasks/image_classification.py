"""Classes of images without texts, any number of them for each image."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastm3ae.config import FinetuneConfig
from fastm3ae.data.batch import LabelBatch
from fastm3ae.data.collate_images import LabelBatches
from fastm3ae.data.datasets import ImageDataset
from fastm3ae.data.loader import transform_of
from fastm3ae.tasks.evaluation import Evaluation
from fastm3ae.tasks.image_task import ImageTask
from fastm3ae.tasks.metrics import Interval, multilabel_metrics
from fastm3ae.tasks.task import NUM_HARDEST, Item

__all__ = ["ImageClassificationTask"]

MAX_NAMED = 3  # classes in which a hard case went wrong


class ImageClassificationTask(ImageTask):
    """A probability for each class, independent of the others, measured by the area under the ROC curve.

    Source: The uni-modal benchmark of MGCA (Wang et al. 2022) and MRM (Zhou et al. 2023), which MPMA takes up.
    """

    objective, score = "image_classification", "mean_auroc"

    def items(self, output: Tensor, batch: LabelBatch) -> list[Item]:
        """Returns an item for each image of a batch."""
        logits_BC, label_BC = output.float().cpu(), batch.label_BC.float().cpu()
        loss_B = F.binary_cross_entropy_with_logits(logits_BC, label_BC, reduction="none").mean(dim=1)
        values = (logits_BC.sigmoid(), batch.label_BC, loss_B)
        names = ("pair", "image_id", "group", "probability", "expected", "loss")
        found = zip(batch.pairs, batch.item_ids, batch.groups, *(value.tolist() for value in values), strict=True)
        return [dict(zip(names, item, strict=True)) for item in found]

    def metrics(self, items: Sequence[Item], **resampling: Any) -> dict[str, Interval]:
        """Returns mean_auroc and the AUROC of each class."""
        scores, labels = (np.array([item[name] for item in items]) for name in ("probability", "expected"))
        return multilabel_metrics(scores, labels, self.labels, [item["group"] for item in items], **resampling)

    def evaluation(self, items: Sequence[Item], square: Callable[[int], Tensor], **resampling: Any) -> Evaluation:
        """Returns the metrics, the probabilities, and of the images with a wrong class those of the largest loss."""
        metrics = self.metrics(items, **resampling)
        wrong = [
            item
            for item in items
            if any((p > 0.5) != label for p, label in zip(item["probability"], item["expected"], strict=True))
        ]
        wrong.sort(key=lambda item: -item["loss"])
        undefined = [name for name in self.labels if metrics[f"auroc_{name}"].value is None]
        return Evaluation(
            metrics=metrics,
            predictions=[self._row(item) for item in items],
            hardest=[(square(item["pair"]), self._lines(item)) for item in wrong[:NUM_HARDEST]],
            notes=[f"All images or none have {', '.join(undefined)}: no AUROC, and no part in the mean."]
            if undefined
            else [],
        )

    def _expected(self, item: Item) -> list[str]:
        return [name for name, label in zip(self.labels, item["expected"], strict=True) if label]

    def _row(self, item: Item) -> dict[str, Any]:
        """Returns an image's row of the predictions."""
        probabilities = zip(self.labels, item["probability"], strict=True)
        return {
            "image_id": item["image_id"],
            "expected": "; ".join(self._expected(item)),
            "loss": item["loss"],
            **{f"probability_{name}": value for name, value in probabilities},
        }

    def _lines(self, item: Item) -> list[str]:
        """Returns an image in words: its classes, and those whose probabilities are the furthest from the truth."""
        classes = zip(self.labels, item["probability"], item["expected"], strict=True)
        worst = sorted(classes, key=lambda found: -abs(found[1] - found[2]))[:MAX_NAMED]
        lines = [f"{name}: {value:.2f}, expected {label}" for name, value, label in worst]
        return [item["image_id"], f"expected: {'; '.join(self._expected(item)) or 'none'}", *lines]

    def _batches(
        self, config: FinetuneConfig, dataset: ImageDataset, tokenizer: None, is_training: bool
    ) -> LabelBatches:
        return LabelBatches(dataset, transform_of(config, is_training), seed=config.seed)

    def _longest(self, fields: Mapping[str, Any]) -> LabelBatch:
        num_images = len(fields["item_ids"])
        label_BC = torch.zeros(num_images, len(self.labels), dtype=torch.int8)
        return LabelBatch(**fields, label_BC=label_BC, groups=fields["item_ids"])
