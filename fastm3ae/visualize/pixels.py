"""Pictures as tensors: images cut into patches and put together, rebuilt, greyed out, coloured and outlined."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "GREY",
    "HEAT",
    "MAX_HEAT_FRAC",
    "draw_outline",
    "grey_out",
    "lay_over",
    "patchify",
    "reconstruct",
    "to_unit_range",
    "unpatchify",
]

GREY = 0.5  # what a hidden patch looks like in the masked input
HEAT = (1.0, 0.15, 0.0)  # the colour of attention
MAX_HEAT_FRAC = 0.7  # how much of it the patch gets that is attended to most


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
    original, rebuilt = (
        to_unit_range(image, mean, std) for image in (image_BCHW.float(), unpatchify(rebuilt_BNP, patch_size_px))
    )
    return original, grey_out(original, is_hidden_BN, patch_size_px), rebuilt


def to_unit_range(image_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Takes the normalisation of the channels back, and cuts to [0, 1]."""
    mean_C11, std_C11 = (image_BCHW.new_tensor(values)[:, None, None] for values in (mean, std))
    return (image_BCHW * std_C11 + mean_C11).clamp(0, 1)


def grey_out(image_BCHW: Tensor, is_hidden_BN: Tensor, patch_size_px: int) -> Tensor:
    """Returns images in which the hidden patches are grey."""
    is_hidden_BNP = is_hidden_BN[..., None].expand(-1, -1, 3 * patch_size_px**2)
    return image_BCHW.masked_fill(unpatchify(is_hidden_BNP, patch_size_px), GREY)


def lay_over(image_BCHW: Tensor, weights_BN: Tensor, patch_size_px: int) -> Tensor:
    """Colours each patch by its weight relative to the largest one of its image; a patch of weight 0 stays as it is.

    Args:
        image_BCHW: Images in [0, 1].
        weights_BN: Weights of their patches, none negative.
        patch_size_px: Height and width of a patch.
    """
    relative_BN = weights_BN / weights_BN.amax(dim=1, keepdim=True).clamp_min(torch.finfo(weights_BN.dtype).tiny)
    share_BNP = (MAX_HEAT_FRAC * relative_BN)[..., None].expand(-1, -1, 3 * patch_size_px**2)
    heat_311 = image_BCHW.new_tensor(HEAT)[:, None, None]
    return image_BCHW.lerp(heat_311.expand_as(image_BCHW), unpatchify(share_BNP, patch_size_px).to(image_BCHW.dtype))


def draw_outline(image_CHW: Tensor, is_inside_HW: Tensor, colour: Sequence[float]) -> Tensor:
    """Colours the pixels of a region that have a neighbour outside of it, or beside the image.

    Args:
        image_CHW: An image in [0, 1].
        is_inside_HW: True in the region.
        colour: Red, green and blue, in [0, 1].
    """
    is_outside_HW = F.pad(~is_inside_HW, (1, 1, 1, 1), value=True)
    near_outside_HW = F.max_pool2d(is_outside_HW[None].float(), kernel_size=3, stride=1)[0] > 0
    colour_C11 = image_CHW.new_tensor(colour)[:, None, None]
    return torch.where(is_inside_HW & near_outside_HW, colour_C11, image_CHW)
