"""The configuration of the towers: what sees images, and what reads texts."""

from dataclasses import dataclass
from typing import Literal

from fastm3ae.errors import UserError

__all__ = ["TextConfig", "VisionConfig"]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision tower: a ViT (timm's VisionTransformer) or a Swin (timm's SwinTransformer)."""

    kind: Literal["clip", "vit", "swin"] = "clip"
    """clip: CLIP ViT with pre-norm and QuickGELU. vit: plain ViT without pre-norm and with GELU, as MAE's and timm's
    vit_base_patch16_224. swin: Swin Transformer, whose patches cannot be masked (no MIM)."""
    weights: str = "random"
    """Where the tower starts: "random", a timm model name, or a file or folder of weights (timm's or OpenAI's)."""
    image_size_px: int = 288
    """Height and width of the square input image; position embeddings are resized to it."""
    patch_size_px: int = 16
    """Height and width of a patch; 4 for Swin."""
    width: int = 768
    """Width of a token; for Swin the width of the first stage. A ViT has width // 64 heads."""
    num_blocks: int = 11
    """Transformer blocks of a ViT. M3AE's original builds one block fewer than its checkpoint has: 11 of 12."""
    swin_num_blocks: tuple[int, ...] = (2, 2, 18, 2)
    """Blocks per Swin stage."""
    swin_num_heads: tuple[int, ...] = (4, 8, 16, 32)
    """Heads per Swin stage."""
    swin_drop_path_frac: float = 0.1
    """Stochastic depth of a Swin's last block."""

    def __post_init__(self) -> None:
        size, patch = self.image_size_px, self.patch_size_px
        if size <= 0 or patch <= 0 or size % patch:
            raise UserError(
                f"model.vision.image_size_px must be a multiple of model.vision.patch_size_px, got {size} and {patch}."
            )
        if self.kind != "swin" and (self.width % 64 or self.width <= 0):
            raise UserError(f"model.vision.width must be a multiple of 64 for a ViT, got {self.width}.")
        if self.kind == "swin" and size % 32:
            raise UserError(f"model.vision.image_size_px must be a multiple of 32 for Swin, got {size}.")

    @property
    def num_patches(self) -> int:
        """N, the patches of an image."""
        return (self.image_size_px // self.patch_size_px) ** 2


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The language tower: RoBERTa or BERT of transformers. Sizes are read from ``weights`` unless that is "random"."""

    kind: Literal["roberta", "bert"] = "roberta"
    """The architecture; read from ``weights`` unless that is "random"."""
    weights: str = "random"
    """Where the tower starts: "random", a hub name such as "roberta-base", or a local folder."""
    vocab_size: int | None = None
    """Entries of the vocabulary; None: the tokenizer's."""
    pad_token_id: int | None = None
    """Id of the padding token; None: the tokenizer's."""
    width: int = 768
    """Width of a token."""
    num_layers: int = 12
    """Transformer layers."""
    num_heads: int = 12
    """Attention heads."""
    mlp_width: int = 3072
    """Hidden width of the feed-forward network."""
    max_positions: int = 514
    """Rows of the position table. RoBERTa uses two more than the longest text."""
    num_token_types: int = 1
    """Rows of the token-type table: 1 for RoBERTa, 2 for BERT."""
    layer_norm_eps: float = 1e-5
    """Epsilon of the layer norms: 1e-5 for RoBERTa, 1e-12 for BERT."""
    dropout_frac: float = 0.1
    """Dropout on hidden states and attention, the towers' own (not the fusion's)."""
