"""What the loader gives to the model: dataclasses of tensors, with the texts and ids that reports need."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastm3ae.errors import BadSample

__all__ = [
    "ClassificationBatch",
    "ImageBatch",
    "ImageTextBatch",
    "LabelBatch",
    "MaskBatch",
    "PretrainBatch",
    "RetrievalBatch",
    "VqaBatch",
]

Batch = TypeVar("Batch", bound="ImageBatch")


@dataclass(kw_only=True)
class ImageBatch:
    """B items with an image each, in the order in which the loader visits them.

    Args:
        image_BCHW: (B, 3, S, S) uint8, not yet normalised.
        item_ids: The B image ids.
        bad_samples: What was left out of this batch; its rows are not among the B items.
        pairs: The B items' numbers in the data set; none where a batch is made of something else.
    """

    image_BCHW: Tensor
    item_ids: list[str]
    bad_samples: list[BadSample]
    pairs: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.item_ids)

    def to(self: Batch, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Returns the batch with every tensor on ``device``."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: Batch) -> Batch:
        """Returns the batch with every tensor in page-locked memory, from which copies to a GPU are asynchronous."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())

    def _map_tensors(self: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        mapped: dict[str, Any] = {name: function(of) for name, of in values.items() if isinstance(of, Tensor)}
        return dataclasses.replace(self, **mapped)


@dataclass(kw_only=True)
class LabelBatch(ImageBatch):
    """Images with classes, any number of them each.

    Args:
        label_BC: (B, C) int8, 1 where an image is of a class, else 0.
        groups: The patient of each image, or whatever else images are grouped by.
    """

    label_BC: Tensor
    groups: list[str]


@dataclass(kw_only=True)
class MaskBatch(ImageBatch):
    """Images with the pixels of a finding.

    Args:
        mask_BHW: (B, S, S) bool, True where a pixel belongs to it.
        groups: As of ``LabelBatch``.
    """

    mask_BHW: Tensor
    groups: list[str]


@dataclass(kw_only=True)
class ImageTextBatch(ImageBatch):
    """B pairs of an image and a text; fewer images, where pairs share one.

    Args:
        text_ids_BT: (B, T) int64, CLS and SEP included, padded with the tokenizer's padding id.
        is_padding_BT: (B, T) bool, True at padding.
        texts: The B texts as they stand in the file.
        image_index_B: (B,) int64, which of the images each pair has; None: each its own.
        image_rows_B: The same on the host; made from it.
        num_tokens_B: How many tokens of each text are not padding, on the host; made from is_padding_BT.

    Raises:
        ValueError: A text has padding in front of a token.
    """

    text_ids_BT: Tensor
    is_padding_BT: Tensor
    texts: list[str]
    image_index_B: Tensor | None = None
    image_rows_B: np.ndarray | None = None
    num_tokens_B: np.ndarray | None = None

    def __post_init__(self) -> None:
        # What stands on the host is made here, in the loader: asking a GPU would make the training step wait for it.
        if self.num_tokens_B is None:
            self.num_tokens_B = _count_tokens(self.is_padding_BT)
        if self.image_index_B is None:
            self.image_rows_B = np.arange(len(self))
        elif self.image_rows_B is None:
            self.image_rows_B = _on_host(self.image_index_B)

    def images(self) -> Tensor:
        """Returns the B pairs' images: those that pairs share, repeated."""
        return self.image_BCHW if self.image_index_B is None else self.image_BCHW[self.image_index_B]


@dataclass(kw_only=True)
class PretrainBatch(ImageTextBatch):
    """Pairs with every random choice of pre-training already made.

    M3AE masks one side at a time and also shows false images; MPMA masks both sides of a pair at once, by the same
    fields, and leaves image-text matching alone.

    Args:
        mlm_ids_BT: (B, T) int64, the text with masked, replaced and kept tokens at the predicted positions.
        mlm_labels_BT: (B, T) int64, the original id where it is to be predicted, else -100.
        itm_labels_B: (B,) int64, 1: image-text matching sees the true image, 0: a false one.
        false_image_FCHW: (F, 3, S, S) uint8, the false images of the pairs with label 0, in their order.
        patch_noise_BN: (B, N) float32 in [0, 1), whose order decides which patches are hidden; N is 0 where the loader
            was given no patches.
        masked_index_M: (M,) int64, where the predicted tokens stand in the flattened (B * T); None: made from
            mlm_labels_BT, and so must it be where these are replaced.
        masked_labels_M: (M,) int64, the labels there; made with it.
        masked_rows_M: masked_index_M on the host; made with it.
        itm_index_B: (B,) int64, which image each pair sees in image-text matching: 0 ... B - 1 are the batch's own,
            then come the false ones; None: its own where the label is 1, else the next false one.
        itm_rows_B: The same on the host; made with it.
    """

    mlm_ids_BT: Tensor
    mlm_labels_BT: Tensor
    itm_labels_B: Tensor
    false_image_FCHW: Tensor
    patch_noise_BN: Tensor
    masked_index_M: Tensor | None = None
    masked_labels_M: Tensor | None = None
    masked_rows_M: np.ndarray | None = None
    itm_index_B: Tensor | None = None
    itm_rows_B: np.ndarray | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masked_index_M is None:
            self.masked_index_M = (self.mlm_labels_BT.flatten() != -100).nonzero().flatten()
            self.masked_labels_M = self.mlm_labels_BT.flatten()[self.masked_index_M]
            self.masked_rows_M = _on_host(self.masked_index_M)
        if self.itm_index_B is None:
            is_false_B = self.itm_labels_B == 0
            own_B = torch.arange(len(is_false_B), device=is_false_B.device)
            self.itm_index_B = torch.where(is_false_B, len(is_false_B) - 1 + is_false_B.cumsum(dim=0), own_B)
        if self.itm_rows_B is None:
            self.itm_rows_B = _on_host(self.itm_index_B)


@dataclass(kw_only=True)
class VqaBatch(ImageTextBatch):
    """Images with questions as texts. A question may have several answers, each with a score.

    Args:
        answer_ids_BA: (B, A) int64, indices of a question's answers, padded with -1 to the batch's largest number.
        answer_scores_BA: (B, A) float32, their scores, padded with 0.
        is_open_B: (B,) bool, False for a closed (yes or no) question.
        question_ids: The B question ids of the data set.
        answers: The answers in words, a list for each question.
    """

    answer_ids_BA: Tensor
    answer_scores_BA: Tensor
    is_open_B: Tensor
    question_ids: list[int]
    answers: list[list[str]]


@dataclass(kw_only=True)
class ClassificationBatch(ImageTextBatch):
    """Pairs with a class each.

    Args:
        label_B: (B,) int64, class indices.
    """

    label_B: Tensor


@dataclass(kw_only=True)
class RetrievalBatch(ImageTextBatch):
    """Pairs, each with R texts that were drawn from all texts and mostly belong to other images.

    Args:
        false_text_ids_BRT: (B, R, T) int64, padded to the T of the true texts.
        is_false_text_padding_BRT: (B, R, T) bool, True at padding.
        false_texts: The R drawn texts of each pair.
        num_false_tokens_BR: How many tokens of each are not padding, on the host; made from is_false_text_padding_BRT.
    """

    false_text_ids_BRT: Tensor
    is_false_text_padding_BRT: Tensor
    false_texts: list[list[str]]
    num_false_tokens_BR: np.ndarray | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_false_tokens_BR is None:
            self.num_false_tokens_BR = _count_tokens(self.is_false_text_padding_BRT)

    def candidates(self) -> tuple[Tensor, Tensor, np.ndarray]:
        """Returns each image's 1 + R texts, its own first: their ids, what of them is padding, and their lengths."""
        assert self.num_tokens_B is not None and self.num_false_tokens_BR is not None, "__post_init__ makes them"
        ids_BRT = torch.cat([self.text_ids_BT[:, None], self.false_text_ids_BRT], dim=1)
        is_padding_BRT = torch.cat([self.is_padding_BT[:, None], self.is_false_text_padding_BRT], dim=1)
        return ids_BRT, is_padding_BRT, np.concatenate([self.num_tokens_B[:, None], self.num_false_tokens_BR], axis=1)


def _count_tokens(is_padding: Tensor) -> np.ndarray:
    """Returns how many tokens stand before the padding, which must be at the end."""
    is_padding = is_padding.cpu()
    if (is_padding[..., :-1] & ~is_padding[..., 1:]).any():
        raise ValueError("is_padding must be False at all tokens of a text and True behind its last one, got a gap")
    return _on_host((~is_padding).sum(dim=-1))


def _on_host(x: Tensor) -> np.ndarray:
    # A copy, because a worker process moves the tensor's memory, which the array would go on looking at.
    return x.cpu().numpy().copy()
