"""Masking: hand-counted cases, the original's recorded choices, and frequencies."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import TOKENIZER, pretrain_batches
from parity_data import check_data_goldens

from fastm3ae.data.collate import BatchRequest
from fastm3ae.masking import (
    corrupt,
    draw_corruption,
    hidden_patches,
    num_kept_patches,
    select_tokens,
    select_words,
    select_words_official,
    split_patches,
)

GOLDEN = Path(__file__).parent / "data" / "golden" / "data"


# (1 - 0.9) * 10 is 0.9999999999999998: the original keeps no patch there, and so do we.
@pytest.mark.parametrize(
    ("num_patches", "patch_frac", "kept"), [(324, 0.75, 81), (196, 0.75, 49), (49, 0.5, 24), (10, 0.9, 0), (1, 0.75, 0)]
)
def test_num_kept_patches(num_patches, patch_frac, kept):
    assert num_kept_patches(num_patches, patch_frac) == kept


def test_patches_with_the_smallest_noise_are_kept():
    noise_BN = torch.tensor([[0.3, 0.1, 0.9, 0.2], [0.5, 0.6, 0.7, 0.0]])
    keep_BK, restore_BN, is_hidden_BN = split_patches(noise_BN, 0.5)
    assert keep_BK.tolist() == [[1, 3], [3, 0]]
    assert restore_BN.tolist() == [[2, 0, 3, 1], [1, 2, 3, 0]]
    assert is_hidden_BN.tolist() == [[True, False, True, False], [False, True, True, False]]
    assert hidden_patches(restore_BN, 2).tolist() == [[0, 2], [1, 2]]


def word_ids(*lengths):
    """Word ids of a text whose words have so many tokens, between two special tokens."""
    return [None, *(word for word, length in enumerate(lengths) for _ in range(length)), None]


@pytest.mark.parametrize(
    ("lengths", "token_frac", "num_selected"),
    [
        pytest.param([1] * 20, 0.15, {3}, id="single-tokens"),
        pytest.param([2] * 10, 0.15, {2}, id="a-word-that-exceeds-the-budget-is-passed-over"),
        pytest.param([1, 3], 0.15, {1}, id="one-always"),
        pytest.param([4], 0.15, {4}, id="one-always-even-if-it-is-too-long"),
        pytest.param([5, 6], 0.15, {5, 6}, id="one-always-even-if-all-are-too-long"),
        pytest.param([1] * 30, 0.15, {4}, id="4.5-rounds-to-even"),
        pytest.param([], 0.15, {0}, id="no-word"),
    ],
)
def test_budget_of_whole_words(lengths, token_frac, num_selected):
    ids = word_ids(*lengths)
    seen = set()
    for seed in range(50):
        is_selected = select_words(ids, token_frac, np.random.default_rng(seed))
        assert len(is_selected) == len(ids) and not is_selected[0] and not is_selected[-1]
        for word in range(len(lengths)):  # whole words
            assert len({bool(s) for s, w in zip(is_selected, ids, strict=True) if w == word}) == 1
        seen.add(int(is_selected.sum()))
    assert seen == num_selected


def test_every_word_is_selected_equally_often():
    rng = np.random.default_rng(0)
    counts = sum(select_words(word_ids(*[1] * 20), 0.15, rng).astype(int) for _ in range(4000))[1:-1]
    assert counts.sum() == 4000 * 3
    expected, deviation = 4000 * 0.15, (4000 * 0.15 * 0.85) ** 0.5
    assert np.abs(counts - expected).max() < 4.5 * deviation


def test_official_selection_by_hand():
    tokens = ["[CLS]", "a", "##b", "##c", "d", "[SEP]", "[PAD]", "[PAD]"]
    choices = Counter(
        tuple(np.flatnonzero(select_words_official(tokens, 0.3, random.Random(seed)))) for seed in range(400)
    )
    # The budget is round(8 * 0.3) = 2, so that the word of three tokens never fits, and padding is hit as often as "d".
    assert set(choices) == {(4, 6), (4, 7), (6, 7)}
    assert min(choices.values()) > 90


def test_official_budget_has_a_ceiling():
    assert select_words_official(["x"] * 5000, 0.15, random.Random(0)).sum() == 512


def test_recorded_choices_of_the_original():
    checks = [check for check in check_data_goldens(GOLDEN) if check.name.startswith("wwm/")]
    assert len(checks) == 14
    assert [check for check in checks if not check.ok] == []


@pytest.mark.parametrize("name", ["bert-base-uncased", "roberta"])
def test_recorded_frequencies_of_the_original(name):
    recorded = json.loads((GOLDEN / "data_pipeline.json").read_text())[f"wwm/{name}"]
    special = {"[CLS]", "[SEP]", "[PAD]", "[UNK]", "<s>", "</s>", "<pad>"}
    rng = random.Random(0)
    masked = real = nothing = rows = 0
    for _ in range(400):
        for tokens in recorded["tokens"]:
            selected = np.flatnonzero(select_words_official(tokens, 0.15, rng))
            num_masked = sum(tokens[i] not in special for i in selected)
            masked, nothing, rows = masked + num_masked, nothing + (num_masked == 0), rows + 1
            real += sum(token not in special for token in tokens)
    rates = recorded["rates_400_batches"]
    deviation = (2 * rates["rows_with_nothing_masked"] / rows) ** 0.5  # of the difference of two such frequencies
    assert abs(nothing / rows - rates["rows_with_nothing_masked"]) < 4 * deviation
    assert masked / real == pytest.approx(rates["masked_fraction_of_real_tokens"], rel=0.03)


def test_every_token_that_is_not_special_is_selected_by_itself():
    rng = np.random.default_rng(0)
    is_special = [True, *[False] * 20, True]
    num_texts, token_frac = 4000, 0.15
    selected = np.array([select_tokens(is_special, token_frac, rng) for _ in range(num_texts)])
    assert not selected[:, [0, -1]].any()
    deviation = (num_texts * token_frac * (1 - token_frac)) ** 0.5
    assert np.abs(selected.sum(0)[1:-1] - num_texts * token_frac).max() < 4.5 * deviation
    # How many of a text are selected is binomial, where the whole-word rule has a budget: its variance is n f (1 - f).
    assert selected.sum(1).var() == pytest.approx(20 * token_frac * (1 - token_frac), rel=0.1)
    assert select_tokens([], token_frac, rng).shape == (0,)


def test_batches_with_single_tokens(corpus):
    batches, special = pretrain_batches(corpus, words="token"), torch.tensor(TOKENIZER.all_special_ids)
    num_selected = num_selectable = num_texts_without = 0
    for epoch in range(40):
        batch = batches[BatchRequest(epoch, 0, list(range(33)))]
        is_selected_BT = batch.mlm_labels_BT != -100
        is_special_BT = torch.isin(batch.text_ids_BT, special)
        assert not (is_selected_BT & is_special_BT).any()
        num_selected += int(is_selected_BT.sum())
        num_selectable += int((~is_special_BT).sum())
        num_texts_without += int((~is_selected_BT.any(1)).sum())
    deviation = (num_selectable * 0.15 * 0.85) ** 0.5
    assert abs(num_selected - 0.15 * num_selectable) < 4.5 * deviation
    assert num_texts_without > 0


def test_corruption_by_hand():
    ids_BT = torch.tensor([[5, 6, 7, 8, 9]])
    is_selected_BT = torch.tensor([[True, True, True, True, False]])
    is_replaced_BT = torch.tensor([[True, False, False, True, True]])
    is_random_BT = torch.tensor([[False, True, False, True, True]])
    random_ids_BT = torch.tensor([[90, 91, 92, 93, 94]])
    corrupted, labels = corrupt(ids_BT, is_selected_BT, is_replaced_BT, is_random_BT, random_ids_BT, 4)
    assert corrupted.tolist() == [[4, 91, 7, 4, 9]]
    assert labels.tolist() == [[5, 6, 7, 8, -100]]


def test_frequencies_of_corruption():
    num_tokens, vocab_size = 200_000, 50
    draws = [torch.from_numpy(draw) for draw in draw_corruption(num_tokens, vocab_size, np.random.default_rng(0))]
    ids = torch.full((num_tokens,), 1000)
    corrupted, _ = corrupt(ids, torch.ones(num_tokens, dtype=torch.bool), *draws, 2000)
    is_random = corrupted < vocab_size
    for observed, expected in ((corrupted == 2000, 0.8), (is_random, 0.1), (corrupted == 1000, 0.1)):
        assert observed.float().mean().item() == pytest.approx(expected, abs=0.005)
    counts = torch.bincount(corrupted[is_random], minlength=vocab_size)
    assert counts.min() > 0.7 * counts.float().mean() and counts.max() < 1.3 * counts.float().mean()
