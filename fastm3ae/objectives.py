"""The losses: pure functions of a model's outputs and the batch.

Each gives the mean loss and its metrics as sums. ``num_averaged`` says, before anything is computed and without asking
the device, over how many masked tokens, hidden patches or samples a batch's mean is taken; with it the means of
several batches or processes join exactly. Source: official file m3ae/modules/objectives.py.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastm3ae.config import ImageConfig, M3AEConfig, ModelConfig, MPMAConfig
from fastm3ae.data.batch import ClassificationBatch, LabelBatch, MaskBatch, PretrainBatch, RetrievalBatch, VqaBatch
from fastm3ae.kernels import masked_pixel_loss
from fastm3ae.masking import num_kept_patches
from fastm3ae.model.alignment import Gather, GlobalFeatures, alone, info_nce
from fastm3ae.model.heads import MIMOutputs, MLMOutputs

__all__ = [
    "OBJECTIVES",
    "Loss",
    "classification",
    "global_alignment",
    "image_classification",
    "image_reconstruction",
    "itm",
    "local_alignment",
    "losses",
    "mim",
    "mlm",
    "num_averaged",
    "report_reconstruction",
    "retrieval",
    "segmentation",
    "total",
    "vqa",
]


class Loss(NamedTuple):
    """One objective on one batch.

    Args:
        mean: The mean loss, a scalar with a gradient; MPMA's times its weight.
        sums: For each metric its sum, to be divided by ``num_averaged``.
    """

    mean: Tensor
    sums: dict[str, Tensor]


def num_averaged(objective: str, batch: Any, config: ModelConfig) -> int:
    """Returns over how many masked tokens, hidden patches or samples an objective's mean is taken."""
    if objective in ("mlm", "report_reconstruction"):
        return len(batch.masked_index_M)
    if objective in ("mim", "image_reconstruction"):
        num_patches = batch.patch_noise_BN.shape[1]
        patch_frac = config.mim.patch_frac if objective == "mim" else config.image.patch_frac
        return len(batch) * (num_patches - num_kept_patches(num_patches, patch_frac))
    return len(batch)


def mlm(outputs: MLMOutputs, batch: PretrainBatch, config: M3AEConfig) -> Loss:
    """Cross entropy at the masked tokens, averaged over them; 0 when there are none.

    Deviation: the original gives NaN when a batch has no masked token.
    """
    return Loss(outputs.loss, {"accuracy": outputs.num_correct})


def mim(outputs: MIMOutputs, batch: PretrainBatch, config: M3AEConfig) -> Loss:
    """Mean square error of the pixels, averaged over a patch's pixels and the batch's hidden patches."""
    loss = masked_pixel_loss(
        outputs.pred,
        batch.image_BCHW,
        outputs.hidden,
        patch_size_px=config.vision.patch_size_px,
        normalize_target=config.mim.normalize_target,
    )
    return Loss(loss, {})


def itm(logits_B2: Tensor, batch: PretrainBatch, config: M3AEConfig) -> Loss:
    """Cross entropy of "image and text belong together"."""
    return _cross_entropy(logits_B2, batch.itm_labels_B)


def vqa(logits_BA: Tensor, batch: VqaBatch, config: ModelConfig) -> Loss:
    """Binary cross entropy with the answers' scores, averaged over samples and answers, times the number of answers.

    The metric is the score of the answer with the largest logit.
    """
    # Answer ids are padded with -1, which goes to an extra column that is cut off again.
    targets = logits_BA.new_zeros(len(logits_BA), config.num_answers + 1)
    index = batch.answer_ids_BA.where(batch.answer_ids_BA >= 0, config.num_answers)
    targets = targets.scatter(1, index, batch.answer_scores_BA.to(targets.dtype))[:, : config.num_answers]
    loss = F.binary_cross_entropy_with_logits(logits_BA, targets) * config.num_answers
    score_B = targets.gather(1, logits_BA.argmax(-1, keepdim=True))
    return Loss(loss, {"score": score_B.float().sum()})


def classification(logits_BC: Tensor, batch: ClassificationBatch, config: ModelConfig) -> Loss:
    """Cross entropy of the class."""
    return _cross_entropy(logits_BC, batch.label_B)


def retrieval(scores_BR: Tensor, batch: RetrievalBatch, config: M3AEConfig) -> Loss:
    """Cross entropy of the true text, at index 0, among the false ones."""
    return _cross_entropy(scores_BR, torch.zeros(len(scores_BR), dtype=torch.int64, device=scores_BR.device))


def _cross_entropy(logits_BC: Tensor, labels_B: Tensor) -> Loss:
    return Loss(F.cross_entropy(logits_BC, labels_B), {"accuracy": (logits_BC.argmax(-1) == labels_B).sum()})


def image_reconstruction(outputs: MIMOutputs, batch: PretrainBatch, config: MPMAConfig) -> Loss:
    """Mean square error of the pixels, averaged over a patch's pixels and the batch's hidden patches."""
    loss = masked_pixel_loss(
        outputs.pred,
        batch.image_BCHW,
        outputs.hidden,
        patch_size_px=config.vision.patch_size_px * config.image.target_scale,
        normalize_target=config.image.normalize_target,
    )
    return Loss(config.loss_weights.image_reconstruction * loss, {})


def report_reconstruction(outputs: MLMOutputs, batch: PretrainBatch, config: MPMAConfig) -> Loss:
    """Cross entropy at the masked tokens, averaged over them; 0 when there are none."""
    return Loss(config.loss_weights.report_reconstruction * outputs.loss, {"accuracy": outputs.num_correct})


def global_alignment(
    features: GlobalFeatures, batch: PretrainBatch, config: MPMAConfig, gather: Gather = alone
) -> Loss:
    """Symmetric InfoNCE of images and reports among all pairs of the whole batch that ``gather`` gives.

    The metric is how often an image's own report is the nearest of them. A batch of one pair has the loss 0; what is
    configured has more, but all others may turn out to be unusable.
    """
    loss, num_correct = info_nce(features, gather)
    return Loss(config.loss_weights.global_alignment * loss, {"recall_at_1": num_correct})


def local_alignment(loss: Tensor, batch: PretrainBatch, config: MPMAConfig) -> Loss:
    """The contrast between the words and between the patches of each pair, averaged over pairs."""
    return Loss(config.loss_weights.local_alignment * loss, {})


def image_classification(logits_BC: Tensor, batch: LabelBatch, config: ImageConfig) -> Loss:
    """Binary cross entropy of each class, averaged over samples and classes; the metric is the share of right ones."""
    label_BC = batch.label_BC.to(logits_BC.dtype)
    is_right_BC = (logits_BC > 0) == (label_BC > 0)
    return Loss(
        F.binary_cross_entropy_with_logits(logits_BC, label_BC), {"accuracy": is_right_BC.float().mean(dim=1).sum()}
    )


def segmentation(logits_BHW: Tensor, batch: MaskBatch, config: ImageConfig) -> Loss:
    """Binary cross entropy of each pixel plus 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1), averaged over images.

    p are the pixels' probabilities and t their truth, 0 or 1; the sums run over an image. The metric is the same ratio
    for the pixels with p > 0.5, without the ones added, and 1 where there is nothing to find and nothing is found.

    Source: The two parts, equally weighted and image by image, are our choice. MGCA weighs a focal loss against the
    logarithm of the ratio over the whole batch (mgca/utils/segmentation_loss.py).
    """
    # In float32 under autocast, too: an image has more pixels than float16 can count.
    logits_BHW, target_BHW = logits_BHW.float(), batch.mask_BHW.float()
    both_B, sum_B = _overlap(logits_BHW.sigmoid(), target_BHW)
    loss = F.binary_cross_entropy_with_logits(logits_BHW, target_BHW) + (1 - (2 * both_B + 1) / (sum_B + 1)).mean()
    both_B, sum_B = _overlap((logits_BHW > 0).float(), target_BHW)
    return Loss(loss, {"dice": torch.where(sum_B == 0, 1.0, 2 * both_B / sum_B.clamp_min(1)).sum()})


def _overlap(p_BHW: Tensor, t_BHW: Tensor) -> tuple[Tensor, Tensor]:
    """Returns sum(p t) and sum(p) + sum(t) of each image."""
    return (p_BHW * t_BHW).sum(dim=(1, 2)), p_BHW.sum(dim=(1, 2)) + t_BHW.sum(dim=(1, 2))


OBJECTIVES: Mapping[str, Callable[[Any, Any, Any], Loss]] = {
    "mlm": mlm,
    "mim": mim,
    "itm": itm,
    "vqa": vqa,
    "classification": classification,
    "retrieval": retrieval,
    "image_reconstruction": image_reconstruction,
    "report_reconstruction": report_reconstruction,
    "global_alignment": global_alignment,
    "local_alignment": local_alignment,
    "image_classification": image_classification,
    "segmentation": segmentation,
}


def losses(outputs: Mapping[str, Any], batch: Any, config: ModelConfig, gather: Gather = alone) -> dict[str, Loss]:
    """Returns the loss of each objective that the model ran.

    Args:
        outputs: What the model gives.
        batch: What it was given: a batch, or one of several pieces of it.
        config: The model's configuration.
        gather: Where the features of the batch's other pieces come from.
    """
    functions = {**OBJECTIVES, "global_alignment": partial(global_alignment, gather=gather)}
    return {name: functions[name](output, batch, config) for name, output in outputs.items()}


def total(results: Mapping[str, Loss]) -> Tensor:
    """Returns the sum of the objectives' mean losses."""
    return torch.stack([loss.mean for loss in results.values()]).sum()
