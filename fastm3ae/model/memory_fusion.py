"""Memory-augmented cross-modal fusion (MA-CMF): the report's tokens read the image's patches and a learned memory.

Per layer, post-norm: x = LN(x + SelfAttention(x)); x = LN(x + CrossAttention(x, patches)); x = LN(x + FFN(x)). Patches
stay as the vision tower made them. The memory has three forms:

slots: each layer's cross-attention has M learned keys M_k and values M_v beside the patches' K and V,
    softmax(Q [sqrt(d) M_k ; K]^T / sqrt(d)) [sqrt(M) M_v ; V], which no padding ever hides.
topk: before the layers, words and patches read one learned matrix, x + W_o Attention(x W_q, M W_k, M W_v), where each
    head of a token attends to its k best rows alone.
none: neither.

Source: MPMA (arXiv 2305.07920) names the module; the layers and which form is the default are our choices. slots:
Cornia et al., "Meshed-Memory Transformer" (CVPR 2020), section 3.1. topk: Chen et al., "Cross-modal Memory Networks for
Radiology Report Generation" (ACL 2021), section 2.2.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fastm3ae.config import MPMAConfig
from fastm3ae.kernels import topk_attention
from fastm3ae.model.fusion import CoAttentionLayer
from fastm3ae.model.heads import init_weights
from fastm3ae.model.packed import Run, call, co_attend
from fastm3ae.model.plan import StreamPlan
from fastm3ae.model.rows import Index, Layout, Rows, rows_of

__all__ = ["FusionPlan", "MemoryFusion", "MemorySlots", "TopKMemory"]


class MemorySlots(nn.Module):
    """M learned keys and values, scaled so that at the start they weigh as much as a token's.

    Args:
        num_slots: M.
        width: D.
        num_heads: H.

    Source: Meshed-Memory Transformer; scales and initial deviations (1 / d and 1 / M) as in its public code.
    """

    def __init__(self, num_slots: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.keys = nn.Parameter(torch.empty(num_slots, width).normal_(std=num_heads / width))
        self.values = nn.Parameter(torch.empty(num_slots, width).normal_(std=1 / num_slots))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Returns sqrt(d) M_k and sqrt(M) M_v, (M, H, d) each."""
        keys_MHd, values_MHd = (x.unflatten(-1, (self.num_heads, -1)) for x in (self.keys, self.values))
        return keys_MHd * keys_MHd.shape[-1] ** 0.5, values_MHd * len(values_MHd) ** 0.5


class TopKMemory(nn.Module):
    """One learned matrix that tokens of both modalities read: x + W_o TopKAttention(x W_q, M W_k, M W_v).

    Args:
        num_slots: M, rows of the matrix.
        num_kept: How many of them a head of a token reads.
        width: D.
        num_heads: H.

    Source: R2Gen-CMN; initial deviation 1 / D as in its public code.
    """

    def __init__(self, num_slots: int, num_kept: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_kept, self.num_heads = num_kept, num_heads
        self.matrix = nn.Parameter(torch.empty(num_slots, width).normal_(std=1 / width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_SD: Tensor) -> Tensor:
        """Returns the tokens with what they read added: (S, D)."""
        k_MHd, v_MHd = self.kv(self.matrix).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        q_SHd = self.q(x_SD).unflatten(-1, (self.num_heads, -1))
        return x_SD + self.out(topk_attention(q_SHd, k_MHd, v_MHd, self.num_kept).flatten(1))


class FusionPlan:
    """What each layer computes of a batch's reports: all of it, and in the last layer the tokens that are read alone.

    Attributes:
        layers: The layers, the first ones first.

    Args:
        texts: The reports.
        images: The patches of each report's image.
        read: Rows of the reports that are read behind the last layer.
        num_read_B: How many of them each report has.
        num_layers: Layers of the fusion.
    """

    def __init__(
        self, texts: Layout, images: Layout, read: np.ndarray, num_read_B: np.ndarray, num_layers: int
    ) -> None:
        num_rows = texts.num_tokens
        common = {
            "keys": texts,
            "key_rows": Rows(0, num_rows),
            "cross_keys": images,
            "cross_key_rows": Rows(0, images.num_tokens),
            "is_read": True,
        }
        whole = StreamPlan(queries=texts, num_whole=num_rows, tail=Rows(), is_whole=True, **common)
        last = StreamPlan(queries=Layout(num_read_B), num_whole=0, tail=rows_of(read), is_whole=False, **common)
        self.layers = [whole] * (num_layers - 1) + [last]

    def indices(self) -> list[Index]:
        """Returns what has to be sent to the device."""
        last = self.layers[-1]
        indices = [last.keys.ends, last.cross_keys.ends, last.queries.ends, last.tail.index]
        return [index for index in indices if index is not None]


class MemoryFusion(nn.Module):
    """The layers and the memory.

    Args:
        config: The model's configuration, of which it takes ``fusion`` and the memory's form and sizes.
    """

    def __init__(self, config: MPMAConfig) -> None:
        super().__init__()
        width, num_heads, num_layers = config.fusion.width, config.fusion.num_heads, config.fusion.num_layers
        self.layers = nn.ModuleList(CoAttentionLayer(config.fusion) for _ in range(num_layers))
        self.slots = self.topk = None
        if config.memory == "slots":
            self.slots = nn.ModuleList(MemorySlots(config.num_slots, width, num_heads) for _ in range(num_layers))
        elif config.memory == "topk":
            self.topk = TopKMemory(config.num_topk_slots, config.num_topk_kept, width, num_heads)
        self.apply(partial(init_weights, std=config.init_std))

    def forward(self, text_SD: Tensor, patches_SD: Tensor, layers: Sequence[StreamPlan], run: Run = call) -> Tensor:
        """Returns the last features of the reports' tokens that are read: (Q, D).

        Args:
            text_SD: Tokens of the reports.
            patches_SD: Patches of their images.
            layers: What each layer computes.
            run: Runs a layer.
        """
        if self.topk is not None:
            text_SD, patches_SD = self.topk(text_SD), self.topk(patches_SD)
        for number, (layer, plan) in enumerate(zip(self.layers, layers, strict=True)):
            memory = None if self.slots is None else self.slots[number]()
            text_SD = run(co_attend, layer, text_SD, patches_SD, plan, memory)
        return text_SD
