"""Pictures at validation: what a model makes of the first held-out pairs.

reconstructions     original, masked and rebuilt images, beside the captions and the predicted words
word_attention      of MPMA: at which patches its last fusion layer looks for each hidden word
slot_usage          of MPMA: how much the slots of its memory are used
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import MPMAConfig
from fastm3ae.data.batch import PretrainBatch
from fastm3ae.masking import split_patches
from fastm3ae.model.build import Model
from fastm3ae.model.fusion_use import FusionUse
from fastm3ae.visualize import (
    Reconstruction,
    TileRow,
    grey_out,
    lay_over,
    reconstruction_grid,
    tile_grid,
    to_unit_range,
    usage_chart,
)
from fastm3ae.visualize.memory import usage_rows
from fastm3ae.visualize.reconstructions import hidden_words, patch_size_px, rebuild, rebuilt_images

__all__ = ["MAX_WORDS", "draw_pictures"]

MAX_WORDS = 6
"""Of so many hidden words of a report the attention is drawn."""


@torch.no_grad()
def draw_pictures(
    model: Model,
    batch: PretrainBatch,
    tokenizer: PreTrainedTokenizerFast,
    num_pictures: int,
    mean: Sequence[float],
    std: Sequence[float],
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, Image.Image]:
    """Draws the pictures that the model's objectives allow, and returns them by name.

    Args:
        model: The model; its mode (training or evaluation) is left as it was.
        batch: A batch on the model's device, images normalised.
        tokenizer: Turns ids into words.
        num_pictures: How many pairs are drawn.
        mean: Mean of each channel of the normalisation.
        std: Standard deviation of each channel of the normalisation.
        autocast: Gives the context in which the model computes.
    """
    config, names = model.config, set(model.config.objectives)
    rebuilds_images, fuses = bool(names & {"mim", "image_reconstruction"}), "report_reconstruction" in names
    if not rebuilds_images and not fuses:
        return {}
    pictures, words_B = {}, None
    with model.evaluating():
        if names & {"mlm", "report_reconstruction"}:
            with autocast(), FusionUse(model, batch) if fuses else nullcontext() as use:
                predicted_M = model.mlm_logits(batch).argmax(-1)
            words_B = hidden_words(batch, predicted_M, tokenizer, num_pictures)
        if rebuilds_images:
            with autocast():
                pred_BNP, is_hidden_BN = rebuild(model, batch)
            images = rebuilt_images(config, batch, pred_BNP, is_hidden_BN, mean, std)
            rows = []
            for i, triple in enumerate(zip(*(image_BCHW[:num_pictures] for image_BCHW in images), strict=True)):
                words = [] if words_B is None else ["", "masked: " + "; ".join(words_B[i])]
                rows.append(Reconstruction(*triple, [batch.texts[i], *words]))
            pictures["reconstructions"] = reconstruction_grid(rows)
        if fuses and len(batch.masked_index_M):
            image_BCHW = to_unit_range(batch.image_BCHW[:num_pictures].float(), mean, std)
            if any(words_B):
                pictures["word_attention"] = tile_grid(_attention_rows(config, batch, image_BCHW, use, words_B))
            if config.memory != "none":
                pictures["slot_usage"] = usage_chart(usage_rows(config, use, "hidden words"))
    return pictures


def _attention_rows(
    config: MPMAConfig, batch: PretrainBatch, image_BCHW: Tensor, use: FusionUse, words_B: Sequence[Sequence[str]]
) -> list[TileRow]:
    """Draws what the last layer's heads attend to on average; ``image_BCHW``: the pairs that are drawn, in [0, 1]."""
    size_px = patch_size_px(config)
    seen_BK, _, is_hidden_BN = split_patches(batch.patch_noise_BN, config.image.patch_frac)
    if config.masking == "separate":
        is_hidden_BN = torch.zeros_like(is_hidden_BN)
        seen_BK = torch.arange(is_hidden_BN.shape[1], device=seen_BK.device).expand_as(is_hidden_BN)
    masked_BCHW = grey_out(image_BCHW, is_hidden_BN[: len(image_BCHW)], size_px)
    rows = []
    for i, (words, weights_HQK) in enumerate(zip(words_B, use.cross_weights()[-1][: len(words_B)], strict=True)):
        if not words:
            continue
        weights_QK = weights_HQK[:, :MAX_WORDS].mean(dim=0)
        slots_QM, patches_QK = weights_QK.split([weights_QK.shape[1] - seen_BK.shape[1], seen_BK.shape[1]], dim=1)
        index_QK = seen_BK[i].expand_as(patches_QK)
        weights_QN = patches_QK.new_zeros(len(patches_QK), is_hidden_BN.shape[1]).scatter(1, index_QK, patches_QK)
        overlays_QCHW = lay_over(masked_BCHW[i].expand(len(weights_QN), -1, -1, -1), weights_QN, size_px)
        titles = []
        for word, most, slots_frac in zip(words[:MAX_WORDS], patches_QK.amax(dim=1), slots_QM.sum(dim=1), strict=True):
            of_slots = f", slots {slots_frac:.0%}" if slots_QM.shape[1] else ""
            titles.append(f"{word}\nreddest patch {most:.0%}{of_slots}")
        tiles = [("original\n", image_BCHW[i]), *zip(titles, overlays_QCHW, strict=True)]
        rows.append(TileRow(" ".join(batch.texts[i].split()), tiles))
    return rows
