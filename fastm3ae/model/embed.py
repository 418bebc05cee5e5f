"""MPMA's features of images without reports and of reports without images, as ``MPMA.embed`` gives them of pairs."""

import torch.nn.functional as F
from torch import Tensor

from fastm3ae.model.mpma import MPMA
from fastm3ae.model.text import encode_tokens
from fastm3ae.model.vision import encode_pixels

__all__ = ["embed_images", "embed_reports"]


def embed_images(model: MPMA, image_BCHW: Tensor) -> Tensor:
    """Returns the features of whole images: (B, E), of length 1.

    Args:
        model: With the objective global_alignment.
        image_BCHW: Normalised pixels, of ``config.image_size_px``.
    """
    scale = model.config.image.target_scale
    seen_BCHW = F.avg_pool2d(image_BCHW, scale) if scale > 1 else image_BCHW
    hidden_BLD = encode_pixels(model.vision, seen_BCHW)
    is_cls = model.config.alignment.pool == "cls"
    return model.global_head.image(hidden_BLD[:, 0] if is_cls else hidden_BLD.mean(dim=1))


def embed_reports(model: MPMA, ids_BT: Tensor, is_padding_BT: Tensor) -> Tensor:
    """Returns the features of unmasked reports: (B, E), of length 1.

    Args:
        model: With the objective global_alignment.
        ids_BT: int64 token ids.
        is_padding_BT: True at padding.
    """
    hidden_BTD = encode_tokens(model.text, ids_BT, is_padding_BT)
    if model.config.alignment.pool == "cls":
        return model.global_head.report(hidden_BTD[:, 0])
    is_read_BT1 = ~F.pad(is_padding_BT[:, 1:], (0, 1), value=True)[..., None]  # CLS and words, but not SEP
    return model.global_head.report((hidden_BTD * is_read_BT1).sum(dim=1) / is_read_BT1.sum(dim=1))
