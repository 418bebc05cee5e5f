"""Which patches and which words are hidden: index arithmetic, with every random draw passed in.

Patches: uniform noise is sorted, and the patches with the smallest noise are kept. Words: some words of a text are
selected, and each token of a selected word is to be predicted; it is seen as the mask token (80 %), as a random token
(10 %) or as it is (10 %).
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastm3ae.kernels import random_patch_order

__all__ = [
    "PatchOrder",
    "corrupt",
    "draw_corruption",
    "hidden_patches",
    "num_kept_patches",
    "select_tokens",
    "select_words",
    "select_words_official",
    "split_patches",
]

MASK_TOKEN_FRAC = 0.8
RANDOM_TOKEN_FRAC = 0.5  # of those that do not become the mask token
OFFICIAL_MAX_PREDICTIONS = 512


def num_kept_patches(num_patches: int, patch_frac: float) -> int:
    """Returns int(N (1 - p)), the number of patches that stay visible.

    Args:
        num_patches: N.
        patch_frac: p, the fraction of the patches that is hidden.

    Source: ``random_masking`` in the original's modules/m3ae_module.py, in the same floating-point arithmetic.
    """
    return int(num_patches * (1 - patch_frac))


class PatchOrder(NamedTuple):
    """Which patches of each image are visible.

    Args:
        keep_BK: (B, K) int64, the kept patches by rising noise.
        restore_BN: (B, N) int64, the rank of each patch: its place in "kept patches, then hidden patches".
        is_hidden_BN: (B, N) bool, True where the rank is K or more.
    """

    keep_BK: Tensor
    restore_BN: Tensor
    is_hidden_BN: Tensor


def split_patches(noise_BN: Tensor, patch_frac: float) -> PatchOrder:
    """Keeps the K = int(N (1 - p)) patches of each image that have the smallest noise.

    Args:
        noise_BN: (B, N) float32 or float64, one number per patch; of equal ones the lower patch counts as smaller.
        patch_frac: p, the fraction of the patches that is hidden.
    """
    return PatchOrder(*random_patch_order(noise_BN, num_kept_patches(noise_BN.shape[1], patch_frac)))


def hidden_patches(restore_BN: Tensor, num_kept: int) -> Tensor:
    """Returns (B, N - K) int64, the hidden patches of each image by rising noise.

    Args:
        restore_BN: The rank of each patch, from ``split_patches``.
        num_kept: K.
    """
    rank_BN = torch.arange(restore_BN.shape[1], device=restore_BN.device).expand_as(restore_BN)
    return torch.empty_like(restore_BN).scatter_(1, restore_BN, rank_BN)[:, num_kept:].contiguous()


def select_words(word_ids: Sequence[int | None], token_frac: float, rng: np.random.Generator) -> np.ndarray:
    """Selects whole words in random order until max(1, round(f n)) of the n tokens of words are selected.

    A word with more tokens than what is left of this budget is passed over; if that happens to all words, the first of
    the random order is selected. So at least one word is, if there is one.

    Args:
        word_ids: For each token the word that it belongs to, None where it can not be selected (special tokens).
        token_frac: f.
        rng: Draws the order of the words.

    Returns:
        (T,) bool, True at the tokens of selected words.
    """
    words: dict[int, list[int]] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            words.setdefault(word, []).append(position)
    budget = max(1, round(sum(map(len, words.values())) * token_frac))
    positions_of = list(words.values())
    order = rng.permutation(len(positions_of))
    selected: list[int] = []
    for word in order:
        if len(selected) + len(positions_of[word]) <= budget:
            selected += positions_of[word]
    if not selected and words:
        selected = positions_of[order[0]]
    is_selected_T = np.zeros(len(word_ids), dtype=bool)
    is_selected_T[selected] = True
    return is_selected_T


def select_words_official(tokens: Sequence[str], token_frac: float, rng: random.Random) -> np.ndarray:
    """Selects words as the original does: max(1, round(f T)) of the T tokens of the *padded* text, at most 512.

    A word is a token and the "##" pieces that follow it. Every token but "[CLS]" and "[SEP]" belongs to one: also
    padding, RoBERTa's "<s>" and "</s>". The caller takes these out of the selection afterwards, and nothing may
    be left of it. RoBERTa's vocabulary has no "##", so that there single tokens are selected.

    Args:
        tokens: The T tokens of the padded text, special tokens included.
        token_frac: f.
        rng: Draws the order of the words.

    Returns:
        (T,) bool, True at the tokens of selected words, special tokens and padding included.

    Source: ``DataCollatorForWholeWordMask`` of transformers 4.6, which the original uses.
    """
    words: list[list[int]] = []
    for position, token in enumerate(tokens):
        if token in ("[CLS]", "[SEP]"):
            continue
        if words and token.startswith("##"):
            words[-1].append(position)
        else:
            words.append([position])
    rng.shuffle(words)
    budget = min(OFFICIAL_MAX_PREDICTIONS, max(1, round(len(tokens) * token_frac)))
    selected: list[int] = []
    for positions in words:
        if len(selected) + len(positions) <= budget:
            selected += positions
    is_selected_T = np.zeros(len(tokens), dtype=bool)
    is_selected_T[selected] = True
    return is_selected_T


def select_tokens(is_special: Sequence[bool], token_frac: float, rng: np.random.Generator) -> np.ndarray:
    """Selects each token that is not special, independently, with probability f; in a short text perhaps none.

    Args:
        is_special: For each of the T tokens whether it can not be selected.
        token_frac: f.
        rng: Draws one number per token, special ones included.

    Returns:
        (T,) bool, True at selected tokens.

    Source: ``DataCollatorForLanguageModeling`` of transformers 4.6, the original's ``whole_word_masking=False``.
    Deviation: The original may select the unknown token, which the caller counts as special here.
    """
    return (rng.random(len(is_special)) < token_frac) & ~np.array(is_special, dtype=bool)


def draw_corruption(
    num_tokens: int, vocab_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws for each of T tokens what ``corrupt`` needs, whether or not the token is selected.

    Returns:
        is_replaced_T: (T,) bool, True with probability 0.8.
        is_random_T: (T,) bool, True with probability 0.5.
        random_ids_T: (T,) int64, uniform over the vocabulary, special tokens included.
    """
    is_replaced_T = rng.random(num_tokens) < MASK_TOKEN_FRAC
    is_random_T = rng.random(num_tokens) < RANDOM_TOKEN_FRAC
    return is_replaced_T, is_random_T, rng.integers(vocab_size, size=num_tokens)


def corrupt(
    ids_BT: Tensor,
    is_selected_BT: Tensor,
    is_replaced_BT: Tensor,
    is_random_BT: Tensor,
    random_ids_BT: Tensor,
    mask_token_id: int,
) -> tuple[Tensor, Tensor]:
    """Replaces selected tokens: by the mask token, else by a random token, else not at all.

    Args:
        ids_BT: (B, T) int64, the text.
        is_selected_BT: (B, T) bool, True at the tokens to predict.
        is_replaced_BT: (B, T) bool, True where a selected token becomes the mask token.
        is_random_BT: (B, T) bool, True where a selected token that does not become the mask token becomes a random one.
        random_ids_BT: (B, T) int64, the random tokens.
        mask_token_id: Id of the mask token.

    Returns:
        The corrupted text and its labels, (B, T) int64; a label is the original id at a selected token, else -100.

    Source: Devlin et al., "BERT" (NAACL 2019), section 3.1.
    """
    corrupted_BT = ids_BT.where(~(is_selected_BT & is_random_BT), random_ids_BT)
    corrupted_BT = corrupted_BT.masked_fill(is_selected_BT & is_replaced_BT, mask_token_id)
    return corrupted_BT, ids_BT.masked_fill(~is_selected_BT, -100)
