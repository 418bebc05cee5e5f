"""Visible patches straight from the image: a program cuts a block of one patch's pixels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch_gather_image_patches"]

_BLOCK_P = 1024


@triton.jit
def _gather_image_patches_fwd_kernel(
    image_ptr,
    keep_ptr,
    mean_ptr,
    std_ptr,
    pixels_ptr,
    K,
    H,
    W,
    IS_UINT8: tl.constexpr,
    PATCH_SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1)
    pixel = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    is_pixel = pixel < 3 * PATCH_SIZE * PATCH_SIZE
    patch = tl.load(keep_ptr + b * K + k)
    tl.device_assert((patch >= 0) & (patch < (H // PATCH_SIZE) * (W // PATCH_SIZE)), "keep must be from 0 to N - 1")
    row = patch // (W // PATCH_SIZE) * PATCH_SIZE + pixel // PATCH_SIZE % PATCH_SIZE
    column = patch % (W // PATCH_SIZE) * PATCH_SIZE + pixel % PATCH_SIZE
    channel = pixel // (PATCH_SIZE * PATCH_SIZE)
    value = tl.load(image_ptr + ((b * 3 + channel) * H + row) * W + column, mask=is_pixel, other=0)
    if IS_UINT8:
        mean = tl.load(mean_ptr + channel, mask=is_pixel, other=0.0)
        std = tl.load(std_ptr + channel, mask=is_pixel, other=1.0)
        # Triton's "/" is off by an ulp or two; these are the roundings of the reference.
        value = tl.div_rn(tl.div_rn(value.to(tl.float32), 255.0) - mean, std)
    row_of_pixels = (b * K + k) * (3 * PATCH_SIZE * PATCH_SIZE)
    tl.store(pixels_ptr + row_of_pixels + pixel, value.to(pixels_ptr.dtype.element_ty), mask=is_pixel)


def launch_gather_image_patches(
    image_BCHW: Tensor,
    keep_BK: Tensor,
    patch_size_px: int,
    mean_C: Tensor | None,
    std_C: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Runs the kernel. Arguments and result are those of ``gather_image_patches``."""
    (B, K), (H, W), P = keep_BK.shape, image_BCHW.shape[2:], 3 * patch_size_px**2
    pixels_BKP = image_BCHW.new_empty((B, K, P), dtype=dtype)
    if pixels_BKP.numel():
        with torch.cuda.device_of(image_BCHW):
            _gather_image_patches_fwd_kernel[B, K, triton.cdiv(P, _BLOCK_P)](
                image_BCHW.contiguous(),
                keep_BK.contiguous(),
                None if mean_C is None else mean_C.contiguous(),
                None if std_C is None else std_C.contiguous(),
                pixels_BKP,
                K,
                H,
                W,
                IS_UINT8=mean_C is not None,
                PATCH_SIZE=patch_size_px,
                BLOCK_P=_BLOCK_P,
            )
    return pixels_BKP
