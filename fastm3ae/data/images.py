"""Images: grey or RGB levels -> a square of 8-bit pixels -> the float input of a vision tower.

Encoded bytes become levels in ``fastm3ae.data.decode``, which needs no torch.

Pixels stay 8-bit until they are on the device that computes: a quarter of the bytes to collate, copy and keep.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from fastm3ae.errors import UserError, nearest
from fastm3ae.kernels import resize_crop

__all__ = [
    "FIXED_TRANSFORMS",
    "TRANSFORMS",
    "make_mask_transform",
    "make_transform",
    "normalization",
    "normalize",
]

TRANSFORMS = ("clip", "clip_resizedcrop", "clip_randaug", "imagenet", "imagenet_resizedcrop")
"""Names that ``make_transform`` and ``normalization`` know."""
FIXED_TRANSFORMS = ("clip", "imagenet")
"""Those that draw nothing."""

CROP_AREA, CROP_RATIO = (0.9, 1.0), (3 / 4, 4 / 3)
BICUBIC, NEAREST = transforms.InterpolationMode.BICUBIC, transforms.InterpolationMode.NEAREST

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def make_transform(name: str, image_size_px: int) -> Callable[[Image.Image], torch.Tensor]:
    """Returns the function that makes a square of an image of any size.

    ``clip`` and ``imagenet`` resize the shorter side (bicubic) and cut out the centre. ``clip_resizedcrop`` and
    ``imagenet_resizedcrop`` resize a random 90 to 100 % of the area, of aspect ratio 3/4 to 4/3. ``clip_randaug``
    applies two random operations of magnitude 9 before it does as ``clip``. The random ones draw from torch's global
    generator. ``clip`` and ``imagenet`` also say how the squares are normalised: see ``normalization``.

    Args:
        name: One of ``TRANSFORMS``.
        image_size_px: Height and width of the result.

    Returns:
        A function from an image of ``decode_image`` to a uint8 tensor (3, image_size_px, image_size_px).

    Raises:
        UserError: The name is unknown.

    Source: m3ae/transforms/transform.py. Pillow 13 resizes tall images in another order than all versions before;
        ``clip`` and ``imagenet`` keep to the old one (``fastm3ae.kernels.resize_crop``).
    Deviation: The operations of RandAugment are torchvision's. The original's list has SolarizeAdd (which fails with
        today's numpy) in place of Identity, and other strengths: it only ever lowers brightness, contrast and colour,
        and posterises to a single bit.
    """
    _check_name(name)
    middle = functools.partial(_middle, size_px=image_size_px)
    if name.endswith("resizedcrop"):
        crop = transforms.RandomResizedCrop(image_size_px, scale=CROP_AREA, ratio=CROP_RATIO, interpolation=BICUBIC)
        return transforms.Compose([crop, middle])
    if name == "clip_randaug":
        return transforms.Compose([transforms.RandAugment(num_ops=2, magnitude=9), middle])
    return middle


def make_mask_transform(
    name: str, image_size_px: int
) -> Callable[[Image.Image, Image.Image], tuple[torch.Tensor, torch.Tensor]]:
    """Returns the function that makes squares of an image and of its mask, in which the same pixels belong together.

    Nothing is cut away: ``clip`` and ``imagenet`` resize the whole to the square, whatever its shape. With
    ``clip_resizedcrop`` and ``imagenet_resizedcrop`` it is the same random part of both, of the size that
    ``make_transform`` says, its aspect ratio relative to the whole's. The image is resized bicubically, of the mask the
    nearest pixel is taken.

    Args:
        name: One of ``TRANSFORMS``, but ``clip_randaug``, whose operations are for images alone.
        image_size_px: Height and width S of the results.

    Returns:
        A function from an image of ``decode_image`` and a mask of its size, ``L`` with the levels 0 and 255, to a uint8
        tensor (3, S, S) and a bool one (S, S).

    Raises:
        UserError: The name is unknown, or the one that is not for masks.
    """
    _check_name(name)
    if name == "clip_randaug":
        raise UserError("data.train_transform clip_randaug is not for masks: take clip or clip_resizedcrop.")
    size = [image_size_px, image_size_px]

    def transform(image: Image.Image, mask: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        part = (0, 0, image.height, image.width)  # top, left, height, width
        if name.endswith("resizedcrop"):
            ratio = [limit * image.width / image.height for limit in CROP_RATIO]
            part = transforms.RandomResizedCrop.get_params(image, list(CROP_AREA), ratio)
        square = _middle(functional.resized_crop(image, *part, size, BICUBIC), image_size_px)
        # Pillow's nearest pixel is that at the new one's centre; a tensor's would be half a pixel off.
        return square, torch.from_numpy(np.array(functional.resized_crop(mask, *part, size, NEAREST)) > 0)

    return transform


def normalization(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean and the standard deviation of a transform's images over 255, each float32 (3, 1, 1).

    Raises:
        UserError: The name is not one of ``TRANSFORMS``.
    """
    _check_name(name)
    mean, std = _IMAGENET if name.startswith("imagenet") else _CLIP
    return torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)


def normalize(image_BCHW: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Returns (x / 255 - mean) / std, rounded after each operation as torchvision's ToTensor and Normalize round.

    Args:
        image_BCHW: Pixels, uint8 (B, 3, H, W).
        mean: float32 (3, 1, 1), on the same device.
        std: float32 (3, 1, 1), on the same device.

    Returns:
        float32 (B, 3, H, W).
    """
    return image_BCHW.to(torch.float32).div_(255).sub_(mean).div_(std)


def _check_name(name: str) -> None:
    if name not in TRANSFORMS:
        known = ", ".join(TRANSFORMS)
        raise UserError(f"The transform must be one of {known}, got {name!r}.{nearest(name, TRANSFORMS)}")


def _middle(image: Image.Image, size_px: int) -> torch.Tensor:
    """Returns the middle of an ``L``, ``RGB`` or ``RGBA`` image whose shorter side is resized to ``size_px``."""
    if image.mode == "RGBA" and min(image.size) != size_px:
        # As Pillow resizes transparent images: colours are weighted by alpha, and no longer so afterwards.
        weighted_HWC = _resize_crop(image.convert("RGBa"), size_px).permute(1, 2, 0)
        image = Image.frombytes("RGBa", (size_px, size_px), weighted_HWC.numpy().tobytes()).convert("RGBA")
    if image.mode == "RGBA":
        image = image.convert("RGB")
    return _resize_crop(image, size_px).expand(3, -1, -1)  # grey becomes RGB last: a third of the work


def _resize_crop(image: Image.Image, size_px: int) -> torch.Tensor:
    levels = torch.from_numpy(np.array(image))
    return resize_crop(levels.view(*levels.shape[:2], -1), size_px=size_px)
