"""Co-attention fusion: two stacks of layers that read each other's previous layer.

Per layer and stream, post-norm: x = LN(x + SelfAttention(x)); x = LN(x + CrossAttention(x, other)); x = LN(x + FFN(x)).
Both streams read the *previous* layer's text and image, so they are parallel, not sequential.

Source: M3AE, section 2.1; official files m3ae/modules/language_encoders/bert_model.py (BertCrossLayer) and
m3ae_module.py (infer).
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastm3ae.config import FusionConfig

__all__ = ["CoAttentionFusion", "CoAttentionLayer", "FusionStates"]


class FusionStates(NamedTuple):
    """The features entering fusion layer i, at index i; the last entry is what the last layer gives."""

    text: list[Tensor]
    """(B, T, D) each."""
    image: list[Tensor]
    """(B, L, D) each."""


class CoAttentionLayer(nn.Module):
    """Self-attention, cross-attention to the other modality and a feed-forward network, each with a post-norm.

    Queries, keys and values are one product where they read the same tokens (the original keeps three).
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.dropout_frac = config.dropout_frac
        self.self_qkv = nn.Linear(width, 3 * width)
        self.self_out = nn.Linear(width, width)
        self.self_norm = nn.LayerNorm(width, eps=1e-12)
        self.cross_q = nn.Linear(width, width)
        self.cross_kv = nn.Linear(width, 2 * width)
        self.cross_out = nn.Linear(width, width)
        self.cross_norm = nn.LayerNorm(width, eps=1e-12)
        self.mlp_in = nn.Linear(width, config.mlp_ratio * width)
        self.mlp_out = nn.Linear(config.mlp_ratio * width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-12)

    def forward(
        self, x_BQD: Tensor, other_BSD: Tensor, is_padding_BQ: Tensor | None, other_is_padding_BS: Tensor | None
    ) -> Tensor:
        """Returns the next features of one stream.

        Args:
            x_BQD: This stream's tokens.
            other_BSD: The other stream's tokens.
            is_padding_BQ: True at this stream's padding; None: there is none.
            other_is_padding_BS: The same for the other stream.
        """
        x_BQD = self.add_self(x_BQD, self._attend(*self.self_qkv(x_BQD).chunk(3, dim=-1), is_padding_BQ))
        q_BQD, (k_BSD, v_BSD) = self.cross_q(x_BQD), self.cross_kv(other_BSD).chunk(2, dim=-1)
        return self.add_mlp(self.add_cross(x_BQD, self._attend(q_BQD, k_BSD, v_BSD, other_is_padding_BS)))

    @property
    def active_dropout_frac(self) -> float:
        """Which fraction of the attention's weights is dropped now: none in evaluation."""
        return self.dropout_frac if self.training else 0.0

    def add_self(self, x: Tensor, context: Tensor) -> Tensor:
        """Adds what self-attention gathered to the tokens (..., D), and normalises."""
        return self.self_norm(x + self._drop(self.self_out(context)))

    def add_cross(self, x: Tensor, context: Tensor) -> Tensor:
        """Adds what cross-attention gathered to the tokens (..., D), and normalises."""
        return self.cross_norm(x + self._drop(self.cross_out(context)))

    def add_mlp(self, x: Tensor) -> Tensor:
        """Adds the feed-forward network's part to the tokens (..., D), and normalises."""
        return self.mlp_norm(x + self._drop(self.mlp_out(F.gelu(self.mlp_in(x)))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout_frac, self.training)

    def _attend(self, q_BQD: Tensor, k_BSD: Tensor, v_BSD: Tensor, is_padding_BS: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q_BQD, k_BSD, v_BSD))
        context_BHQd = F.scaled_dot_product_attention(
            q, k, v,
            # Hidden keys weigh exactly 0, as they do with the original's -10000, whose exponential underflows.
            attn_mask=None if is_padding_BS is None else ~is_padding_BS[:, None, None, :],
            dropout_p=self.active_dropout_frac,
        )  # fmt: skip
        return context_BHQd.transpose(1, 2).flatten(2)


class CoAttentionFusion(nn.Module):
    """A stack of co-attention layers per modality."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.text_layers = nn.ModuleList(CoAttentionLayer(config) for _ in range(config.num_layers))
        self.image_layers = nn.ModuleList(CoAttentionLayer(config) for _ in range(config.num_layers))

    def forward(
        self, text_BTD: Tensor, image_BLD: Tensor, is_padding_BT: Tensor, num_layers: int | None = None
    ) -> FusionStates:
        """Fuses text and image features.

        Args:
            text_BTD: Text features, with the modality embedding added.
            image_BLD: Image features, with the modality embedding added; no padding.
            is_padding_BT: True at the text's padding.
            num_layers: Run only the first so many layers; None: all.
        """
        states = FusionStates([text_BTD], [image_BLD])
        for text_layer, image_layer in list(zip(self.text_layers, self.image_layers, strict=True))[:num_layers]:
            text_BTD, image_BLD = states.text[-1], states.image[-1]
            states.text.append(text_layer(text_BTD, image_BLD, is_padding_BT, None))
            states.image.append(image_layer(image_BLD, text_BTD, None, is_padding_BT))
        return states
