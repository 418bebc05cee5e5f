"""What a model makes of hidden patches and hidden words."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import ImageReconstructionConfig, MIMConfig, ModelConfig
from fastm3ae.data.batch import PretrainBatch
from fastm3ae.data.images import normalization
from fastm3ae.errors import UserError
from fastm3ae.kernels import masked_pixel_loss
from fastm3ae.masking import num_kept_patches
from fastm3ae.model.build import Model
from fastm3ae.visualize.pixels import reconstruct
from fastm3ae.visualize.sheets import TileRow, tile_grid
from fastm3ae.visualize.subject import Subject

__all__ = [
    "draw_reconstructions",
    "hidden_words",
    "patch_size_px",
    "rebuild",
    "rebuilt_images",
]

IMAGE_OBJECTIVES, WORD_OBJECTIVES = {"mim", "image_reconstruction"}, {"mlm", "report_reconstruction"}


@torch.no_grad()
def draw_reconstructions(subject: Subject, mask_ratios: Sequence[float], has_texts: bool) -> Image.Image:
    """Draws a row for each pair: the image, and for each ratio what is left of it and what the model makes of that.

    The patches that are hidden at a ratio are also hidden at every higher one. M3AE rebuilds an image beside its text,
    and hidden words beside the whole image; MPMA rebuilds an image alone, and hidden words beside what is left of it.

    Args:
        subject: The model and the pairs.
        mask_ratios: Which fractions of the patches are hidden.
        has_texts: Whether words are hidden, too, and what is predicted for them stands above each row.

    Raises:
        UserError: The model rebuilds no images or predicts no words, or a ratio leaves no patch visible or none hidden.
    """
    model, batch, names = subject.model, subject.batch, set(subject.model.config.objectives)
    if not names & IMAGE_OBJECTIVES:
        raise UserError(
            f"{subject.checkpoint} has no decoder of images (its objectives are {', '.join(sorted(names))}); take a "
            "checkpoint of a pre-training with mim (M3AE) or image_reconstruction (MPMA)."
        )
    if has_texts and not names & WORD_OBJECTIVES:
        raise UserError(
            f"{subject.checkpoint} predicts no hidden words (its objectives are {', '.join(sorted(names))}); leave out "
            "--texts, or take a checkpoint of a pre-training with mlm (M3AE) or report_reconstruction (MPMA)."
        )
    num_patches = batch.patch_noise_BN.shape[1]
    for ratio in mask_ratios:
        if not (0 < ratio < 1 and 0 < num_kept_patches(num_patches, ratio) < num_patches):
            raise UserError(f"A mask ratio must hide some of the {num_patches} patches and not all, got {ratio:g}.")
    hides_both = model.config.kind == "mpma" and model.config.masking == "paired"
    tiles: list[list[tuple[str, Tensor]]] = [[("original\n", image_CHW)] for image_CHW in subject.images()]
    lines: list[list[str]] = [[subject.caption(pair)] for pair in range(len(batch))]
    for number, ratio in enumerate(mask_ratios):
        words_B = None
        with _hiding(model, ratio):
            pred_BNP, is_hidden_BN = rebuild(model, batch)
            if has_texts and (hides_both or number == 0):
                words_B = hidden_words(batch, model.mlm_logits(batch).argmax(-1), subject.tokenizer, len(batch))
        mean, std = (statistic.flatten().tolist() for statistic in normalization(subject.data.val_transform))
        _, masked_BCHW, rebuilt_BCHW = rebuilt_images(model.config, batch, pred_BNP, is_hidden_BN, mean, std)
        for pair, of_pair in enumerate(tiles):
            seen = f"sees {num_kept_patches(num_patches, ratio)} of {num_patches}"
            loss = _loss_of_pair(model.config, batch, pred_BNP, is_hidden_BN, pair)
            of_pair.append((f"{ratio:.0%} hidden\n{seen}", masked_BCHW[pair]))
            of_pair.append((f"rebuilt\nloss {loss:.3f}", rebuilt_BCHW[pair]))
            if words_B is not None:
                beside = f"{ratio:.0%} of the patches hidden" if hides_both else "beside the whole image"
                lines[pair].append(f"hidden words, {beside}: {'; '.join(words_B[pair]) or 'none'}")
    rows = [TileRow("\n".join(of_pair), row) for of_pair, row in zip(lines, tiles, strict=True)]
    return tile_grid(rows, max_lines=None)


def rebuild(model: Model, batch: PretrainBatch) -> tuple[Tensor, Tensor]:
    """Returns predicted pixels, at least of the hidden patches, (B, N, P), and which are hidden, (B, N)."""
    if model.config.kind == "m3ae":
        return model.mim(batch)
    pred_BUP, hidden_BU = model(batch, only=("image_reconstruction",))["image_reconstruction"]
    is_hidden_BN = torch.zeros_like(batch.patch_noise_BN, dtype=torch.bool).scatter_(1, hidden_BU, True)
    pred_BNP = pred_BUP.new_zeros(*is_hidden_BN.shape, pred_BUP.shape[-1])
    return pred_BNP.scatter_(1, hidden_BU[..., None].expand_as(pred_BUP), pred_BUP), is_hidden_BN


def rebuilt_images(
    config: ModelConfig,
    batch: PretrainBatch,
    pred_BNP: Tensor,
    is_hidden_BN: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns originals, masked inputs and reconstructions, (B, 3, H, W) in [0, 1].

    Args:
        config: The model's configuration.
        batch: What it saw.
        pred_BNP: What ``rebuild`` gave.
        is_hidden_BN: Likewise.
        mean: Mean of each channel of the normalisation.
        std: Standard deviation of each channel of the normalisation.
    """
    return reconstruct(
        pred_BNP,
        batch.image_BCHW,
        is_hidden_BN,
        patch_size_px=patch_size_px(config),
        normalize_target=_section(config).normalize_target,
        mean=mean,
        std=std,
    )


def hidden_words(
    batch: PretrainBatch, predicted_M: Tensor, tokenizer: PreTrainedTokenizerFast, num_pairs: int
) -> list[list[str]]:
    """Returns for each of the first texts its hidden tokens in words: "true -> predicted"."""
    words_B: list[list[str]] = [[] for _ in range(len(batch))]
    pairs = batch.masked_rows_M // batch.mlm_labels_BT.shape[1]
    for pair, *ids in zip(pairs.tolist(), batch.masked_labels_M.tolist(), predicted_M.tolist(), strict=True):
        words_B[pair].append(" -> ".join(tokenizer.decode([token_id]).strip() for token_id in ids))
    return words_B[:num_pairs]


def patch_size_px(config: ModelConfig) -> int:
    """Returns the height and width of a patch in a batch's images."""
    return config.vision.patch_size_px * (config.image.target_scale if config.kind == "mpma" else 1)


def _section(config: ModelConfig) -> MIMConfig | ImageReconstructionConfig:
    """Returns how images are rebuilt."""
    return config.mim if config.kind == "m3ae" else config.image


@contextmanager
def _hiding(model: Model, patch_frac: float) -> Iterator[None]:
    """Has the model hide another fraction of the patches, on which no weight depends."""
    config = model.config
    section = dataclasses.replace(_section(config), patch_frac=patch_frac)
    model.config = dataclasses.replace(config, **{"mim" if config.kind == "m3ae" else "image": section})
    try:
        yield
    finally:
        model.config = config


def _loss_of_pair(
    config: ModelConfig, batch: PretrainBatch, pred_BNP: Tensor, is_hidden_BN: Tensor, pair: int
) -> float:
    """Returns the mean square error over the hidden patches of one image, in the space of the targets."""
    one = slice(pair, pair + 1)
    options = {"patch_size_px": patch_size_px(config), "normalize_target": _section(config).normalize_target}
    return float(masked_pixel_loss(pred_BNP[one], batch.image_BCHW[one], is_hidden_BN[one], **options))
