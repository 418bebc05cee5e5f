"""Classes of images with their texts."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import FinetuneConfig, ModelConfig
from fastm3ae.data.batch import ClassificationBatch
from fastm3ae.data.collate_pairs import ClassificationBatches
from fastm3ae.data.datasets import ClassificationDataset
from fastm3ae.tasks.labels import ChoiceTask
from fastm3ae.tasks.metrics import Interval, classification_metrics
from fastm3ae.tasks.task import Item

__all__ = ["ClassificationTask"]


class ClassificationTask(ChoiceTask):
    """The class of an image and its text, of those in one column of the data.

    Source: M3AE, section 3.2; official file m3ae/datasets/cls_melinda_dataset.py.
    """

    objective, score = "classification", "accuracy"

    def with_head(self, model: ModelConfig) -> ModelConfig:
        """Returns the model's configuration with the head of the classes alone."""
        return dataclasses.replace(model, objectives=("classification",), num_classes=len(self.labels))

    def probabilities(self, logits_BA: Tensor) -> Tensor:
        """Returns the probability of each class; they add up to 1."""
        return logits_BA.softmax(dim=-1)

    def items(self, output: Tensor, batch: ClassificationBatch) -> list[Item]:
        """Returns an item for each pair of a batch."""
        predicted_B, probability_B = (x_B1[:, 0].tolist() for x_B1 in self.choices(output))
        found = zip(
            batch.pairs, batch.item_ids, batch.texts, batch.label_B.tolist(), predicted_B, probability_B, strict=True
        )
        names = ("pair", "image_id", "text", "expected", "predicted", "probability")
        return [dict(zip(names, values, strict=True)) for values in found]

    def metrics(self, items: Sequence[Item], **resampling: Any) -> dict[str, Interval]:
        """Returns accuracy and macro F1; groups are images."""
        predicted, expected, groups = ([item[name] for item in items] for name in ("predicted", "expected", "image_id"))
        return classification_metrics(predicted, expected, groups, **resampling)

    def row(self, item: Item) -> dict[str, Any]:
        """Returns a pair's row of the predictions."""
        return {
            "image_id": item["image_id"],
            "text": item["text"],
            "expected": self.labels[item["expected"]],
            "predicted": self.labels[item["predicted"]],
            "probability": item["probability"],
            "score": float(item["predicted"] == item["expected"]),
        }

    def _open(self, files: Sequence[Path]) -> ClassificationDataset:
        return ClassificationDataset(files, self.config.task.label_column, self.config.data.alpha)

    def _batches(
        self,
        config: FinetuneConfig,
        dataset: ClassificationDataset,
        tokenizer: PreTrainedTokenizerFast,
        is_training: bool,
    ) -> ClassificationBatches:
        return ClassificationBatches(dataset, tokenizer, **self._batch_options(config, is_training))

    def _longest(self, fields: Mapping[str, Any]) -> ClassificationBatch:
        return ClassificationBatch(**fields, label_B=torch.zeros(len(fields["texts"]), dtype=torch.int64))
