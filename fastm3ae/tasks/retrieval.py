"""Finding texts by images and images by texts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import EvaluateConfig, FinetuneConfig, ModelConfig
from fastm3ae.data.batch import RetrievalBatch
from fastm3ae.data.collate_pairs import RetrievalBatches
from fastm3ae.data.datasets import PairDataset
from fastm3ae.data.loader import transform_of
from fastm3ae.errors import UserError
from fastm3ae.model.build import Model
from fastm3ae.tasks.checkpoint import load_finetuned, read_pretrained
from fastm3ae.tasks.evaluation import Evaluation
from fastm3ae.tasks.metrics import Interval, bootstrap, recall_metrics
from fastm3ae.tasks.pool import ReadyModel
from fastm3ae.tasks.search import Preselection, Retrieval, retrieve
from fastm3ae.tasks.task import NUM_HARDEST, Item, Loaded, Progress, Task, left_out
from fastm3ae.weights.towers import read_tokenizer

__all__ = ["RetrievalTask", "ready_model"]


class RetrievalTask(Task):
    """Image-text retrieval: an image's own text is told from drawn ones in training, from all others in testing.

    Source: M3AE, section 3.2; ``compute_irtr`` and ``compute_irtr_recall`` in the original's modules/objectives.py.
    Deviation: Recall at validation is that of the first ``task.num_recall_images`` images; the original takes 2,000.
        Its best checkpoint has the largest sum of the recalls at 1, ours the largest mean.
    """

    objective, score, item_name = "retrieval", "recall_at_1", "pair"

    def with_head(self, model: ModelConfig) -> ModelConfig:
        """Returns the model's configuration with the retrieval head alone; of MPMA with its global alignment."""
        if model.kind == "mpma":
            if "global_alignment" not in model.objectives:
                raise UserError("This MPMA was pre-trained without global_alignment, by which it retrieves.")
            return dataclasses.replace(model, objectives=("global_alignment",))
        return dataclasses.replace(model, objectives=("retrieval",))

    def items(self, output: Tensor, batch: RetrievalBatch) -> list[Item]:
        """Returns an item for each image of a batch: whether its own text has the best score, alone or with others."""
        is_hit_B = (output[:, 0] == output.amax(dim=-1)).tolist()
        found = zip(batch.pairs, batch.item_ids, is_hit_B, strict=True)
        return [{"pair": pair, "image_id": image_id, "is_hit": is_hit} for pair, image_id, is_hit in found]

    def metrics(self, items: Sequence[Item], **resampling: Any) -> dict[str, Interval]:
        """Returns how often the own text is chosen among the drawn ones."""
        is_hit = np.array([item["is_hit"] for item in items], dtype=np.float64)
        groups = [item["image_id"] for item in items]
        return {"accuracy": bootstrap(lambda index: float(is_hit[index].mean()), groups, **resampling)}

    def validation(
        self, config: FinetuneConfig, model: Model, autocast: Callable[[], AbstractContextManager]
    ) -> dict[str, float]:
        """Returns the recalls among the first images of the validation split, and the mean of those at 1."""
        found = retrieve(
            ready_model(Loaded(config, self._tokenizer, model)),
            self.dataset("val"),
            autocast=autocast,
            max_images=config.task.num_recall_images,
            on_bad_sample=config.data.on_bad_sample,
        )
        recall = found.recall()
        at_1 = [recall["image_to_text_recall_at_1"], recall["text_to_image_recall_at_1"]]
        return {**recall, "recall_candidates": len(found.image_ids), "recall_at_1": sum(at_1) / 2}

    def evaluate(self, loaded: Loaded, asked: EvaluateConfig, progress: Progress) -> tuple[Evaluation, PairDataset]:
        """Returns the recalls of a split, both ways, among all of its images and texts."""
        dataset = self.dataset(asked.split)
        preselection = None
        if asked.preselect_with is not None:
            mpma = _load_mpma(Path(asked.preselect_with), loaded.device)
            preselection = Preselection(ready=ready_model(mpma), num_preselected=asked.num_preselected)
        found = retrieve(
            ready_model(loaded),
            dataset,
            autocast=loaded.autocast,
            max_images=asked.max_images,
            on_bad_sample=asked.on_bad_sample,
            preselection=preselection,
            progress=progress,
        )
        return self._evaluation(found, dataset, self.squares(loaded.config, dataset), asked.num_resamples), dataset

    def _evaluation(
        self, found: Retrieval, dataset: PairDataset, square: Callable[[int], Tensor], num_resamples: int
    ) -> Evaluation:
        groups = [found.image_ids[image] for image in found.image_of_text_T]
        metrics = recall_metrics(
            found.image_hits, found.text_hits, found.image_ids, groups, num_resamples=num_resamples
        )
        rows = [*_image_rows(found), *_text_rows(found)]
        pair_of_id = {dataset.image_id(pair): pair for pair in range(len(dataset) - 1, -1, -1)}
        of_images = sorted(rows[: len(found.image_ids)], key=lambda row: -row["rank"])
        hardest = [
            (
                square(pair_of_id[row["image_id"]]),
                [f"{key}: {row[key]}" for key in ("expected", "predicted", "rank")],
            )
            for row in of_images[:NUM_HARDEST]
            if row["rank"] > 1
        ]
        notes = [f"{len(found.image_ids)} images and {len(found.texts)} texts were searched."]
        if not found.is_exact:
            notes.append("Not exact: only pairs that another model preselected were scored by the fusion.")
        if found.ids_without_text:
            number, first = len(found.ids_without_text), found.ids_without_text[0]
            notes.append(f"{number} images without a text have no part in this; the first: {first}.")
        return Evaluation(
            metrics=metrics, predictions=rows, hardest=hardest, notes=[*notes, *left_out(found.bad_samples)]
        )

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerFast:
        return read_tokenizer(self.config)

    def _open(self, files: Sequence[Path]) -> PairDataset:
        return PairDataset(files, alpha=self.config.data.alpha)

    def _batches(
        self, config: FinetuneConfig, dataset: PairDataset, tokenizer: PreTrainedTokenizerFast, is_training: bool
    ) -> RetrievalBatches:
        return RetrievalBatches(
            dataset,
            tokenizer,
            transform_of(config, is_training),
            max_text_tokens=config.data.max_text_tokens,
            num_false_texts=config.task.num_false_texts,
            seed=config.seed,
        )

    def _longest(self, fields: Mapping[str, Any]) -> RetrievalBatch:
        ids_BT, is_padding_BT, number = fields["text_ids_BT"], fields["is_padding_BT"], self.config.task.num_false_texts
        return RetrievalBatch(
            **fields,
            false_text_ids_BRT=ids_BT[:, None].expand(-1, number, -1),
            is_false_text_padding_BRT=is_padding_BT[:, None].expand(-1, number, -1),
            false_texts=[[""] * number] * len(ids_BT),
        )


def ready_model(loaded: Loaded) -> ReadyModel:
    """Returns a model as the search wants it."""
    data = loaded.config.data
    return ReadyModel(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        transform=data.val_transform,
        max_text_tokens=data.max_text_tokens,
    )


def _load_mpma(path: Path, device: torch.device) -> Loaded:
    """Returns the model that preselects."""
    config, _ = read_pretrained(path)
    if config.model.kind != "mpma":
        raise UserError(
            f"preselect_with must be an MPMA's checkpoint, but {path} is one of {config.model.kind.upper()}."
        )
    return load_finetuned(path, config, RetrievalTask(config), device)


def _ranks(scores: np.ndarray, own: Sequence[np.ndarray]) -> list[int]:
    """Returns the place of the best own candidate of each row, 1 being the first; behind its equals."""
    ranks = []
    for row, candidates in zip(scores, own, strict=True):
        best = row[candidates].max()
        ranks.append(1 + int((row >= best).sum()) - int((row[candidates] == best).sum()))
    return ranks


def _image_rows(found: Retrieval) -> list[dict[str, Any]]:
    """Returns for each image its best own text, the text with the best score, and its own one's rank."""
    own = [np.flatnonzero(found.image_of_text_T == image) for image in range(len(found.image_ids))]
    rows = []
    for image, rank in enumerate(_ranks(found.scores_IT, own)):
        scores_T = found.scores_IT[image]
        best_own = own[image][scores_T[own[image]].argmax()]
        rows.append(
            {
                "query": "image",
                "image_id": found.image_ids[image],
                "text": None,
                "expected": found.texts[best_own],
                "predicted": found.texts[scores_T.argmax()],
                "rank": rank,
            }
        )
    return rows


def _text_rows(found: Retrieval) -> list[dict[str, Any]]:
    """Returns for each text its image, the image with the best score, and its own one's rank."""
    scores_TI = found.scores_IT.T
    own = list(found.image_of_text_T[:, None])
    return [
        {
            "query": "text",
            "image_id": found.image_ids[image],
            "text": text,
            "expected": found.image_ids[image],
            "predicted": found.image_ids[scores_I.argmax()],
            "rank": rank,
        }
        for text, image, scores_I, rank in zip(
            found.texts, found.image_of_text_T, scores_TI, _ranks(scores_TI, own), strict=True
        )
    ]
