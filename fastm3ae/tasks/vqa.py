"""Questions about images: the answer with the largest logit among those of a vocabulary."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import FinetuneConfig, ModelConfig
from fastm3ae.data.batch import VqaBatch
from fastm3ae.data.collate_pairs import VqaBatches
from fastm3ae.data.datasets import VqaDataset
from fastm3ae.tasks.labels import ChoiceTask
from fastm3ae.tasks.metrics import Interval, majority_answers, vqa_metrics, vqa_scores
from fastm3ae.tasks.task import Item

__all__ = ["VqaTask"]


class VqaTask(ChoiceTask):
    """Visual question answering, as a choice among all answers of the data's vocabulary.

    Attributes:
        majority: The most frequent answer of the training split, overall and of the open and the closed questions: the
            control of every accuracy.

    Source: M3AE, section 3.2; official files m3ae/datasets/vqa_*_dataset.py and gadgets/my_metrics.py.
    """

    objective, score = "vqa", "overall_accuracy"

    def __init__(self, config: FinetuneConfig, about: Mapping[str, Any] | None = None) -> None:
        super().__init__(config, about)
        if about is None:
            train = self.dataset("train")
            self.majority = majority_answers(train.answer_ids, train.is_open)
        else:
            self.majority = about["majority"]

    def about(self) -> dict[str, Any]:
        """Returns the answers and the most frequent ones."""
        return {**super().about(), "majority": self.majority}

    def with_head(self, model: ModelConfig) -> ModelConfig:
        """Returns the model's configuration with the head of the answers alone."""
        return dataclasses.replace(model, objectives=("vqa",), num_answers=len(self.labels))

    def probabilities(self, logits_BA: Tensor) -> Tensor:
        """Returns for each answer how probable it is that it is right, whatever the others."""
        return logits_BA.sigmoid()

    def items(self, output: Tensor, batch: VqaBatch) -> list[Item]:
        """Returns an item for each question of a batch."""
        predicted_B, probability_B = (x_B1[:, 0].tolist() for x_B1 in self.choices(output))
        found = zip(
            batch.pairs, batch.item_ids, batch.question_ids, batch.texts, batch.is_open_B.tolist(), batch.answers,
            batch.answer_ids_BA.tolist(), batch.answer_scores_BA.tolist(), predicted_B, probability_B, strict=True,
        )  # fmt: skip
        names = ("pair", "image_id", "question_id", "text", "is_open", "answers", "answer_ids", "answer_scores",
                 "predicted", "probability")  # fmt: skip
        return [dict(zip(names, values, strict=True)) for values in found]

    def metrics(self, items: Sequence[Item], **resampling: Any) -> dict[str, Interval]:
        """Returns the accuracies of all, of the open and of the closed questions; groups are images."""
        return vqa_metrics(
            *([item[name] for item in items] for name in ("predicted", "answer_ids", "answer_scores", "is_open")),
            groups=[item["image_id"] for item in items],
            majority=self.majority,
            **resampling,
        )

    def row(self, item: Item) -> dict[str, Any]:
        """Returns a question's row of the predictions."""
        (score,) = vqa_scores([item["predicted"]], [item["answer_ids"]], [item["answer_scores"]])
        return {
            "question_id": item["question_id"],
            "image_id": item["image_id"],
            "text": item["text"],
            "type": "open" if item["is_open"] else "closed",
            "expected": "; ".join(item["answers"]),
            "predicted": self.labels[item["predicted"]],
            "probability": item["probability"],
            "score": float(score),
        }

    def notes(self, items: Sequence[Item]) -> list[str]:
        """Returns how many questions cannot be answered rightly."""
        num_unknown = sum(max(item["answer_ids"], default=-1) < 0 for item in items)
        unknown = f"{num_unknown} questions have no answer among the labels; they count as answered wrongly."
        return [unknown] if num_unknown else []

    def _open(self, files: Sequence[Path]) -> VqaDataset:
        return VqaDataset(files, self.config.data.alpha)

    def _batches(
        self, config: FinetuneConfig, dataset: VqaDataset, tokenizer: PreTrainedTokenizerFast, is_training: bool
    ) -> VqaBatches:
        return VqaBatches(dataset, tokenizer, **self._batch_options(config, is_training))

    def _longest(self, fields: Mapping[str, Any]) -> VqaBatch:
        num_pairs = len(fields["texts"])
        return VqaBatch(
            **fields,
            answer_ids_BA=torch.zeros(num_pairs, 1, dtype=torch.int64),
            answer_scores_BA=torch.ones(num_pairs, 1),
            is_open_B=torch.zeros(num_pairs, dtype=torch.bool),
            question_ids=[0] * num_pairs,
            answers=[[]] * num_pairs,
        )
