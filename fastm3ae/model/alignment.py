"""Global and local alignment (GLA): which image belongs to which report, and which patches to which word.

Global: symmetric InfoNCE over all pairs of the batch, however many passes or processes it is divided among. Local:
within one pair, each word is rebuilt from the patches that it attends to, and has to be told from the pair's other
words by it; each patch likewise from the words.

Source: MPMA (arXiv 2305.07920) names the module; the forms are those of MGCA (Wang et al., "Multi-Granularity
Cross-modal Alignment", NeurIPS 2022), sections 3.2 and 3.3, without its prototypes. Deviation: no batch norm in the
heads, which would make a pair's features depend on how the batch is divided.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastm3ae.config import AlignmentConfig

__all__ = [
    "Gather",
    "GlobalFeatures",
    "GlobalHead",
    "LocalHead",
    "alone",
    "cls_attention",
    "info_nce",
    "local_alignment",
]

MIN_TEMPERATURE = 0.01  # CLIP's

Gather = Callable[[Tensor], tuple[Tensor, int]]
"""Makes of this pass's features (B, 2, E), images' and reports', those of the whole batch (A, 2, E), without gradients,
and says at which of them this pass's begin."""


def alone(features_B2E: Tensor) -> tuple[Tensor, int]:
    """A ``Gather`` for a batch that is one pass of one process."""
    return features_B2E, 0


class GlobalFeatures(NamedTuple):
    """What is compared across pairs.

    Args:
        image_BE: Features of the images, of length 1.
        report_BE: Features of the reports, of length 1.
        scale: () 1 / temperature.
    """

    image_BE: Tensor
    report_BE: Tensor
    scale: Tensor

    def stacked(self) -> Tensor:
        """Returns both, without gradients: (B, 2, E)."""
        return torch.stack([self.image_BE, self.report_BE], dim=1).detach()


def info_nce(features: GlobalFeatures, gather: Gather) -> tuple[Tensor, Tensor]:
    """Mean over this pass's pairs of (-log p(report | image) - log p(image | report)) / 2, among all of the batch.

    p is the softmax of the features' products times the scale. The value is this pass's share of the batch's loss. The
    gradient is the whole batch's, of which the passes' sum would else miss a half: what this pass's features do as
    candidates of the other pairs. So nothing has to travel back between processes, and with weights B / A the gradients
    of all passes add up to that of one pass over the batch.

    Args:
        features: Of this pass's B pairs.
        gather: Gives those of all A pairs.

    Returns:
        The loss, (); of a batch of one pair, which has nothing to be told from, 0. And for how many of this pass's
        images the own report is the nearest, () int64.

    Source: van den Oord et al. 2018; CLIP (Radford et al. 2021), figure 3.
    """
    B, device = len(features.image_BE), features.image_BE.device
    all_A2E, first = gather(features.stacked())
    image_AE, report_AE = (
        torch.cat([all_A2E[:first, side], own_BE, all_A2E[first + B :, side]])
        for side, own_BE in enumerate((features.image_BE, features.report_BE))
    )
    pair_A = torch.arange(len(image_AE), device=device)
    is_own_A = (pair_A >= first) & (pair_A < first + B)
    # The others' passes give their part of the temperature's gradient themselves.
    scale_A1 = torch.where(is_own_A, features.scale, features.scale.detach())[:, None]
    with _without_autocast(device):  # 16 bits would round a product of 14 to a multiple of 1 / 16
        logits_AA = image_AE @ report_AE.T
    losses = [F.cross_entropy(x_AA * scale_A1, pair_A, reduction="none") for x_AA in (logits_AA, logits_AA.T)]
    loss_A = (losses[0] + losses[1]) / 2
    others = loss_A.where(~is_own_A, 0).sum()
    loss = (loss_A[first : first + B].sum() + others - others.detach()) / max(1, B)
    num_correct = (logits_AA[first : first + B].argmax(dim=1) == pair_A[first : first + B]).sum()
    return loss, num_correct


def local_alignment(
    words_BWE: Tensor,
    is_absent_BW: Tensor,
    word_weights_BW: Tensor,
    patches_BKE: Tensor,
    patch_weights_BK: Tensor,
    temperature: float,
) -> Tensor:
    """Mean over pairs of the average of the words' and the patches' cross entropy.

    A word w attends to the patches, a = softmax(w . p / t), and c = normalise(sum a p) is what they say of it. Its loss
    is the average of -log p(c | w) and -log p(w | c), where p is the softmax of w . c / t over the pair's own words. A
    patch's loss is the same with words in place of patches. Losses are summed with the weights.

    Args:
        words_BWE: Features of length 1.
        is_absent_BW: True where a pair has no further word; what stands there changes nothing.
        word_weights_BW: What each word counts; a pair's sum to 1, absent ones are 0.
        patches_BKE: Features of length 1.
        patch_weights_BK: What each patch counts; a pair's sum to 1.
        temperature: t.

    Returns:
        The loss, (). A pair without a word adds 0.

    Source: MGCA, equations 4 to 7.
    """
    words_B = _self_contrast(words_BWE, patches_BKE, is_absent_BW, None, word_weights_BW, temperature)
    patches_B = _self_contrast(patches_BKE, words_BWE, None, is_absent_BW, patch_weights_BK, temperature)
    has_words_B = ~is_absent_BW.all(dim=1)
    return ((words_B + patches_B) / 2 * has_words_B).sum() / max(1, len(words_BWE))


def _self_contrast(
    x_BXE: Tensor,
    y_BYE: Tensor,
    is_absent_BX: Tensor | None,
    is_absent_BY: Tensor | None,
    weights_BX: Tensor,
    temperature: float,
) -> Tensor:
    """Returns each pair's loss of telling x apart by what y says of them: (B,)."""
    attention_BXY = _without(is_absent_BY, x_BXE @ y_BYE.mT / temperature).softmax(dim=-1)
    said_BXE = F.normalize(attention_BXY @ y_BYE, dim=-1)
    scores_BXX = x_BXE @ said_BXE.mT / temperature
    true_BX = scores_BXX.diagonal(dim1=1, dim2=2)
    losses = [_without(is_absent_BX, s).logsumexp(dim=-1) - true_BX for s in (scores_BXX, scores_BXX.mT)]
    return ((losses[0] + losses[1]) / 2 * weights_BX).sum(dim=1)


def _without(is_absent_BX: Tensor | None, scores_BYX: Tensor) -> Tensor:
    """Returns the scores such that the exponential of an absent one's is exactly 0, unless all are absent."""
    if is_absent_BX is None:
        return scores_BYX
    # A quarter, so that the losses of a pair without any stay finite until they are multiplied by 0.
    return scores_BYX.masked_fill(is_absent_BX[:, None], torch.finfo(scores_BYX.dtype).min / 4)


@torch.no_grad()
def cls_attention(q_BHd: Tensor, k_BXHd: Tensor, is_absent_BX: Tensor | None = None) -> Tensor:
    """Returns mean over heads of softmax(q . k / sqrt(d)) over the tokens that are there: (B, X), 0 at absent ones.

    Args:
        q_BHd: CLS's queries.
        k_BXHd: The tokens' keys.
        is_absent_BX: True where there is none.

    Source: MGCA weighs words and patches by their tower's last attention of CLS. Deviation: the softmax is over them
    alone, so that the weights sum to 1.
    """
    scores_BHX = torch.einsum("bhd,bxhd->bhx", q_BHd, k_BXHd).to(_sum_dtype(q_BHd)) * q_BHd.shape[-1] ** -0.5
    weights_BX = _without(is_absent_BX, scores_BHX).softmax(dim=-1).mean(dim=1)
    return weights_BX if is_absent_BX is None else weights_BX.masked_fill(is_absent_BX, 0)


class _Projection(nn.Sequential):
    """normalise(W_2 GELU(W_1 x + b_1) + b_2)."""

    def __init__(self, width: int, config: AlignmentConfig) -> None:
        super().__init__(nn.Linear(width, config.head_width), nn.GELU(), nn.Linear(config.head_width, config.width))

    def forward(self, x: Tensor) -> Tensor:
        """Returns features (..., E) of length 1, in at least float32."""
        projected = super().forward(x)
        return F.normalize(projected.to(_sum_dtype(projected)), dim=-1)


class GlobalHead(nn.Module):
    """Projects an image's and a report's feature to where they are compared.

    Args:
        image_width: Width of the vision tower.
        text_width: Width of the language tower.
        config: Sizes and temperature.
    """

    def __init__(self, image_width: int, text_width: int, config: AlignmentConfig) -> None:
        super().__init__()
        self.image = _Projection(image_width, config)
        self.report = _Projection(text_width, config)
        self.temperature = config.temperature
        if config.learn_temperature:
            # One-dimensional, because FSDP divides nothing else.
            self.log_temperature = nn.Parameter(torch.tensor([math.log(config.temperature)]))
        else:
            self.log_temperature = None

    def forward(self, image_BD: Tensor, report_BD: Tensor) -> GlobalFeatures:
        """Returns what ``info_nce`` compares."""
        image_BE, report_BE = self.image(image_BD), self.report(report_BD)
        if self.log_temperature is None:
            scale = torch.full((), 1 / self.temperature, dtype=image_BE.dtype, device=image_BE.device)
        else:
            scale = (-self.log_temperature[0]).exp().clamp(max=1 / MIN_TEMPERATURE)
        return GlobalFeatures(image_BE, report_BE, scale)


class LocalHead(nn.Module):
    """Projects words and patches to where they are compared, and compares them.

    Args:
        image_width: Width of the vision tower.
        text_width: Width of the language tower.
        config: Sizes and temperature.
    """

    def __init__(self, image_width: int, text_width: int, config: AlignmentConfig) -> None:
        super().__init__()
        self.patch = _Projection(image_width, config)
        self.word = _Projection(text_width, config)
        self.temperature = config.local_temperature

    def forward(
        self,
        words_BWD: Tensor,
        is_absent_BW: Tensor,
        word_weights_BW: Tensor,
        patches_BKD: Tensor,
        patch_weights_BK: Tensor,
    ) -> Tensor:
        """Returns the loss of ``local_alignment``, whose arguments these are, before the projection."""
        words_BWE, patches_BKE = self.word(words_BWD), self.patch(patches_BKD)
        with _without_autocast(words_BWD.device):
            return local_alignment(
                words_BWE, is_absent_BW, word_weights_BW, patches_BKE, patch_weights_BK, self.temperature
            )


def _without_autocast(device: torch.device) -> AbstractContextManager:
    # "meta", on which FLOPs are counted, has no autocast to be switched off.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
