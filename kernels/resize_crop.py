"""square = the middle of the image after a bicubic resize of its shorter side to S pixels, exactly as Pillow rounds.

A resize is two products with sparse matrices of weights, W_rows (W_columns image): along the rows, rounded to 8 bits,
then along the columns. A weight is the cubic kernel at the distance of two pixels' centres, widened by the factor of a
reduction, normalised, and rounded to 22 bits.
"""

import torch
from torch import Tensor

from fastm3ae import _C

__all__ = ["resize_crop", "resize_crop_reference"]

WEIGHT_BITS = 22


def resize_crop_reference(image_HWC: Tensor, size_px: int) -> Tensor:
    """The square in eager PyTorch: the specification. Arguments and result are those of ``resize_crop``."""
    H, W, _ = image_HWC.shape
    new_height, new_width, top, left = _geometry(H, W, size_px)
    narrow_HSC = _weigh(image_HWC.transpose(0, 1), new_width, left, size_px).transpose(0, 1)
    return _weigh(narrow_HSC, new_height, top, size_px).permute(2, 0, 1).contiguous()


def _geometry(height: int, width: int, size_px: int) -> tuple[int, int, int, int]:
    """Returns the resized image's height and width, and the first row and column of its middle."""
    shorter = min(height, width)
    new_height, new_width = size_px * height // shorter, size_px * width // shorter
    # Halves are rounded to even, as torchvision's CenterCrop does.
    return new_height, new_width, round((new_height - size_px) / 2), round((new_width - size_px) / 2)


def _weigh(image: Tensor, new_size: int, begin: int, num: int) -> Tensor:
    """Resizes dimension 0 to ``new_size`` and returns ``num`` of its rows, from number ``begin`` on."""
    size = len(image)
    scale = size / new_size
    reduction = max(scale, 1.0)
    support, frequency = 2 * reduction, 1 / reduction
    centers = (torch.arange(begin, begin + num, dtype=torch.float64)[:, None] + 0.5) * scale
    first = (centers - support + 0.5).long().clamp(min=0)
    end = (centers + support + 0.5).long().clamp(max=size)
    positions = first + torch.arange(int((end - first).max()))
    exact = _cubic((positions - centers + 0.5) * frequency).where(positions < end, 0)
    exact = exact / exact.cumsum(dim=1)[:, -1:]  # a cumulative sum adds in Pillow's order
    weights = (exact * 2**WEIGHT_BITS + torch.copysign(torch.tensor(0.5), exact)).long()
    levels = image[positions.clamp(max=size - 1)].long()  # (num, taps, ...)
    sums = (levels * weights[..., None, None]).sum(dim=1) + 2 ** (WEIGHT_BITS - 1)
    return (sums >> WEIGHT_BITS).clamp(0, 255).to(torch.uint8)


def _cubic(x: Tensor) -> Tensor:
    a, x = -0.5, x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return near.where(x < 1, far.where(x < 2, 0))


torch.library.define("fastm3ae::resize_crop", "(Tensor image_HWC, int size_px) -> Tensor")


def _empty_square(image_HWC: Tensor, size_px: int) -> Tensor:
    return image_HWC.new_empty(image_HWC.shape[2], size_px, size_px)


def launch_resize_crop_cpu(image_HWC: Tensor, size_px: int) -> Tensor:
    """Runs csrc/resize_crop_cpu.cpp on the calling thread."""
    image_HWC, square_CHW = image_HWC.contiguous(), _empty_square(image_HWC, size_px)
    H, W, C = image_HWC.shape
    new_height, new_width, top, left = _geometry(H, W, size_px)
    _C.resize_crop_cpu(
        image=image_HWC.data_ptr(),
        height=H,
        width=W,
        channels=C,
        new_height=new_height,
        new_width=new_width,
        top=top,
        left=left,
        size=size_px,
        square=square_CHW.data_ptr(),
    )
    return square_CHW


torch.library.impl("fastm3ae::resize_crop", "cpu", launch_resize_crop_cpu)
torch.library.register_fake("fastm3ae::resize_crop", _empty_square)


def resize_crop(image_HWC: Tensor, *, size_px: int) -> Tensor:
    """Resizes an image's shorter side to ``size_px`` (bicubic) and cuts out the middle; only what is left is computed.

    The same bytes as torchvision's ``Resize`` and ``CenterCrop`` of a Pillow image, in about a fifth of the time.

    Args:
        image_HWC: (H, W, C) uint8 on the CPU; any number of channels.
        size_px: Height and width of the result.

    Returns:
        (C, size_px, size_px) uint8.

    Raises:
        ValueError: The image is of another shape, dtype or device, or has no pixels, or ``size_px`` is below 1.

    Source:
        Pillow's ``Image.resize``. From version 13 on it resizes along the columns first where that is faster (images
        that are more than about twice as tall as wide), with other rounding; here, as in all versions before, the rows
        always come first.
    """
    if image_HWC.dim() != 3 or image_HWC.dtype != torch.uint8 or not image_HWC.device.type == "cpu":
        raise ValueError(
            f"image must be (H, W, C) uint8 on the CPU, got {tuple(image_HWC.shape)} "
            f"{str(image_HWC.dtype).removeprefix('torch.')} on {image_HWC.device}"
        )
    if not image_HWC.numel() or size_px < 1:
        raise ValueError(f"image and square must have pixels, got {tuple(image_HWC.shape)} and size_px={size_px}")
    return torch.ops.fastm3ae.resize_crop(image_HWC, size_px)
