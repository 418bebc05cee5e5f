"""The vision tower: timm's own modules, so that its weights load from and go back to plain timm.

The passes here call the tower's submodules (patch embedding, blocks, norms), because masking happens between them.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import QuickGELU
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastm3ae.config import VisionConfig
from fastm3ae.kernels import gather_patches

__all__ = [
    "build_vision",
    "clip_blocks",
    "clip_front",
    "encode_pixels",
    "num_image_tokens",
    "resize_bias_tables",
    "resize_positions",
    "timm_model",
]


def build_vision(config: VisionConfig) -> VisionTransformer | SwinTransformer:
    """Builds the tower with random weights.

    A "vit" is what timm's ``vit_base_patch16_224`` is, at other sizes.

    Source of the others: m3ae/modules/vision_encoders/clip_model.py (pre-norm ViT, QuickGELU, eps 1e-5, heads of width
    64, norm on all tokens, no projection) and swin_transformer.py (windows of image size / 32, no classifier).
    """
    _, sizes = timm_model(config)
    if config.kind == "swin":
        return SwinTransformer(num_classes=0, global_pool="", drop_path_rate=config.swin_drop_path_frac, **sizes)
    vit = partial(VisionTransformer, num_classes=0, global_pool="", **sizes)
    if config.kind == "vit":
        return vit()
    return vit(pre_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-5), act_layer=QuickGELU)


def timm_model(config: VisionConfig) -> tuple[str, dict[str, Any]]:
    """Returns which of timm's models the tower is, and its sizes, as arguments of ``timm.create_model``."""
    sizes = {"img_size": config.image_size_px, "patch_size": config.patch_size_px, "embed_dim": config.width}
    if config.kind == "swin":
        window_size = config.image_size_px // 32
        stages = {"depths": config.swin_num_blocks, "num_heads": config.swin_num_heads, "window_size": window_size}
        return "swin_base_patch4_window7_224", sizes | stages
    name = "vit_base_patch16_224" if config.kind == "vit" else "vit_base_patch16_clip_quickgelu_224"
    return name, sizes | {"depth": config.num_blocks, "num_heads": config.width // 64}


def clip_front(vit: VisionTransformer, image_BCHW: Tensor, keep_BK: Tensor | None = None) -> Tensor:
    """Embeds patches, adds positions, keeps the visible patches behind CLS, and normalises: the input of the blocks.

    Args:
        vit: The CLIP ViT.
        image_BCHW: Normalised pixels.
        keep_BK: int64 indices of the visible patches, in the order in which the blocks shall see them; None: all.

    Returns:
        Tokens (B, 1 + K or 1 + N, D), CLS first.
    """
    x_BND = vit.patch_embed(image_BCHW)
    if keep_BK is not None:
        return vit.norm_pre(gather_patches(x_BND, keep_BK, vit.pos_embed[0], vit.cls_token[0, 0]))
    cls_B1D = vit.cls_token.expand(x_BND.shape[0], -1, -1)  # len() would fix the size in a graph of torch.export
    return vit.norm_pre(torch.cat([cls_B1D, x_BND], dim=1) + vit.pos_embed)


def clip_blocks(vit: VisionTransformer, tokens_BLD: Tensor) -> Tensor:
    """Runs the blocks and the final norm over tokens (B, L, D)."""
    for block in vit.blocks:
        tokens_BLD = block(tokens_BLD)
    return vit.norm(tokens_BLD)


def encode_pixels(
    vision: VisionTransformer | SwinTransformer, image_BCHW: Tensor, keep_BK: Tensor | None = None
) -> Tensor:
    """Encodes an image, or only its visible patches, into tokens (B, L, D).

    A CLIP ViT gives CLS and the (visible) patches; a Swin gives the patches of its last stage and no CLS.

    Args:
        vision: The tower.
        image_BCHW: Normalised pixels.
        keep_BK: int64 indices of the visible patches; None: all. Only for a CLIP ViT.
    """
    if isinstance(vision, SwinTransformer):
        assert keep_BK is None, "the configuration refuses MIM with Swin"
        return vision.forward_features(image_BCHW).flatten(1, 2)
    return clip_blocks(vision, clip_front(vision, image_BCHW, keep_BK))


def num_image_tokens(vision: VisionTransformer | SwinTransformer) -> int:
    """Returns L, the number of tokens that a tower makes of a whole image."""
    if isinstance(vision, SwinTransformer):
        height, width = vision.patch_embed.grid_size
        factor = 2 ** (vision.num_layers - 1)  # each stage but the first halves the grid
        return (height // factor) * (width // factor)
    return 1 + vision.patch_embed.num_patches


def resize_positions(positions_ND: Tensor, num_patches: int) -> Tensor:
    """Resamples a square grid of position embeddings bicubically, keeping the CLS row.

    Args:
        positions_ND: (1 + before, D): CLS, then the patches row by row.
        num_patches: Patches after resizing.

    Returns:
        (1 + num_patches, D); the input itself when the size is the same.

    Source: adapt_position_encoding in m3ae/modules/vision_encoders/clip_model.py (align_corners false).
    """
    before, after = round((len(positions_ND) - 1) ** 0.5), round(num_patches**0.5)
    if before == after:
        return positions_ND
    grid = positions_ND[1:].reshape(1, before, before, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=(after, after), mode="bicubic").to(positions_ND.dtype)
    return torch.cat([positions_ND[:1], grid.permute(0, 2, 3, 1).reshape(num_patches, -1)])


def resize_bias_tables(state: dict[str, Tensor], window_px: dict[str, int]) -> dict[str, Tensor]:
    """Resamples Swin's relative position bias tables bicubically to other window sizes.

    Args:
        state: A state dict; tables are its keys that end in "relative_position_bias_table", ((2w - 1)^2, H).
        window_px: Window size w, in patches, that each table shall have afterwards.

    Source: swin_adapt_position_encoding in m3ae/modules/vision_encoders/swin_helpers.py.
    Deviation: the original assumes that the checkpoint was made at 384 px; here its size is read from the table.
    """
    resized = dict(state)
    for key, window in window_px.items():
        table, after = state[key], 2 * window - 1
        before = round(len(table) ** 0.5)
        if before != after:
            grid = table.T.reshape(1, -1, before, before).float()
            grid = F.interpolate(grid, size=(after, after), mode="bicubic").to(table.dtype)
            resized[key] = grid.reshape(-1, after * after).T.contiguous()
    return resized
