"""What the original computes in a fine-tuning step, in eager PyTorch with our model's parameters: the yardstick.

One forward pass of ``original_step``: texts padded to the configured length, all fusion layers for all tokens. For
retrieval each image is encoded again for each of its texts.

Source: ``compute_vqa``, ``compute_cls`` and ``compute_irtr`` in the original's modules/objectives.py.
"""

import dataclasses

import torch
import torch.nn.functional as F
from original_step import infer, separate
from torch import Tensor

from fastm3ae import objectives
from fastm3ae.data.batch import ClassificationBatch, ImageTextBatch, RetrievalBatch, VqaBatch
from fastm3ae.model.m3ae import M3AE


def loss(model: M3AE, batch: ImageTextBatch) -> Tensor:
    """The loss of the model's one objective."""
    (objective,) = model.config.objectives
    return LOSSES[objective](model, batch)


def vqa(model: M3AE, batch: VqaBatch) -> Tensor:
    logits_BA = model.vqa_head(cls_features(model, batch))
    return objectives.vqa(logits_BA, batch, model.config).mean


def classification(model: M3AE, batch: ClassificationBatch) -> Tensor:
    return F.cross_entropy(model.classification_head(cls_features(model, batch)), batch.label_B)


def retrieval(model: M3AE, batch: RetrievalBatch) -> Tensor:
    ids_BRT, is_padding_BRT, _ = batch.candidates()
    num_texts = ids_BRT.shape[1]
    pairs = dataclasses.replace(
        batch,
        image_BCHW=batch.image_BCHW.repeat_interleave(num_texts, dim=0),
        text_ids_BT=ids_BRT.flatten(0, 1),
        is_padding_BT=is_padding_BRT.flatten(0, 1),
        num_tokens_B=None,
    )
    scores_BR = model.retrieval_head(cls_features(model, pairs)).view(-1, num_texts)
    return F.cross_entropy(scores_BR, torch.zeros(len(scores_BR), dtype=torch.int64, device=scores_BR.device))


LOSSES = {"vqa": vqa, "classification": classification, "retrieval": retrieval}


def cls_features(model: M3AE, batch: ImageTextBatch) -> Tensor:
    layers = [
        (text_layer, separate(text_layer), image_layer, separate(image_layer))
        for text_layer, image_layer in zip(model.fusion.text_layers, model.fusion.image_layers, strict=True)
    ]
    return infer(model, layers, batch, batch.text_ids_BT, batch.images()).cls_BE
