"""One vector for an image, for a text, or for a pair of them, by name: what others make of a model.

image          CLS of the vision tower; of a Swin, which has none, the mean over its patches.
text           CLS of the language tower.
fused          what the heads of tasks read, the pooled features of text and image side by side: of every M3AE, and of
               an MPMA that is fine-tuned for questions or classes.
image_aligned  of an MPMA with global alignment, which compares images and reports
text_aligned   by these: both of length 1.

Images are whole, texts unmasked; the passes are the readable ones, on padded texts.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from fastm3ae.data.batch import ImageBatch, ImageTextBatch
from fastm3ae.model.build import Model
from fastm3ae.model.image_model import ImageModel
from fastm3ae.model.m3ae import M3AE
from fastm3ae.model.mpma import MPMA
from fastm3ae.model.text import encode_tokens
from fastm3ae.model.vision import encode_pixels

__all__ = ["ImageEncoder", "PairEncoder", "TextEncoder", "embed", "embed_images", "embed_reports"]


class ImageEncoder(nn.Module):
    """Embeds images.

    Args:
        model: Any.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_BCHW: Tensor) -> dict[str, Tensor]:
        """Returns by name what normalised images of ``config.image_size_px`` give."""
        return _of_images(self.model, _see(self.model, image_BCHW))


class TextEncoder(nn.Module):
    """Embeds texts.

    Args:
        model: One that reads texts.
    """

    def __init__(self, model: M3AE | MPMA) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor, is_padding_BT: Tensor) -> dict[str, Tensor]:
        """Returns by name what texts give, as int64 token ids, and True at padding."""
        return _of_texts(self.model, encode_tokens(self.model.text, ids_BT, is_padding_BT), is_padding_BT)


class PairEncoder(nn.Module):
    """Embeds images with texts.

    Args:
        model: An M3AE.
    """

    def __init__(self, model: M3AE) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_BCHW: Tensor, ids_BT: Tensor, is_padding_BT: Tensor) -> dict[str, Tensor]:
        """Returns by name what the pairs give."""
        model, hidden_BLD = self.model, _see(self.model, image_BCHW)
        hidden_BTD = encode_tokens(model.text, ids_BT, is_padding_BT)
        found = _of_images(model, hidden_BLD) | _of_texts(model, hidden_BTD, is_padding_BT)
        return found | {"fused": model.fused(hidden_BTD, hidden_BLD, is_padding_BT)}


def embed(model: Model, batch: ImageBatch) -> dict[str, Tensor]:
    """Returns by name all that there is of a batch: (B, ...) each; of one without texts, of the images alone.

    An image that several pairs share is encoded once.

    Args:
        model: In evaluation mode.
        batch: On the model's device, images normalised.
    """
    hidden_BLD = _see(model, batch.image_BCHW)
    if isinstance(model, ImageModel) or not isinstance(batch, ImageTextBatch):
        return _of_images(model, hidden_BLD)
    if batch.image_index_B is not None:
        hidden_BLD = hidden_BLD[batch.image_index_B]
    is_padding_BT = batch.is_padding_BT
    hidden_BTD = encode_tokens(model.text, batch.text_ids_BT, is_padding_BT)
    found = _of_images(model, hidden_BLD) | _of_texts(model, hidden_BTD, is_padding_BT)
    if isinstance(model, M3AE):
        found["fused"] = model.fused(hidden_BTD, hidden_BLD, is_padding_BT)
    elif model.is_of_task:
        found["fused"] = model.fused(hidden_BTD, hidden_BLD, batch)
    return found


def embed_images(model: MPMA, image_BCHW: Tensor) -> Tensor:
    """Returns what ``MPMA.embed`` gives of whole images with reports, of images alone: (B, E), of length 1.

    Args:
        model: With the objective global_alignment.
        image_BCHW: Normalised pixels, of ``config.image_size_px``.
    """
    return _align_images(model, _see(model, image_BCHW))


def embed_reports(model: MPMA, ids_BT: Tensor, is_padding_BT: Tensor) -> Tensor:
    """Returns the same of unmasked reports alone: (B, E), of length 1.

    Args:
        model: With the objective global_alignment.
        ids_BT: int64 token ids.
        is_padding_BT: True at padding.
    """
    return _align_reports(model, encode_tokens(model.text, ids_BT, is_padding_BT), is_padding_BT)


def _see(model: Model, image_BCHW: Tensor) -> Tensor:
    """Returns what the vision tower makes of whole images: (B, L, D)."""
    scale = model.config.image.target_scale if isinstance(model, MPMA) else 1
    return encode_pixels(model.vision, F.avg_pool2d(image_BCHW, scale) if scale > 1 else image_BCHW)


def _of_images(model: Model, hidden_BLD: Tensor) -> dict[str, Tensor]:
    has_cls = model.config.vision.kind != "swin"
    found = {"image": hidden_BLD[:, 0] if has_cls else hidden_BLD.mean(dim=1)}
    if isinstance(model, MPMA) and _is_aligned(model):
        found["image_aligned"] = _align_images(model, hidden_BLD)
    return found


def _of_texts(model: M3AE | MPMA, hidden_BTD: Tensor, is_padding_BT: Tensor) -> dict[str, Tensor]:
    found = {"text": hidden_BTD[:, 0]}
    if isinstance(model, MPMA) and _is_aligned(model):
        found["text_aligned"] = _align_reports(model, hidden_BTD, is_padding_BT)
    return found


def _is_aligned(model: MPMA) -> bool:
    return "global_alignment" in model.config.objectives


def _align_images(model: MPMA, hidden_BLD: Tensor) -> Tensor:
    is_cls = model.config.alignment.pool == "cls"
    return model.global_head.image(hidden_BLD[:, 0] if is_cls else hidden_BLD.mean(dim=1))


def _align_reports(model: MPMA, hidden_BTD: Tensor, is_padding_BT: Tensor) -> Tensor:
    if model.config.alignment.pool == "cls":
        return model.global_head.report(hidden_BTD[:, 0])
    is_read_BT1 = ~F.pad(is_padding_BT[:, 1:], (0, 1), value=True)[..., None]  # CLS and words, but not SEP
    return model.global_head.report((hidden_BTD * is_read_BT1).sum(dim=1) / is_read_BT1.sum(dim=1))
