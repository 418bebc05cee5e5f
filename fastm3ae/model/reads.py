"""What each objective sees, what it reads of it, and what its head makes of these rows.

A new objective is a new entry of ``OBJECTIVES`` here and of ``fastm3ae.objectives.OBJECTIVES``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from fastm3ae.config import M3AEConfig
from fastm3ae.data.batch import ImageTextBatch, PretrainBatch, RetrievalBatch
from fastm3ae.kernels import IGNORED_LABEL
from fastm3ae.masking import PatchOrder
from fastm3ae.model.plan import Images, Read, Reads, Texts

if TYPE_CHECKING:
    from fastm3ae.model.m3ae import M3AE

__all__ = ["OBJECTIVES", "Objective"]


@dataclass(frozen=True)
class Objective:
    """An objective, to the step.

    Args:
        reads: What it sees and reads of a batch.
        head: Makes its outputs of the model, the rows that it reads (under "text" and "image"), the batch and the order
            of the patches.
        fill: If the number of rows that it reads of the text differs from batch to batch: makes a batch whose head
            passes over further rows, up to this number; 0: a batch of which it reads none.
    """

    reads: Callable[[Any, M3AEConfig], Reads]
    head: Callable[[M3AE, Mapping[str, Tensor], Any, PatchOrder | None], Any]
    fill: Callable[[Any, int], Any] | None = None


def _masked_texts(batch: PretrainBatch) -> Texts:
    return Texts("masked texts", batch.mlm_ids_BT, batch.num_tokens_B, np.arange(len(batch)))


def _texts(batch: ImageTextBatch) -> Texts:
    return Texts("texts", batch.text_ids_BT, batch.num_tokens_B, np.arange(len(batch)))


def _mlm_reads(batch: PretrainBatch, config: M3AEConfig) -> Reads:
    """The last features of the masked tokens."""
    num_tokens = batch.text_ids_BT.shape[1]
    bounds = np.searchsorted(batch.masked_rows_M, np.arange(1, len(batch)) * num_tokens)
    positions = np.split(batch.masked_rows_M % num_tokens, bounds)
    text = Read(config.fusion.num_layers, positions)
    return Reads(_masked_texts(batch), Images(np.arange(len(batch))), text=text)


def _mlm_head(model: M3AE, rows: Mapping[str, Tensor], batch: PretrainBatch, order: PatchOrder | None) -> Any:
    return model.mlm_outputs(rows["text"], batch)


def _fill_mlm(batch: PretrainBatch, num_rows: int) -> PretrainBatch:
    own_M = batch.masked_labels_M[:num_rows]
    labels_M = F.pad(own_M, (0, num_rows - len(own_M)), value=IGNORED_LABEL)
    # Where the tokens stand only the passes one after another read.
    return dataclasses.replace(batch, masked_labels_M=labels_M, masked_index_M=batch.masked_index_M[:0])


def _mim_reads(batch: PretrainBatch, config: M3AEConfig) -> Reads:
    """The features of all visible patches that enter the layer of the configuration."""
    depth = config.fusion.num_layers if config.mim.layer == -1 else config.mim.layer
    return Reads(_texts(batch), Images(np.arange(len(batch)), visible_only=True), image=Read(depth))


def _mim_head(model: M3AE, rows: Mapping[str, Tensor], batch: PretrainBatch, order: PatchOrder) -> Any:
    return model.mim_outputs_of_hidden(rows["image"].unflatten(0, (len(batch), -1)), order.restore_BN)


def _cls_reads(texts: Texts, images: Images, config: M3AEConfig) -> Reads:
    """The last features that the poolers read: CLS, or all of an image where the tower (Swin) has no CLS."""
    depth, cls = config.fusion.num_layers, [[0]] * len(images.index)
    return Reads(texts, images, Read(depth, cls), Read(depth, None if config.vision.kind == "swin" else cls))


def _cls_features(model: M3AE, rows: Mapping[str, Tensor]) -> Tensor:
    text_P1D = rows["text"][:, None]
    return model.pool(text_P1D, rows["image"].unflatten(0, (len(text_P1D), -1)))


def _itm_reads(batch: PretrainBatch, config: M3AEConfig) -> Reads:
    return _cls_reads(_texts(batch), Images(batch.itm_rows_B), config)


def _itm_head(model: M3AE, rows: Mapping[str, Tensor], batch: PretrainBatch, order: PatchOrder | None) -> Tensor:
    return model.itm_head(_cls_features(model, rows))


def _pair_reads(batch: ImageTextBatch, config: M3AEConfig) -> Reads:
    return _cls_reads(_texts(batch), Images(batch.image_rows_B), config)


def _vqa_head(model: M3AE, rows: Mapping[str, Tensor], batch: ImageTextBatch, order: PatchOrder | None) -> Tensor:
    return model.vqa_head(_cls_features(model, rows))


def _classification_head(
    model: M3AE, rows: Mapping[str, Tensor], batch: ImageTextBatch, order: PatchOrder | None
) -> Tensor:
    return model.classification_head(_cls_features(model, rows))


def _retrieval_reads(batch: RetrievalBatch, config: M3AEConfig) -> Reads:
    """Each image with its own text and with the false ones."""
    ids_BRT, _, num_tokens_BR = batch.candidates()
    num_texts = ids_BRT.shape[1]
    texts = Texts("candidates", ids_BRT.flatten(0, 1), num_tokens_BR.ravel(), np.arange(len(batch) * num_texts))
    return _cls_reads(texts, Images(np.repeat(np.arange(len(batch)), num_texts)), config)


def _retrieval_head(model: M3AE, rows: Mapping[str, Tensor], batch: RetrievalBatch, order: PatchOrder | None) -> Tensor:
    return model.retrieval_head(_cls_features(model, rows)).view(len(batch), -1)


OBJECTIVES: Mapping[str, Objective] = {
    "mlm": Objective(_mlm_reads, _mlm_head, _fill_mlm),
    "mim": Objective(_mim_reads, _mim_head),
    "itm": Objective(_itm_reads, _itm_head),
    "vqa": Objective(_pair_reads, _vqa_head),
    "classification": Objective(_pair_reads, _classification_head),
    "retrieval": Objective(_retrieval_reads, _retrieval_head),
}
