"""How well a task is done: numbers with bootstrap confidence intervals, from arrays with an entry for each item.

Items that share an image (its questions, its texts) or a patient are not independent. Every function therefore takes
``groups``, one name for each item, and draws whole groups again: an interval from single items would be too narrow.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "Interval",
    "bootstrap",
    "classification_metrics",
    "dice_metrics",
    "dice_scores",
    "majority_answers",
    "multilabel_metrics",
    "recall_metrics",
    "vqa_metrics",
    "vqa_scores",
]

QUESTION_KINDS = ("overall", "open", "closed")


class Interval(NamedTuple):
    """A number, and between what bounds it may lie.

    Args:
        value: The number; None where it is not defined for the items.
        low: Lower bound; None where there is none, above all because a single group says nothing about others.
        high: Upper bound.
        num_items: Over how many items it is taken.
        num_groups: Of how many groups these are.
        num_resamples: How many resamples were drawn for the bounds.
        num_left_out: In how many of these it is not defined; they have no part in the bounds.
        confidence: How often such bounds hold the truth, if they keep what they promise.
    """

    value: float | None
    low: float | None
    high: float | None
    num_items: int
    num_groups: int = 0
    num_resamples: int = 0
    num_left_out: int = 0
    confidence: float | None = None


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    groups: Sequence[Any] | np.ndarray,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Returns statistic(all items), between the quantiles (1 -+ confidence) / 2 of statistic(resample).

    A resample holds as many groups as there are, drawn with replacement, each with all of its items; so it varies in
    size. A resample in which the statistic is not defined (for AUROC: one of the two classes is missing) is left out
    and counted. Bounds from few groups, below about 20, are known to be too narrow. Neither the order of the items nor
    the names' order matters but for rounding; the same seed draws the same resamples.

    Args:
        statistic: Takes indices of items, (num_drawn,) int64, with repetitions; NaN: not defined for these.
        groups: To which group each item belongs, (num_items,).
        num_resamples: How many resamples are drawn.
        confidence: Which share of the resamples lies between the bounds.
        seed: Seed of the draw.

    Raises:
        ValueError: There is no item, or an argument is out of range.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13, for the percentile interval;
    Field and Welsh, Bootstrapping clustered data, J. R. Statist. Soc. B 69 (2007), for the draw of whole clusters.
    """
    values = [statistic(np.arange(len(groups)))]
    return _intervals(values, lambda index: [statistic(index)], groups, num_resamples, confidence, seed)[0]


def vqa_metrics(
    predicted: Sequence[int],
    answer_ids: Sequence[Sequence[int]],
    answer_scores: Sequence[Sequence[float]],
    is_open: Sequence[bool],
    groups: Sequence[Any],
    majority: Mapping[str, int],
    **resampling: Any,
) -> dict[str, Interval]:
    """Returns {overall, open, closed}_accuracy, the mean score of the predicted answers, and what it is worth.

    _majority_accuracy is that of always giving one answer, and _gain the accuracy minus that, with the bounds of the
    difference on the same resamples: the model beats the majority answer where they lie above 0. A kind of question
    that does not occur has no entry, and a kind without a majority answer only its accuracy.

    Args:
        predicted: The answer with the largest logit for each question.
        answer_ids: Each question's true answers.
        answer_scores: Their scores.
        is_open: Whether each question is open; the others are closed.
        groups: Which image each question is about.
        majority: The most frequent answer of the training split for each kind: see ``majority_answers``.
        **resampling: What ``bootstrap`` takes beside.

    Source: ``VQARADScore`` in the original's gadgets/my_metrics.py.
    Deviation: There, a kind without questions has the accuracy 0, and open and closed accuracy are those of the epoch
    with the best overall accuracy.
    """
    is_open, groups = np.asarray(is_open, dtype=bool), np.asarray(groups)
    scores = vqa_scores(predicted, answer_ids, answer_scores)
    metrics = {}
    for kind, of_kind in zip(QUESTION_KINDS, (np.ones_like(is_open), is_open, ~is_open), strict=True):
        if not of_kind.any():
            continue
        metrics[f"{kind}_accuracy"] = _mean(scores[of_kind], groups[of_kind], **resampling)
        if kind in majority:
            always = vqa_scores([majority[kind]] * len(scores), answer_ids, answer_scores)
            metrics[f"{kind}_majority_accuracy"] = _mean(always[of_kind], groups[of_kind], **resampling)
            metrics[f"{kind}_gain"] = _mean((scores - always)[of_kind], groups[of_kind], **resampling)
    return metrics


def vqa_scores(
    predicted: Sequence[int], answer_ids: Sequence[Sequence[int]], answer_scores: Sequence[Sequence[float]]
) -> np.ndarray:
    """Returns for each question the score of the predicted answer, 0 where it is none of the true ones."""
    true = zip(predicted, answer_ids, answer_scores, strict=True)
    return np.array([dict(zip(ids, scores, strict=True)).get(int(answer), 0.0) for answer, ids, scores in true])


def majority_answers(answer_ids: Sequence[Sequence[int]], is_open: Sequence[bool]) -> dict[str, int]:
    """Returns the most frequent answer of all, of the open and of the closed questions; of equals the first to appear.

    Args:
        answer_ids: The answers to each question of the training split.
        is_open: Whether each of them is open.
    """
    counts = {kind: Counter() for kind in QUESTION_KINDS}
    for ids, question_is_open in zip(answer_ids, is_open, strict=True):
        for kind in ("overall", "open" if question_is_open else "closed"):
            counts[kind].update(ids)
    return {kind: count.most_common(1)[0][0] for kind, count in counts.items() if count}


def classification_metrics(
    predicted: Sequence[int], expected: Sequence[int], groups: Sequence[Any], **resampling: Any
) -> dict[str, Interval]:
    """Returns accuracy and macro_f1, the mean F1 of the classes that occur as expected or as predicted.

    Which classes these are varies from resample to resample. Where many are rare, most resamples miss some of them, and
    the bounds of macro_f1 may lie to one side of its value.

    Args:
        predicted: The class with the largest logit of each item.
        expected: The true class.
        groups: Which image each item has.
        **resampling: What ``bootstrap`` takes beside.
    """
    from sklearn.metrics import f1_score  # slow to import

    predicted, expected = np.asarray(predicted), np.asarray(expected)

    def macro_f1(index: np.ndarray) -> float:
        return float(f1_score(expected[index], predicted[index], average="macro"))

    return {
        "accuracy": _mean(predicted == expected, groups, **resampling),
        "macro_f1": bootstrap(macro_f1, groups, **resampling),
    }


def recall_metrics(
    image_hits: Mapping[int, Sequence[bool]],
    text_hits: Mapping[int, Sequence[bool]],
    image_groups: Sequence[Any],
    text_groups: Sequence[Any],
    **resampling: Any,
) -> dict[str, Interval]:
    """Returns {image_to_text, text_to_image}_recall_at_k, the share of queries with a hit among the first k.

    Only the queries are drawn again. What they are looked for among stays as it is, because recall depends on its size:
    the bounds hold for other queries to these candidates.

    Args:
        image_hits: For each k whether one of an image's own texts is among the k texts with the largest scores.
        text_hits: For each k whether a text's own image is among the k images with the largest scores.
        image_groups: The id of each image.
        text_groups: The id of each text's image.
        **resampling: What ``bootstrap`` takes beside.

    Source: ``compute_irtr_recall`` in the original's modules/objectives.py, where they are called tr and ir.
    """
    ways = {"image_to_text": (image_hits, image_groups), "text_to_image": (text_hits, text_groups)}
    return {
        f"{way}_recall_at_{k}": _mean(hits[k], groups, **resampling)
        for way, (hits, groups) in ways.items()
        for k in sorted(hits)
    }


def multilabel_metrics(
    scores: np.ndarray, labels: np.ndarray, class_names: Sequence[str], groups: Sequence[Any], **resampling: Any
) -> dict[str, Interval]:
    """Returns mean_auroc and auroc_{class}: how often an item with the class scores above one without, ties half.

    A class of which the items have only one value has no AUROC: its value is None, and the mean is over the others. A
    resample in which one of these has only one value has no mean.

    Args:
        scores: A score for each item and class, (num_items, num_classes).
        labels: 1 where an item has a class, else 0.
        class_names: Names of the classes.
        groups: Which image, or better which patient each item is of.
        **resampling: What ``bootstrap`` takes beside.

    Raises:
        ValueError: The arrays' shapes differ, or a label is neither 0 nor 1.
    """
    from sklearn.metrics import roc_auc_score  # slow to import

    scores, labels = np.asarray(scores), np.asarray(labels)
    if not scores.shape == labels.shape == (len(groups), len(class_names)):
        wanted = f"({len(groups)}, {len(class_names)})"
        raise ValueError(f"scores and labels must be {wanted}, got {scores.shape} and {labels.shape}.")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {np.setdiff1d(labels, (0, 1))[:5].tolist()}.")
    is_defined = labels.min(axis=0) != labels.max(axis=0)
    # Ranks are found once for all resamples, of which each then costs a fiftieth of what roc_auc_score takes.
    ranks = [np.unique(column, return_inverse=True)[1] for column in scores.T]

    def with_mean(aurocs: list[float]) -> list[float]:
        of_defined = np.array(aurocs)[is_defined]
        return [float(of_defined.mean()) if len(of_defined) else float("nan"), *aurocs]

    values = [
        float(roc_auc_score(*columns)) if defined else float("nan")
        for *columns, defined in zip(labels.T, scores.T, is_defined, strict=True)
    ]
    intervals = _intervals(
        with_mean(values),
        lambda index: with_mean(
            [_auroc(label[index], rank[index]) for label, rank in zip(labels.T, ranks, strict=True)]
        ),
        groups,
        **resampling,
    )
    return dict(zip(["mean_auroc", *(f"auroc_{name}" for name in class_names)], intervals, strict=True))


def dice_scores(predicted: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Returns 2 |P and E| / (|P| + |E|) of each image's masks; 1 where both are empty.

    Args:
        predicted: True where a pixel is predicted to belong, (num_images, ...).
        expected: True where it does.
    """
    predicted, expected = (np.asarray(masks, dtype=bool).reshape(len(masks), -1) for masks in (predicted, expected))
    num_both = np.logical_and(predicted, expected).sum(axis=1)
    num_pixels = predicted.sum(axis=1) + expected.sum(axis=1)
    return np.where(num_pixels == 0, 1.0, 2 * num_both / np.maximum(num_pixels, 1))


def dice_metrics(
    scores: Sequence[float], is_empty: Sequence[bool], groups: Sequence[Any], **resampling: Any
) -> dict[str, Interval]:
    """Returns dice, the mean of the images' scores, and dice_not_empty, that of images with a mask, if there are any.

    Where most images have an empty mask, predicting nothing gives a large ``dice``; ``dice_not_empty`` is then 0.

    Args:
        scores: What ``dice_scores`` gives for each image.
        is_empty: Whether the image's expected mask is empty.
        groups: Which image, or better which patient each is of.
        **resampling: What ``bootstrap`` takes beside.
    """
    scores, groups, has_mask = np.asarray(scores), np.asarray(groups), ~np.asarray(is_empty, dtype=bool)
    metrics = {"dice": _mean(scores, groups, **resampling)}
    if has_mask.any():
        metrics["dice_not_empty"] = _mean(scores[has_mask], groups[has_mask], **resampling)
    return metrics


def _mean(values: Sequence[float] | np.ndarray, groups: Sequence[Any] | np.ndarray, **resampling: Any) -> Interval:
    """Returns the items' mean."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) != len(groups):
        raise ValueError(f"groups must name a group for each of {len(values)} items, got {len(groups)}.")
    return bootstrap(lambda index: float(values[index].mean()), groups, **resampling)


def _auroc(label: np.ndarray, rank: np.ndarray) -> float:
    """Returns the AUROC from the rank of each item's score, equal for ties (Mann and Whitney's U over its maximum)."""
    positive, negative = (np.bincount(rank[label == value], minlength=rank.max() + 1) for value in (1, 0))
    num_pairs = positive.sum() * negative.sum()
    num_below = negative.cumsum() - negative / 2
    return float(positive @ num_below / num_pairs) if num_pairs else float("nan")


def _intervals(
    values: Iterable[float],
    statistics: Callable[[np.ndarray], Sequence[float]],
    groups: Sequence[Any] | np.ndarray,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Interval]:
    """Returns an interval for each of several numbers, all from the same resamples.

    Args:
        values: The numbers for all items; NaN: not defined.
        statistics: The same numbers for a resample.
        groups: As in ``bootstrap``, and so are the others.
        num_resamples: How many.
        confidence: Share.
        seed: Of the draw.
    """
    if len(groups) == 0:
        raise ValueError("groups must name a group for each item, got no item.")
    if num_resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"num_resamples must be at least 1 and confidence between 0 and 1, got {num_resamples} and {confidence}."
        )
    num_groups = len(np.unique(np.asarray(groups)))
    of_all = Interval(None, None, None, len(groups), num_groups, confidence=confidence)
    intervals = [of_all if np.isnan(value) else of_all._replace(value=float(value)) for value in values]
    if num_groups == 1:
        return intervals
    resampled = np.array([statistics(index) for index in _resamples(groups, num_resamples, seed)], dtype=np.float64)
    for number, (interval, found) in enumerate(zip(intervals, resampled.T, strict=True)):
        if interval.value is not None:
            found = found[~np.isnan(found)]
            quantiles = ((1 - confidence) / 2, (1 + confidence) / 2)
            low, high = np.quantile(found, quantiles).tolist() if len(found) else (None, None)
            counts = {"num_resamples": num_resamples, "num_left_out": num_resamples - len(found)}
            intervals[number] = interval._replace(low=low, high=high, **counts)
    return intervals


def _resamples(groups: Sequence[Any] | np.ndarray, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields the indices of the items of groups that are drawn with replacement."""
    _, group_of, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    items = np.argsort(group_of, kind="stable")
    first = np.cumsum(sizes) - sizes
    generator = np.random.default_rng(seed)
    for _ in range(num_resamples):
        drawn = generator.integers(len(sizes), size=len(sizes))
        ends = np.cumsum(sizes[drawn])
        # Runs first, first + 1, ... one after another: each item's place in all of them, minus where its run starts.
        yield items[np.repeat(first[drawn] - (ends - sizes[drawn]), sizes[drawn]) + np.arange(ends[-1])]
