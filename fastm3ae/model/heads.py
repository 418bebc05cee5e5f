"""What stands behind the fusion: poolers, the decoder of masked images, and the heads.

Source: official files m3ae/modules/prediction_heads.py, position_embeddings.py and m3ae_module.py.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import QuickGELU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fastm3ae.config import ImageReconstructionConfig, MIMConfig
from fastm3ae.kernels import masked_token_loss, restore_patches
from fastm3ae.model.packed import call

__all__ = [
    "HEADS",
    "AnswerHead",
    "MIMDecoder",
    "MIMOutputs",
    "MLMHead",
    "MLMOutputs",
    "Pooler",
    "init_weights",
    "rows_of_block",
    "sincos_positions",
]

# Parameters of these names belong to one objective; all others are shared. Heads that M3AE and MPMA both have carry
# the same name.
HEADS = ("mlm_head.", "mim_decoder.", "itm_head.", "vqa_head.", "classification_head.", "retrieval_head.",
         "global_head.", "local_head.", "image_classification_head.", "segmentation_head.")  # fmt: skip


class Pooler(nn.Module):
    """tanh(W x_0 + b) of the first token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        """Returns (B, D)."""
        return torch.tanh(self.dense(tokens_BLD[:, 0]))


class MLMOutputs(NamedTuple):
    """What masked language modelling gives.

    Args:
        loss: Mean cross entropy at the masked tokens, ().
        num_correct: At how many of them the true token has the largest logit, () int64.
    """

    loss: Tensor
    num_correct: Tensor


class MLMHead(nn.Module):
    """Logits over the vocabulary: W_v LN(GELU(W x + b)) + b_v; W_v is not tied to the embeddings."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder = nn.Linear(width, vocab_size)

    def forward(self, tokens_MD: Tensor) -> Tensor:
        """Returns logits (M, V) of any number of tokens (M, D)."""
        return self.decoder(self.transform(tokens_MD))

    def transform(self, tokens_MD: Tensor) -> Tensor:
        """Returns what the product to the logits reads: (M, D)."""
        return self.norm(F.gelu(self.dense(tokens_MD)))

    def loss(self, tokens_MD: Tensor, labels_M: Tensor) -> MLMOutputs:
        """Returns the cross entropy of the logits, which are never there as a whole."""
        decoder = self.decoder
        return MLMOutputs(*masked_token_loss(self.transform(tokens_MD), decoder.weight, decoder.bias, labels_M))


class AnswerHead(nn.Sequential):
    """W_2 GELU(LN(W_1 x + b_1)) + b_2: the head of visual question answering and of classification."""

    def __init__(self, width: int, num_labels: int) -> None:
        super().__init__(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, num_labels))


class MIMOutputs(NamedTuple):
    """What masked image modelling gives.

    Args:
        pred: Predicted pixels of all patches (B, N, P), or of the hidden ones alone (B, U, P).
        hidden: (B, N) bool, True where a patch was hidden from the encoder, or (B, U) int64, the hidden patches.
    """

    pred: Tensor
    hidden: Tensor


class MIMDecoder(nn.Module):
    """Rebuilds the pixels of all patches from the features of the visible ones.

    Visible features and a learned mask token are put back into image order, get fixed 2-D sine-cosine positions, and
    pass the blocks of a ViT, a norm and a product to pixels.

    Args:
        config: The decoder's sizes.
        input_width: Width of the features.
        num_patches: N.
        patch_size_px: Height and width of a predicted patch.
        act_layer: The blocks' activation; the default is that of CLIP, which M3AE takes.

    Source: M3AE, section 2.2; MIMHead in m3ae/modules/prediction_heads.py.
    """

    def __init__(
        self,
        config: MIMConfig | ImageReconstructionConfig,
        input_width: int,
        num_patches: int,
        patch_size_px: int,
        act_layer: type[nn.Module] = QuickGELU,
    ) -> None:
        super().__init__()
        width = config.decoder_width
        self.embed = nn.Linear(input_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = torch.from_numpy(sincos_positions(width, round(num_patches**0.5))).float()
        self.register_buffer("positions", positions.unsqueeze(0), persistent=False)
        norm = partial(nn.LayerNorm, eps=1e-5)
        self.blocks = nn.ModuleList(
            Block(width, config.decoder_num_heads, qkv_bias=True, act_layer=act_layer, norm_layer=norm)
            for _ in range(config.decoder_num_layers)
        )
        self.norm = norm(width)
        self.pixels = nn.Linear(width, 3 * patch_size_px**2)

    def forward(self, visible_BLD: Tensor, restore_BN: Tensor, hidden_BU: Tensor | None = None) -> Tensor:
        """Returns predicted pixels in (row, column, channel) order within a patch: (B, N, P), or (B, U, P).

        Args:
            visible_BLD: Features of CLS and the K visible patches, in the order in which they were kept.
            restore_BN: int64; for each patch its place in "kept patches, then hidden patches".
            hidden_BU: int64 indices of the patches whose pixels are wanted; None: all, in image order.
        """
        x_BLD = restore_patches(self.embed(visible_BLD), restore_BN, self.mask_token[0, 0], self.positions[0])
        *blocks, last = self.blocks
        for block in blocks:
            x_BLD = block(x_BLD)
        x_BLD = last(x_BLD)[:, 1:] if hidden_BU is None else call(rows_of_block, last, x_BLD, hidden_BU + 1)
        return self.pixels(self.norm(x_BLD))


def rows_of_block(block: Block, x_BLD: Tensor, rows_BU: Tensor) -> Tensor:
    """Returns the rows (B, U, D) of what a block makes of x: the others are only keys and values."""
    attention, width = block.attn, x_BLD.shape[-1]

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    index_BUD = rows_BU[..., None].expand(-1, -1, width)
    normed_BLD = block.norm1(x_BLD)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    q_BUD = F.linear(normed_BLD.gather(1, index_BUD), weight[:width], bias[:width])
    k_BLD, v_BLD = F.linear(normed_BLD, weight[width:], bias[width:]).chunk(2, dim=-1)
    context_BHUd = F.scaled_dot_product_attention(heads(q_BUD), heads(k_BLD), heads(v_BLD))
    x_BUD = x_BLD.gather(1, index_BUD) + attention.proj(context_BHUd.transpose(1, 2).flatten(2))
    return x_BUD + block.mlp(block.norm2(x_BUD))


def init_weights(module: nn.Module, std: float) -> None:
    """Starts products and embeddings from N(0, std^2), and biases from 0.

    Source: init_weights in m3ae/modules/m3ae_utils.py.
    """
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def sincos_positions(width: int, grid: int) -> np.ndarray:
    """Fixed 2-D positions: half of the width codes the column, half the row, as sines and cosines of w_i * position.

    w_i = 10000^(-i / (width / 4)), i = 0 ... width / 4 - 1.

    Returns:
        (1 + grid^2, width) float64; the first row, of CLS, is zero.

    Source: MAE (He et al. 2022); m3ae/modules/position_embeddings.py.
    """
    frequencies = 10000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width / 4))
    angles = np.outer(np.arange(grid, dtype=np.float64), frequencies)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    patches = np.concatenate([np.tile(axis, (grid, 1)), np.repeat(axis, grid, axis=0)], axis=1)
    return np.concatenate([np.zeros((1, width)), patches])
