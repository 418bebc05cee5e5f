"""Pictures of what a model does: reconstructions of masked images, with the caption and the predicted words."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["Reconstruction", "patchify", "reconstruct", "reconstruction_grid", "unpatchify"]

GREY = 0.5  # what a hidden patch looks like in the masked input
CAPTION_WIDTH_PX = 420


class Reconstruction(NamedTuple):
    """One row of the picture; images (3, H, W) float in [0, 1].

    Args:
        original: The image.
        masked: The image with its hidden patches in grey.
        rebuilt: The visible patches as they are, the hidden ones as predicted.
        caption: Lines of text beside the images.
    """

    original: Tensor
    masked: Tensor
    rebuilt: Tensor
    caption: Sequence[str]


def patchify(image_BCHW: Tensor, patch_size_px: int) -> Tensor:
    """Cuts images into patches (B, N, P), row by row; within a patch in (row, column, channel) order."""
    batch, channels, height, width = image_BCHW.shape
    p = patch_size_px
    patches = image_BCHW.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(batch, (height // p) * (width // p), p * p * channels)


def unpatchify(patches_BNP: Tensor, patch_size_px: int) -> Tensor:
    """Puts the patches of square images together again: the inverse of ``patchify``, (B, 3, H, W)."""
    batch, num_patches, _ = patches_BNP.shape
    p, grid = patch_size_px, round(num_patches**0.5)
    patches = patches_BNP.reshape(batch, grid, grid, p, p, 3).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(batch, 3, grid * p, grid * p)


def reconstruct(
    pred_BNP: Tensor,
    image_BCHW: Tensor,
    is_hidden_BN: Tensor,
    *,
    patch_size_px: int,
    normalize_target: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Turns predictions back into pictures.

    A normalised prediction says nothing of a patch's mean and contrast, so these are taken from the true patch: the
    picture shows the predicted structure, which is what the loss measures.

    Args:
        pred_BNP: Predicted pixels, normalised per patch if ``normalize_target``.
        image_BCHW: The images as the model saw them.
        is_hidden_BN: True where a patch was hidden.
        patch_size_px: Height and width of a patch.
        normalize_target: Whether the predictions are normalised per patch.
        mean: Mean of each channel that was subtracted from the images in [0, 1].
        std: Standard deviation of each channel that they were divided by.

    Returns:
        Originals, masked inputs and reconstructions, (B, 3, H, W) float32 in [0, 1].
    """
    patches_BNP = patchify(image_BCHW.float(), patch_size_px)
    rebuilt_BNP = pred_BNP.float()
    if normalize_target:
        variance, centre = torch.var_mean(patches_BNP, dim=-1, keepdim=True)
        rebuilt_BNP = rebuilt_BNP * (variance + 1e-6).sqrt() + centre
    rebuilt_BNP = rebuilt_BNP.where(is_hidden_BN[..., None], patches_BNP)
    mean_C11, std_C11 = (image_BCHW.new_tensor(values).float()[:, None, None] for values in (mean, std))

    def to_unit_range(image: Tensor) -> Tensor:
        return (image * std_C11 + mean_C11).clamp(0, 1)

    original = to_unit_range(image_BCHW.float())
    is_hidden_BCHW = unpatchify(is_hidden_BN[..., None].expand_as(patches_BNP), patch_size_px)
    return original, original.masked_fill(is_hidden_BCHW, GREY), to_unit_range(unpatchify(rebuilt_BNP, patch_size_px))


def reconstruction_grid(rows: Sequence[Reconstruction], min_tile_px: int = 144) -> Image.Image:
    """Draws one line per image: original, masked input, reconstruction, and the caption.

    Args:
        rows: What to draw.
        min_tile_px: Smaller images are enlarged by a whole factor to at least this size.
    """
    gap, header, font = 6, 20, ImageFont.load_default(size=12)
    _, height, width = rows[0].original.shape
    scale = max(1, -(-min_tile_px // min(height, width)))
    tile = (width * scale, height * scale)
    captions = ["\n".join(part for text in row.caption for part in textwrap.wrap(text, 64) or [""]) for row in rows]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    heights = [
        gap + max(tile[1], int(measure.multiline_textbbox((0, 0), caption, font=font)[3])) for caption in captions
    ]
    text_left = 3 * (tile[0] + gap) + gap
    sheet = Image.new("RGB", (text_left + CAPTION_WIDTH_PX, header + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("original", "masked input", "reconstruction")):
        draw.text((column * (tile[0] + gap), 2), title, fill="black", font=font)
    top = header
    for row, caption, row_height in zip(rows, captions, heights, strict=True):
        for column, image in enumerate((row.original, row.masked, row.rebuilt)):
            pixels = (image.cpu().permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            enlarged = Image.fromarray(pixels).resize(tile, Image.Resampling.NEAREST)
            sheet.paste(enlarged, (column * (tile[0] + gap), top))
        draw.multiline_text((text_left, top), caption, fill="black", font=font)
        top += row_height
    return sheet
