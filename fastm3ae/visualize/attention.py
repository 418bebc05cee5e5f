"""At which patches each word of a text looks: the weights of one layer's cross-attention, laid over the image."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from PIL import Image
from tokenizers import Encoding
from torch import Tensor

from fastm3ae.errors import UserError
from fastm3ae.model.fusion_use import FusionUse, co_attention_weights
from fastm3ae.visualize.pixels import lay_over
from fastm3ae.visualize.sheets import TileRow, tile_grid
from fastm3ae.visualize.subject import Subject

__all__ = ["WordAttention", "draw_attention", "words_of", "word_attention"]

NUM_COLUMNS = 8  # pictures beside each other
RED = "red: more than the mean patch"
LETTERS = 22  # of a word, above the narrowest picture


class WordAttention(NamedTuple):
    """What the tokens of one text give to its image; with ``others_HTM`` each head's weights of a token sum to 1.

    Args:
        patches_HTN: The weights of the patches, in image order.
        others_HTM: Those of what stands beside the patches: CLS of the image (M3AE), the memory's slots (MPMA).
    """

    patches_HTN: Tensor
    others_HTM: Tensor


@torch.no_grad()
def word_attention(subject: Subject, layer: int) -> list[WordAttention]:
    """Returns for each pair what its text's tokens attend to in a layer of the fusion.

    The model sees whole images and unmasked texts, as it does when it is fine-tuned.

    Args:
        subject: The model and the pairs.
        layer: Which layer, from 1 on; of M3AE that of the text's stream.

    Raises:
        UserError: The model has no fusion, or not so many layers.
    """
    model, batch = subject.model, subject.batch
    if not hasattr(model, "fusion"):
        raise UserError(f"{subject.checkpoint} has no fusion, in which words would look at patches.")
    num_layers = model.config.fusion.num_layers
    if not 1 <= layer <= num_layers:
        raise UserError(f"The layer must be from 1 to {num_layers}, got {layer}.")
    if model.config.kind == "m3ae":
        weights_B, num_others = co_attention_weights(model, batch, layer - 1), int(model.config.vision.kind != "swin")
    else:
        with FusionUse(model, batch, is_whole=True) as use:
            model.fuse_whole(batch)
        weights_B = use.cross_weights()[layer - 1]
        num_others = model.config.num_slots if model.config.memory == "slots" else 0
    return [WordAttention(w_HTK[..., num_others:], w_HTK[..., :num_others]) for w_HTK in weights_B]


def words_of(encoding: Encoding, text: str) -> list[tuple[str, list[int]]]:
    """Returns the words of a text, as far as the model sees it, with their tokens; what has no letter is no word."""
    tokens: dict[int, list[int]] = {}
    for token, word in enumerate(encoding.word_ids):
        if word is not None:
            tokens.setdefault(word, []).append(token)
    found = []
    for of_word in tokens.values():
        spans = [encoding.offsets[token] for token in of_word]
        word = text[spans[0][0] : spans[-1][1]].strip()
        if any(letter.isalnum() for letter in word):
            found.append((word, of_word))
    return found


def draw_attention(
    subject: Subject, layer: int, heads: Literal["mean", "all"] | Sequence[int] = "mean"
) -> list[Image.Image]:
    """Draws a sheet for each pair: its image, and under each word where it looks.

    Red are the patches that get more than the mean patch of their picture, the reddest the one that gets the most; the
    title says how much that is. A word of several tokens has their mean.

    Args:
        subject: The model and the pairs.
        layer: As of ``word_attention``.
        heads: mean: one picture for each word. all, or numbers from 1 on: one for each word and head.

    Raises:
        UserError: As of ``word_attention``; a head does not exist; or a text has no word.
    """
    attention_B = word_attention(subject, layer)
    num_heads, num_layers = subject.model.config.fusion.num_heads, subject.model.config.fusion.num_layers
    chosen = range(1, num_heads + 1) if heads == "all" else [] if heads == "mean" else heads
    if unknown := [head for head in chosen if not 1 <= head <= num_heads]:
        raise UserError(f"The heads are numbered from 1 to {num_heads}, got {unknown[0]}.")
    sheets = []
    for pair, (attention, image_CHW) in enumerate(zip(attention_B, subject.images(), strict=True)):
        words = words_of(subject.encodings[pair], subject.batch.texts[pair])
        if not words:
            raise UserError(
                f"Text {pair + 1} has no word that could look at an image, got {subject.batch.texts[pair]!r}."
            )
        if not chosen:
            caption = f"{subject.caption(pair)}\nlayer {layer} of {num_layers}, mean over {num_heads} heads; {RED}"
            rows = _rows(caption, attention, slice(None), words, image_CHW, subject)
        else:
            rows = []
            for head in chosen:
                caption = f"layer {layer} of {num_layers}, head {head} of {num_heads}; {RED}"
                caption = caption if rows else f"{subject.caption(pair)}\n{caption}"
                rows += _rows(caption, attention, slice(head - 1, head), words, image_CHW, subject)
        sheets.append(tile_grid(rows, max_lines=None))
    return sheets


def _rows(
    caption: str,
    attention: WordAttention,
    heads: slice,
    words: Sequence[tuple[str, list[int]]],
    image_CHW: Tensor,
    subject: Subject,
) -> list[TileRow]:
    """Returns the image and the pictures of all words, as many in a row as there is room for."""
    patches_TN, others_TM = attention.patches_HTN[heads].mean(dim=0), attention.others_HTM[heads].mean(dim=0)
    size_px = image_CHW.shape[-1] // round(patches_TN.shape[1] ** 0.5)
    name = "CLS" if subject.model.config.kind == "m3ae" else "slots"
    tiles = [("original\n", image_CHW)]
    for word, tokens in words:
        weights_N = patches_TN[tokens].mean(dim=0)
        beside = f", {name} {others_TM[tokens].sum(dim=1).mean():.0%}" if others_TM.shape[1] else ""
        shown = word if len(word) <= LETTERS else f"{word[: LETTERS - 3]}..."
        overlay_1CHW = lay_over(image_CHW[None], (weights_N - weights_N.mean()).clamp_min(0)[None], size_px)
        tiles.append((f"{shown}\nmost {weights_N.max():.1%}{beside}", overlay_1CHW[0]))
    lines = [tiles[start : start + NUM_COLUMNS] for start in range(0, len(tiles), NUM_COLUMNS)]
    return [TileRow(caption if number == 0 else "", line) for number, line in enumerate(lines)]
