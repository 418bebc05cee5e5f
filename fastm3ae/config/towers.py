"""The configuration of the towers: what sees images, and what reads texts."""

from dataclasses import dataclass
from typing import Literal

from fastm3ae.config.ranges import MOST_CELLS, MOST_HEADS, MOST_LAYERS, MOST_ROWS, MOST_WIDTH, check_range
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
        where, size, patch = "model.vision", self.image_size_px, self.patch_size_px
        if size <= 0 or patch <= 0 or size % patch:
            raise UserError(
                f"model.vision.image_size_px must be a multiple of model.vision.patch_size_px, got {size} and {patch}."
            )
        if self.kind != "swin" and (self.width % 64 or self.width <= 0):
            raise UserError(f"model.vision.width must be a multiple of 64 for a ViT, got {self.width}.")
        check_range(where, self, 1, MOST_WIDTH, "width")
        check_range(where, self, 1, MOST_LAYERS, "num_blocks", "swin_num_blocks")
        check_range(where, self, 1, MOST_HEADS, "swin_num_heads")
        check_range(where, self, 0, 0.99, "swin_drop_path_frac")
        if self.num_patches * self.width > MOST_CELLS:
            raise UserError(
                f"model.vision.image_size_px is too large: {self.num_patches} patches of width {self.width} are more "
                f"than {MOST_CELLS} values."
            )
        if self.kind == "swin":
            self._check_swin()

    def _check_swin(self) -> None:
        size, stages = self.image_size_px, len(self.swin_num_blocks)
        if size % 32:
            raise UserError(f"model.vision.image_size_px must be a multiple of 32 for Swin, got {size}.")
        if stages != len(self.swin_num_heads) or not stages or size // self.patch_size_px % 2 ** (stages - 1):
            raise UserError(
                "model.vision.swin_num_blocks and swin_num_heads must have an entry for each stage, and each stage but "
                f"the first halves the {size // self.patch_size_px} patches of a side; got {self.swin_num_blocks} and "
                f"{self.swin_num_heads}."
            )
        for stage, num_heads in enumerate(self.swin_num_heads):
            if self.width * 2**stage % num_heads:
                raise UserError(
                    f"model.vision.swin_num_heads must divide the width of the stage, {self.width * 2**stage}, got "
                    f"{num_heads}."
                )

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

    def __post_init__(self) -> None:
        where = "model.text"
        check_range(where, self, 1, MOST_ROWS, "vocab_size", "max_positions", "num_token_types")
        check_range(where, self, 0, (self.vocab_size or MOST_ROWS) - 1, "pad_token_id")
        check_range(where, self, 1, MOST_WIDTH, "width", "mlp_width")
        check_range(where, self, 1, MOST_LAYERS, "num_layers")
        check_range(where, self, 0, 1, "layer_norm_eps", "dropout_frac")

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest text that the position table takes."""
        return self.max_positions - (2 if self.kind == "roberta" else 0)
