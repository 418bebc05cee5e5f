"""The metrics against hand-worked cases, and their intervals against what they promise."""

import time
import warnings

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from fastm3ae.tasks.metrics import (
    Interval,
    bootstrap,
    classification_metrics,
    dice_metrics,
    dice_scores,
    majority_answers,
    multilabel_metrics,
    recall_metrics,
    vqa_metrics,
    vqa_scores,
)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def values_of(metrics):
    return {name: found.value for name, found in metrics.items()}


def mean_of(values):
    return lambda index: values[index].mean()


def test_resamples_are_whole_groups():
    """Sizes 1, 2 and 3: each resample holds three draws, each with all items of its group in a row."""
    groups, seen = ["b", "c", "a", "c", "b", "c"], []
    bootstrap(lambda index: seen.append(index.tolist()) or 0.0, groups, num_resamples=500, seed=3)
    assert seen[0] == [0, 1, 2, 3, 4, 5] and len(seen) == 501
    members, drawn = {2: [2], 0: [0, 4], 1: [1, 3, 5]}, []
    for index in seen[1:]:
        runs = []
        while index:
            run = members[index[0]]
            assert index[: len(run)] == run
            runs.append(index[0])
            index = index[len(run) :]
        assert len(runs) == 3
        drawn += runs
    counts = [drawn.count(first) for first in members]
    assert all(abs(count - 500) < 4 * (1500 * 2 / 9) ** 0.5 for count in counts), counts


def test_bounds_are_the_quantiles_of_the_resamples():
    """Of two groups, whose means are 0 and 1, a resample's mean is 0, 1/2 or 1 with the odds 1, 2, 1."""
    values = np.array([0.0, 1.0])
    assert bootstrap(mean_of(values), [0, 1], confidence=0.95)[:4] == (0.5, 0.0, 1.0, 2)
    assert bootstrap(mean_of(values), [0, 1], confidence=0.4)[:4] == (0.5, 0.5, 0.5, 2)
    found = []
    values = np.random.default_rng(0).normal(size=40)
    interval = bootstrap(lambda index: found.append(values[index].mean()) or found[-1], range(40), 200, 0.8, 5)
    low, high = np.quantile(found[1:], [0.1, 0.9])
    assert (
        interval.value == values.mean() and interval.low == pytest.approx(low) and interval.high == pytest.approx(high)
    )
    assert interval[3:] == (40, 40, 200, 0, 0.8)


def test_the_seed_decides():
    values = np.random.default_rng(1).normal(size=90)
    groups = np.repeat(np.arange(30), 3)
    first = bootstrap(mean_of(values), groups, seed=7)
    assert bootstrap(mean_of(values), groups, seed=7) == first != bootstrap(mean_of(values), groups, seed=8)
    order = np.random.default_rng(2).permutation(90)
    shuffled = bootstrap(mean_of(values[order]), [f"{g:03d}.png" for g in groups[order]], seed=7)
    assert shuffled == pytest.approx(first, abs=1e-12)


def test_one_group_has_no_bounds():
    found = bootstrap(mean_of(np.array([0.0, 1.0])), ["a", "a"])
    assert found == Interval(0.5, None, None, 2, 1, 0, 0, 0.95)


def test_a_statistic_that_is_not_defined_has_no_bounds_either():
    assert bootstrap(lambda index: float("nan"), [1, 2])[:3] == (None, None, None)
    only_of_all = bootstrap(
        lambda index: 1.0 if index.tolist() == [0, 1, 2, 3, 4, 5, 6, 7] else float("nan"), range(8), 9
    )
    assert only_of_all == Interval(1.0, None, None, 8, 8, 9, 9, 0.95)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"groups": []}, "got no item"),
        ({"groups": [1, 2], "num_resamples": 0}, "got 0 and 0.95"),
        ({"groups": [1, 2], "confidence": 1.0}, "got 1000 and 1.0"),
    ],
)
def test_what_bootstrap_refuses(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        bootstrap(lambda index: 0.0, **arguments)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """40 groups of 5 items that share most of their variance: 95 % of the intervals hold the mean, which is 0.

    Over 400 data sets a right interval is within four standard errors of 0.95 (and of the percentile interval's own
    small lack at 40 groups); from single items it would hold the mean in 61 % of the cases: 1.96 standard errors of
    single items, sqrt(1.25 / 200), are 0.86 of the true ones, sqrt(1 / 40 + 0.25 / 200).
    """
    generator, covered, covered_by_items, num = np.random.default_rng(0), 0, 0, 400
    groups = np.repeat(np.arange(40), 5)
    for seed in range(num):
        values = np.repeat(generator.normal(size=40), 5) + 0.5 * generator.normal(size=200)
        interval = bootstrap(mean_of(values), groups, num_resamples=300, seed=seed)
        by_items = bootstrap(mean_of(values), np.arange(200), num_resamples=300, seed=seed)
        covered += interval.low <= 0 <= interval.high
        covered_by_items += by_items.low <= 0 <= by_items.high
    assert 0.95 - 4 * (0.95 * 0.05 / num) ** 0.5 - 0.015 < covered / num < 0.95 + 4 * (0.95 * 0.05 / num) ** 0.5
    assert abs(covered_by_items / num - 0.61) < 4 * (0.61 * 0.39 / num) ** 0.5


def test_a_thousand_resamples_of_two_thousand_items_take_about_a_second():
    generator = np.random.default_rng(0)
    groups, labels = np.arange(2000) // 2, generator.integers(0, 2, (2000, 14))
    start = time.process_time()
    bootstrap(mean_of(generator.random(2000)), groups)
    of_mean = time.process_time() - start
    multilabel_metrics(generator.random((2000, 14)), labels, [str(c) for c in range(14)], groups)
    # A few times what it takes on a slow core.
    assert of_mean < 2 and time.process_time() - start < 20


QUESTIONS = {
    "predicted": [3, 0, 5, 1, 1],
    "answer_ids": [[3], [1], [4, 5], [1], []],
    "answer_scores": [[1.0], [1.0], [1.0, 0.5], [1.0], []],
    "is_open": [True, False, True, False, True],
    "groups": ["a", "c", "b", "c", "b"],
}


def test_vqa():
    """Scores 1, 0, 0.5, 1, 0, the last because its answer is in no vocabulary. Always 1: 0, 1, 0, 1, 0."""
    assert vqa_scores(*[QUESTIONS[name] for name in ("predicted", "answer_ids", "answer_scores")]).tolist() == [
        1, 0, 0.5, 1, 0
    ]  # fmt: skip
    metrics = vqa_metrics(**QUESTIONS, majority={"overall": 1, "open": 4, "closed": 1})
    assert values_of(metrics) == pytest.approx(
        {
            "overall_accuracy": 2.5 / 5, "overall_majority_accuracy": 2 / 5, "overall_gain": 0.5 / 5,
            "open_accuracy": 1.5 / 3, "open_majority_accuracy": 1 / 3, "open_gain": 0.5 / 3,
            "closed_accuracy": 1 / 2, "closed_majority_accuracy": 1.0, "closed_gain": -1 / 2,
        }
    )  # fmt: skip
    sizes = {"overall": (5, 3), "open": (3, 2), "closed": (2, 1)}
    assert {name: found[3:5] for name, found in metrics.items()} == {
        f"{kind}_{name}": size for kind, size in sizes.items() for name in ("accuracy", "majority_accuracy", "gain")
    }


def test_vqa_with_one_kind_of_question():
    only_open = {**QUESTIONS, "is_open": [True] * 5}
    assert values_of(vqa_metrics(**only_open, majority={"overall": 1, "closed": 1})) == {
        "overall_accuracy": 0.5,
        "overall_majority_accuracy": 0.4,
        "overall_gain": pytest.approx(0.1),
        "open_accuracy": 0.5,
    }


def test_the_gain_is_bounded_on_the_same_resamples():
    """Right wherever the majority answer is right, and a tenth more often: the gain varies less than its parts."""
    is_right = np.random.default_rng(0).random(400) < 0.5
    more = is_right | (np.arange(400) % 10 == 0)
    metrics = vqa_metrics(
        np.where(more, np.where(is_right, 0, 1), 2), [[0] if right else [1] for right in is_right], [[1.0]] * 400,
        [False] * 400, range(400), {"closed": 0},
    )  # fmt: skip
    accuracy, majority, gain = (metrics[f"closed_{name}"] for name in ("accuracy", "majority_accuracy", "gain"))
    assert gain.value == pytest.approx(accuracy.value - majority.value)
    assert accuracy.low < majority.high and 0 < gain.low < gain.high


def test_majority_answers():
    answer_ids, is_open = [[2], [7], [7], [2, 5], [5], [0]], [False, True, False, False, True, False]
    assert majority_answers(answer_ids, is_open) == {"overall": 2, "open": 7, "closed": 2}
    assert majority_answers([[1], []], [False, True]) == {"overall": 1, "closed": 1}


def test_classification():
    """F1 of class 0 is 1, of class 1 (precision 1, recall 1/2) 2/3, and of class 2, which is never expected, 0."""
    expected, predicted = [0, 0, 1, 1], [0, 0, 1, 2]
    metrics = classification_metrics(predicted, expected, ["a", "b", "c", "d"])
    assert values_of(metrics) == pytest.approx({"accuracy": 3 / 4, "macro_f1": (1 + 2 / 3 + 0) / 3})
    everything = classification_metrics(np.zeros(6, dtype=int), np.zeros(6, dtype=int), range(6))
    assert everything["macro_f1"][:3] == (1.0, 1.0, 1.0)


def test_bounds_of_macro_f1_are_of_the_same_resamples():
    generator = np.random.default_rng(4)
    expected, predicted, groups = (generator.integers(0, most, 60) for most in (4, 4, 20))
    found = []

    def by_hand(index):
        found.append(f1_score(expected[index], predicted[index], average="macro"))
        return found[-1]

    want = bootstrap(by_hand, groups, num_resamples=50, seed=2)
    assert classification_metrics(predicted, expected, groups, num_resamples=50, seed=2)["macro_f1"] == want
    assert len(set(found)) > 40


def test_recall():
    metrics = recall_metrics(
        {10: [1, 1, 1], 1: [1, 0, 0], 5: [1, 1, 0]},
        {1: [0, 0, 0, 1], 5: [1, 0, 0, 1], 10: [1, 1, 0, 1]},
        ["a", "b", "c"],
        ["a", "a", "b", "c"],
    )
    want = {
        "image_to_text_recall_at_1": 1 / 3, "image_to_text_recall_at_5": 2 / 3, "image_to_text_recall_at_10": 1,
        "text_to_image_recall_at_1": 1 / 4, "text_to_image_recall_at_5": 1 / 2, "text_to_image_recall_at_10": 3 / 4,
    }  # fmt: skip
    assert values_of(metrics) == pytest.approx(want) and list(metrics) == list(want)
    assert metrics["text_to_image_recall_at_1"][3:5] == (4, 3)
    with pytest.raises(ValueError, match="each of 2 items, got 3"):
        recall_metrics({1: [1, 0]}, {}, ["a", "b", "c"], [])


def test_auroc_by_hand():
    """First class: 3 of 4 pairs are in order. Second: 3, and one ties. Third: no item has it."""
    scores = np.array([[0.9, 1, 5], [0.4, 2, 6], [0.6, 1, 7], [0.1, 0, 8]])
    labels = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]])
    metrics = multilabel_metrics(scores, labels, ["cat", "dog", "eel"], ["a", "b", "c", "d"])
    assert values_of(metrics) == {"mean_auroc": 0.8125, "auroc_cat": 0.75, "auroc_dog": 0.875, "auroc_eel": None}
    assert metrics["auroc_eel"][:4] == (None, None, None, 4)
    # No first-class item is drawn in 1/16 of the resamples, and no other one in as many.
    assert 0.09 < metrics["auroc_cat"].num_left_out / 1000 < 0.16
    assert metrics["mean_auroc"].num_left_out == metrics["auroc_cat"].num_left_out
    nothing = multilabel_metrics(scores, np.zeros_like(labels), ["cat", "dog", "eel"], range(4))
    assert set(values_of(nothing).values()) == {None}


def test_auroc_of_resamples_is_scikit_learns():
    generator = np.random.default_rng(5)
    labels, groups = generator.integers(0, 2, (80, 2)), generator.integers(0, 30, 80)
    scores = generator.integers(0, 12, (80, 2)).astype(np.float32)  # with many ties
    metrics = multilabel_metrics(scores, labels, ["x", "y"], groups, num_resamples=60, seed=9)
    for column, name in enumerate("xy"):
        by_hand = bootstrap(
            lambda index, c=column: roc_auc_score(labels[index, c], scores[index, c]), groups, num_resamples=60, seed=9
        )
        assert metrics[f"auroc_{name}"] == pytest.approx(by_hand, abs=1e-12)
    mean = bootstrap(lambda index: roc_auc_score(labels[index], scores[index]), groups, num_resamples=60, seed=9)
    assert metrics["mean_auroc"] == pytest.approx(mean, abs=1e-12)


def test_what_auroc_refuses():
    with pytest.raises(ValueError, match=r"must be \(3, 2\), got \(3, 2\) and \(2, 3\)"):
        multilabel_metrics(np.zeros((3, 2)), np.zeros((2, 3)), ["x", "y"], range(3))
    with pytest.raises(ValueError, match=r"must be 0 or 1, got \[-1\]"):
        multilabel_metrics(np.zeros((3, 1)), np.array([[0], [1], [-1]]), ["x"], range(3))


def test_dice():
    """1 of 2 and 1 pixels in common: 2/3. Both empty: 1. One empty: 0. The same: 1."""
    expected = np.array([[[1, 1], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]], [[0, 1], [1, 0]]])
    predicted = np.array([[[1, 0], [0, 0]], [[0, 0], [0, 0]], [[1, 1], [1, 1]], [[0, 1], [1, 0]]])
    scores = dice_scores(predicted, expected)
    assert scores.tolist() == [pytest.approx(2 / 3), 1, 0, 1]
    metrics = dice_metrics(scores, ~expected.any(axis=(1, 2)), ["a", "a", "b", "c"])
    assert values_of(metrics) == pytest.approx({"dice": 8 / 12, "dice_not_empty": 5 / 6})
    assert metrics["dice_not_empty"][3:5] == (2, 2)
    assert list(dice_metrics([1.0, 1.0], [True, True], [0, 1])) == ["dice"]
