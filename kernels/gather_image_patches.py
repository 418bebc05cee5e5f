"""pixels[k, (c, i, j)] = normalised image[c, p r + i, p s + j] where patch keep[k] stands in row r and column s.

So a patch embedding of the visible patches alone is one product: pixels @ weight.flatten(1).T + bias.
"""

import torch
from torch import Tensor

from fastm3ae.kernels.common import FLOAT_DTYPES, check_index, check_one_device, describe, triton_kernels

__all__ = ["gather_image_patches", "gather_image_patches_reference"]


def gather_image_patches_reference(
    image_BCHW: Tensor,
    keep_BK: Tensor,
    patch_size_px: int,
    mean_C: Tensor | None,
    std_C: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The pixels in eager PyTorch: the specification. Arguments and result are those of ``gather_image_patches``."""
    B, C, H, W = image_BCHW.shape
    p = patch_size_px
    patches = image_BCHW.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
    pixels_BNP = patches.reshape(B, (H // p) * (W // p), C * p * p)
    pixels_BKP = pixels_BNP.gather(1, keep_BK[..., None].expand(-1, -1, C * p * p))
    return _normalize(pixels_BKP, p, mean_C, std_C).to(dtype)


def _normalize(pixels_BKP: Tensor, patch_size_px: int, mean_C: Tensor | None, std_C: Tensor | None) -> Tensor:
    if mean_C is None:
        return pixels_BKP
    mean_P, std_P = (x_C.repeat_interleave(patch_size_px**2) for x_C in (mean_C, std_C))
    return (pixels_BKP.float() / 255 - mean_P) / std_P


def launch_gather_image_patches_cpu(
    image_BCHW: Tensor,
    keep_BK: Tensor,
    patch_size_px: int,
    mean_C: Tensor | None,
    std_C: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Copies each line of a visible patch at once: the image is rows of ``patch_size_px`` pixels one after another."""
    (B, C, H, W), p = image_BCHW.shape, patch_size_px
    columns = W // p
    check_index("keep", keep_BK, H // p * columns)
    first_BK = keep_BK // columns * (p * columns) + keep_BK % columns + torch.arange(B)[:, None] * (C * H * columns)
    line_Cp = torch.arange(C)[:, None] * (H * columns) + torch.arange(p) * columns
    row_BKCp = first_BK[..., None] + line_Cp.flatten()
    pixels_BKP = image_BCHW.reshape(-1, p).index_select(0, row_BKCp.flatten()).view(*keep_BK.shape, C * p * p)
    return _normalize(pixels_BKP, p, mean_C, std_C).to(dtype)


def launch_gather_image_patches_cuda(
    image_BCHW: Tensor,
    keep_BK: Tensor,
    patch_size_px: int,
    mean_C: Tensor | None,
    std_C: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Runs the Triton kernel."""
    launch = triton_kernels("gather_image_patches").launch_gather_image_patches
    return launch(image_BCHW, keep_BK, patch_size_px, mean_C, std_C, dtype)


def _empty_pixels(image_BCHW, keep_BK, patch_size_px, mean_C, std_C, dtype):
    return image_BCHW.new_empty((*keep_BK.shape, 3 * patch_size_px**2), dtype=dtype)


torch.library.define(
    "fastm3ae::gather_image_patches",
    "(Tensor image_BCHW, Tensor keep_BK, int patch_size_px, Tensor? mean_C, Tensor? std_C, ScalarType dtype) -> Tensor",
)
torch.library.impl("fastm3ae::gather_image_patches", "cpu", launch_gather_image_patches_cpu)
torch.library.impl("fastm3ae::gather_image_patches", "cuda", launch_gather_image_patches_cuda)
torch.library.register_fake("fastm3ae::gather_image_patches", _empty_pixels)


def gather_image_patches(
    image_BCHW: Tensor,
    keep_BK: Tensor,
    *,
    patch_size_px: int,
    mean_C: Tensor | None = None,
    std_C: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cuts the visible patches out of an image, normalising them on the way; hidden ones are never read.

    Not differentiable. An index outside 0 ... N - 1 is an error on the CPU; on a GPU it is one with TRITON_DEBUG=1, and
    reads foreign memory without.

    Args:
        image_BCHW: (B, 3, H, W) uint8 with ``mean_C`` and ``std_C``, or floating-point, normalised, without them.
        keep_BK: (B, K) int64, indices of the N = (H / patch_size_px) * (W / patch_size_px) patches in row-major order.
        patch_size_px: Height and width of a patch in pixels.
        mean_C: (3,) float32, each channel's mean of pixel / 255.
        std_C: (3,) float32, each channel's standard deviation of pixel / 255.
        dtype: Of the result. (x / 255 - mean) / std is rounded to float32 after each operation, then to this.

    Returns:
        (B, K, P), a patch's pixels in (channel, row, column) order, which is that of a convolution's weight and not
        that of the other ops.

    Raises:
        ValueError: A shape, dtype or device is not as above.
    """
    is_uint8 = image_BCHW.dtype == torch.uint8
    if image_BCHW.dim() != 4 or image_BCHW.shape[1] != 3 or not (is_uint8 or image_BCHW.dtype in FLOAT_DTYPES):
        raise ValueError(f"image must be (B, 3, H, W) uint8 or floating-point, got {describe(image_BCHW)}")
    B, _, H, W = image_BCHW.shape
    if patch_size_px < 1 or H % patch_size_px or W % patch_size_px:
        raise ValueError(f"patch_size_px must divide the image's {H} x {W} pixels, got {patch_size_px}")
    if keep_BK.dim() != 2 or len(keep_BK) != B or keep_BK.dtype != torch.int64:
        raise ValueError(f"keep must be (B, K) = ({B}, K) int64, got {describe(keep_BK)}")
    for name, value in (("mean", mean_C), ("std", std_C)):
        if is_uint8 and (value is None or value.shape != (3,) or value.dtype != torch.float32):
            raise ValueError(f"{name} must be (3,) float32 for a uint8 image, got {describe(value)}")
        if not is_uint8 and value is not None:
            raise ValueError(f"{name} must be None for a floating-point image, which is normalised already")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be a floating-point dtype, got {dtype}")
    check_one_device(image=image_BCHW, keep=keep_BK, mean=mean_C, std=std_C)
    return torch.ops.fastm3ae.gather_image_patches(image_BCHW.detach(), keep_BK, patch_size_px, mean_C, std_C, dtype)
