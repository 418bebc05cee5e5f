"""Classes of images that a model was never trained to tell, by texts that name them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastm3ae.config import EvaluateConfig, FinetuneConfig
from fastm3ae.config.files import read_yaml
from fastm3ae.data.datasets import ImageDataset
from fastm3ae.errors import UserError, nearest, shown
from fastm3ae.tasks.evaluation import Evaluation
from fastm3ae.tasks.metrics import Interval, classification_metrics, multilabel_metrics
from fastm3ae.tasks.pool import Pool
from fastm3ae.tasks.retrieval import RetrievalTask, ready_model
from fastm3ae.tasks.search import score_pool
from fastm3ae.tasks.task import NUM_HARDEST, Loaded, Progress, left_out

__all__ = ["ZeroShotTask", "read_prompts"]

Prompts = dict[str, tuple[list[str], list[str]]]
"""For each class the texts that say that it is there, and those that say that it is not."""


class ZeroShotTask(RetrievalTask):
    """A class's score is the mean score of its prompts with the image, less that of its negative ones.

    Scores are those of retrieval: M3AE's matching, or the products of MPMA's global alignment. Measured by AUROC; where
    each image has exactly one class also by accuracy and macro F1 of the class with the best score.

    Args:
        config: The model, and the data it is tested on.
        prompts: The file of the prompts.

    Source: Prompts as of CLIP (Radford et al. 2021), section 3.1; positive and negative ones as of CheXzero (Tiu et al.
    2022).
    """

    name = "zero-shot"

    def __init__(self, config: FinetuneConfig, prompts: str) -> None:
        super().__init__(config)
        self.prompts = read_prompts(Path(prompts))

    def evaluate(self, loaded: Loaded, asked: EvaluateConfig, progress: Progress) -> tuple[Evaluation, ImageDataset]:
        """Returns the AUROCs of a split's images."""
        dataset = self.dataset(asked.split)
        names = self.labels = tuple(dataset.class_names)
        for name in names:
            if name not in self.prompts:
                raise UserError(
                    f"{asked.prompts} has no prompts for the class {name!r}, but for {', '.join(self.prompts)}."
                    f"{nearest(name, self.prompts)}"
                )
        groups = [self.prompts[name] for name in names]
        texts = [text for positive, negative in groups for text in (*positive, *negative)]
        pool = Pool(dataset, np.arange(len(dataset.labels))[: asked.max_images], texts, asked.on_bad_sample)
        scores_IT = score_pool(ready_model(loaded), pool, autocast=loaded.autocast, progress=progress)
        good = np.flatnonzero(pool.is_good_I)
        scores_IC, labels_IC = _class_scores(scores_IT[good], groups), dataset.labels[good]
        image_groups = [dataset.groups[number] for number in good]
        metrics = _metrics(scores_IC, labels_IC, names, image_groups, num_resamples=asked.num_resamples)
        rows = [
            {
                "image_id": dataset.image_id(number),
                "expected": "; ".join(name for name, label in zip(names, labels, strict=True) if label),
                "predicted": names[scores.argmax()],
                **{f"score_{name}": float(score) for name, score in zip(names, scores, strict=True)},
            }
            for number, scores, labels in zip(good, scores_IC, labels_IC, strict=True)
        ]
        square = self.squares(loaded.config, dataset)
        lack_I = _lack(scores_IC, labels_IC)
        wrong = [int(number) for number in np.argsort(-lack_I, kind="stable") if lack_I[number] > 0]
        hardest = [
            (square(good[number]), [f"{key}: {rows[number][key]}" for key in ("image_id", "expected", "predicted")])
            for number in wrong[:NUM_HARDEST]
        ]
        notes = [f"Without training, by {len(texts)} prompts of {asked.prompts}.", *left_out(pool.bad_samples)]
        return Evaluation(metrics=metrics, predictions=rows, hardest=hardest, notes=notes), dataset

    def unit(self, dataset: ImageDataset) -> str:
        """Returns what images are grouped by."""
        return dataset.unit

    def _open(self, files: Sequence[Path]) -> ImageDataset:
        return ImageDataset(files, self.config.data.alpha)


def read_prompts(path: Path) -> Prompts:
    """Reads texts for classes.

    Raises:
        UserError: The file cannot be read, or is of another form.
    """
    form = 'expected for each class a list of texts, or lists "positive" and "negative"'
    content = read_yaml(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"The file of prompts {path} holds no classes; {form}.")
    prompts: Prompts = {}
    for name, texts in content.items():
        both = texts if isinstance(texts, dict) else {"positive": texts}
        lists = [both.get("positive", []), both.get("negative", [])]
        is_good = all(isinstance(of, list) and all(isinstance(t, str) and t.strip() for t in of) for of in lists)
        if not is_good or not lists[0] or both.keys() - {"positive", "negative"}:
            raise UserError(f"The file of prompts {path} has {shown(texts)} for the class {shown(name)}; {form}.")
        prompts[str(name)] = (lists[0], lists[1])
    return prompts


def _class_scores(scores_IT: np.ndarray, groups: Sequence[tuple[list[str], list[str]]]) -> np.ndarray:
    """Returns (I, C) of the scores with all texts, which stand class by class, the positive ones first."""
    columns, first = [], 0
    for positive, negative in groups:
        middle, last = first + len(positive), first + len(positive) + len(negative)
        score_I = scores_IT[:, first:middle].mean(axis=1)
        columns.append(score_I - scores_IT[:, middle:last].mean(axis=1) if negative else score_I)
        first = last
    return np.stack(columns, axis=1)


def _lack(scores_IC: np.ndarray, labels_IC: np.ndarray) -> np.ndarray:
    """Returns by how much the best class of each image stands below the best that it has not; 0 if it has none."""
    has_IC = labels_IC > 0
    best_own_I = np.where(has_IC, scores_IC, -np.inf).max(axis=1)
    return np.where(has_IC.any(axis=1), scores_IC.max(axis=1) - best_own_I, 0)


def _metrics(
    scores_IC: np.ndarray, labels_IC: np.ndarray, names: Sequence[str], groups: Sequence[str], **resampling: Any
) -> Mapping[str, Interval]:
    metrics = multilabel_metrics(scores_IC, labels_IC, names, groups, **resampling)
    if (labels_IC.sum(axis=1) == 1).all() and len(names) > 1:
        metrics |= classification_metrics(scores_IC.argmax(axis=1), labels_IC.argmax(axis=1), groups, **resampling)
    return metrics
