"""loss = 1/|hidden| sum over hidden patches of mean_P (pred - target)^2, target = (pixel - mean) / sqrt(var + 1e-6).

Mean and unbiased variance are those of the patch itself, so the target is a function of the image alone. An image of
8-bit levels is normalised first, (level / 255 - mean) / std with numbers that its channel has in all images.
"""

import torch
from torch import Tensor

from fastm3ae import _C
from fastm3ae.kernels.common import check_one_device, describe, dtype_name
from fastm3ae.kernels.cuda_build import current_stream, require_cuda_build

__all__ = ["masked_pixel_loss", "masked_pixel_loss_backward_reference", "masked_pixel_loss_reference"]

# What pred may be for an image of this dtype.
_PRED_DTYPES = {torch.float64: (torch.float64,)} | dict.fromkeys(
    (torch.uint8, torch.float32), (torch.float32, torch.float16, torch.bfloat16)
)


def _difference(pred, image_BCHW, hidden, patch_size_px, normalize_target, mean, std):
    """The difference pred - target, at visible patches, too."""
    if image_BCHW.dtype == torch.uint8:
        image_BCHW = (image_BCHW / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    B, C, H, W = image_BCHW.shape
    p = patch_size_px
    patches = image_BCHW.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)
    target = patches.reshape(B, (H // p) * (W // p), p * p * C)
    if hidden.dtype != torch.bool:
        target = target.gather(1, hidden[..., None].expand(pred.shape))
    if normalize_target:
        variance, average = torch.var_mean(target, dim=-1, correction=1, keepdim=True)
        target = (target - average) / (variance + 1e-6).sqrt()
    return pred.to(target.dtype) - target


def _is_hidden(hidden):
    return hidden if hidden.dtype == torch.bool else torch.ones_like(hidden, dtype=torch.bool)


def masked_pixel_loss_reference(
    pred: Tensor,
    image_BCHW: Tensor,
    hidden: Tensor,
    patch_size_px: int,
    normalize_target: bool,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """The loss in eager PyTorch: the specification. Arguments and result are those of ``masked_pixel_loss``."""
    error = _difference(pred, image_BCHW, hidden, patch_size_px, normalize_target, mean, std).square().mean(dim=-1)
    is_hidden = _is_hidden(hidden)
    return error.where(is_hidden, 0).sum() / is_hidden.sum().clamp(min=1)


def masked_pixel_loss_backward_reference(
    pred: Tensor,
    image_BCHW: Tensor,
    hidden: Tensor,
    patch_size_px: int,
    normalize_target: bool,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """The loss's gradient: 2 (pred - target) / (P |hidden|) at hidden patches, 0 at visible ones."""
    difference = _difference(pred, image_BCHW, hidden, patch_size_px, normalize_target, mean, std)
    is_hidden = _is_hidden(hidden)
    return (difference * (2 / (is_hidden.sum().clamp(min=1) * pred.shape[-1]))).where(is_hidden[..., None], 0)


# The op returns the gradient beside the loss, because pred and target are at hand: as pred - target (0 at visible
# patches; empty without needs_grad) and the factor 2 / (P |hidden|). The product in float16 would underflow before the
# loss scale reaches it.
torch.library.define(
    "fastm3ae::masked_pixel_loss",
    "(Tensor pred, Tensor image_BCHW, Tensor hidden, int patch_size_px, bool normalize_target, Tensor? mean, "
    "Tensor? std, bool needs_grad) -> (Tensor loss, Tensor difference, Tensor grad_scale)",
)


def _empty_outputs(pred, image_BCHW, hidden, patch_size_px, normalize_target, mean, std, needs_grad):
    dtype = torch.promote_types(image_BCHW.dtype, torch.float32)
    difference = pred.new_empty(pred.shape if needs_grad else (0,))
    return image_BCHW.new_empty((), dtype=dtype), difference, image_BCHW.new_empty((), dtype=dtype)


def _shape(image_BCHW: Tensor, hidden: Tensor, patch_size_px: int, normalize_target: bool) -> _C.PixelLossShape:
    is_mask = hidden.dtype == torch.bool
    return _C.PixelLossShape(
        batch_size=image_BCHW.shape[0],
        height=image_BCHW.shape[2],
        width=image_BCHW.shape[3],
        patch_size=patch_size_px,
        num_preds=hidden.shape[1],
        is_hidden=hidden.data_ptr() if is_mask else 0,
        hidden_index=0 if is_mask else hidden.data_ptr(),
        normalize_target=normalize_target,
    )


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def launch_masked_pixel_loss_cpu(
    pred: Tensor,
    image_BCHW: Tensor,
    hidden: Tensor,
    patch_size_px: int,
    normalize_target: bool,
    mean: Tensor | None,
    std: Tensor | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs csrc/masked_pixel_loss_cpu.cpp on as many threads as torch may use. Returns the op's results."""
    dtype, pred_dtype = torch.promote_types(image_BCHW.dtype, torch.float32), pred.dtype
    pred, image_BCHW, hidden = pred.to(dtype).contiguous(), image_BCHW.contiguous(), hidden.contiguous()
    options = (patch_size_px, normalize_target)
    loss, difference, grad_scale = _empty_outputs(pred, image_BCHW, hidden, *options, mean, std, needs_grad)
    launch = {
        torch.uint8: _C.masked_pixel_loss_cpu_uint8,
        torch.float32: _C.masked_pixel_loss_cpu_float32,
        torch.float64: _C.masked_pixel_loss_cpu_float64,
    }[image_BCHW.dtype]
    launch(
        _shape(image_BCHW, hidden, *options),
        pred=pred.data_ptr(),
        image=image_BCHW.data_ptr(),
        mean=_address(mean),
        std=_address(std),
        num_threads=torch.get_num_threads(),
        loss=loss.data_ptr(),
        difference=difference.data_ptr() if needs_grad else 0,
        grad_scale=grad_scale.data_ptr(),
    )
    return loss, difference.to(pred_dtype), grad_scale


def launch_masked_pixel_loss_cuda(
    pred: Tensor,
    image_BCHW: Tensor,
    hidden: Tensor,
    patch_size_px: int,
    normalize_target: bool,
    mean: Tensor | None,
    std: Tensor | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queues csrc/masked_pixel_loss.cu on the tensors' device and current stream. Returns the op's results."""
    require_cuda_build("masked_pixel_loss")
    pred, image_BCHW, hidden = pred.contiguous(), image_BCHW.contiguous(), hidden.contiguous()
    options = (patch_size_px, normalize_target)
    loss, difference, grad_scale = _empty_outputs(pred, image_BCHW, hidden, *options, mean, std, needs_grad)
    if hidden.dtype != torch.bool and torch.is_anomaly_enabled():
        _check_index(hidden, num_patches=image_BCHW[0, 0].numel() // patch_size_px**2)
    num_blocks = len(hidden) * -(-hidden.shape[1] // _C.masked_pixel_loss_preds_per_block)
    partial = loss.new_empty(num_blocks, 2)
    _C.masked_pixel_loss_cuda(
        _shape(image_BCHW, hidden, *options),
        pred_dtype=dtype_name(pred.dtype),
        image_dtype=dtype_name(image_BCHW.dtype),
        pred=pred.data_ptr(),
        image=image_BCHW.data_ptr(),
        mean=_address(mean),
        std=_address(std),
        device=pred.get_device(),
        stream=current_stream(pred),
        partial=partial.data_ptr(),
        loss=loss.data_ptr(),
        difference=difference.data_ptr() if needs_grad else 0,
        grad_scale=grad_scale.data_ptr(),
    )
    return loss, difference, grad_scale


def _check_index(hidden: Tensor, num_patches: int) -> None:
    wrong = hidden[(hidden < 0) | (hidden >= num_patches)]
    if len(wrong):
        raise IndexError(f"hidden must be patches from 0 to {num_patches - 1}, got {wrong[0].item()}")


class _MaskedPixelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, *inputs):
        loss, difference, grad_scale = torch.ops.fastm3ae.masked_pixel_loss(pred, *inputs, True)
        ctx.save_for_backward(difference, grad_scale)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        difference, grad_scale = ctx.saved_tensors
        # One dimension makes the factor take part in the promotion of dtypes: the product is rounded once, at its end.
        factor = (grad_scale * grad_loss).view(1)
        return torch.mul(difference, factor, out=torch.empty_like(difference)), *(None,) * 6


torch.library.impl("fastm3ae::masked_pixel_loss", "cpu", launch_masked_pixel_loss_cpu)
torch.library.impl("fastm3ae::masked_pixel_loss", "cuda", launch_masked_pixel_loss_cuda)
torch.library.register_fake("fastm3ae::masked_pixel_loss", _empty_outputs)


def masked_pixel_loss(
    pred: Tensor,
    image_BCHW: Tensor,
    hidden: Tensor,
    *,
    patch_size_px: int,
    normalize_target: bool,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the predicted pixels over the hidden patches of the whole batch.

    Differentiable once, with respect to ``pred`` alone. Visible patches are never read; where nothing is hidden the
    loss and its gradient are 0. The result has the same bits whatever the number of threads.

    Args:
        pred: (B, N, P) or, for the hidden patches alone, (B, U, P) predicted pixels of each patch in (row, column,
            channel) order, P = patch_size_px^2 * 3; float32, bfloat16 or float16, for a float64 image float64.
        image_BCHW: (B, 3, H, W) image, either as the model sees it, that is after the normalisation of its channels,
            float32 or float64; or its levels, uint8, which are normalised as they are read, to the same bits as
            ``fastm3ae.data.images.normalize`` does on the CPU. Its N = (H / patch_size_px) * (W / patch_size_px)
            patches are in row-major order.
        hidden: (B, N) bool, True where the patch was hidden from the encoder; or (B, U) int64, for each of the U
            hidden patches its number in its image.
        patch_size_px: Height and width of a patch in pixels.
        normalize_target: Whether a patch's target is its pixels minus their mean, over their standard deviation
            (unbiased, 1e-6 added to the variance), or the pixels as they are.
        mean: (3, 1, 1) float32, the mean of each channel's levels over 255; for a uint8 image only.
        std: (3, 1, 1) float32, their standard deviation, more than 0; for a uint8 image only.

    Returns:
        The loss, () float32, for a float64 image float64.

    Raises:
        ValueError: A shape, dtype or device is not as above.
        IndexError: A number in ``hidden`` is not that of a patch. On a GPU this is checked in anomaly mode
            (``torch.autograd.set_detect_anomaly``) only, because it waits for the GPU; otherwise the loss is NaN.
        RuntimeError: The tensors are on a GPU, and fastm3ae was built without CUDA.

    Source:
        compute_mim in m3ae/modules/objectives.py of zhjohnchan/M3AE.
    """
    if image_BCHW.dim() != 4 or image_BCHW.shape[1] != 3 or image_BCHW.dtype not in _PRED_DTYPES:
        raise ValueError(f"image must be (B, 3, H, W) uint8, float32 or float64, got {describe(image_BCHW)}")
    B, _, H, W = image_BCHW.shape
    if patch_size_px < 1 or H % patch_size_px or W % patch_size_px:
        raise ValueError(f"patch_size_px must divide the image's {H} x {W} pixels, got {patch_size_px}")
    N, P = (H // patch_size_px) * (W // patch_size_px), patch_size_px * patch_size_px * 3
    is_mask, is_index = hidden.dtype == torch.bool, hidden.dtype == torch.int64
    if not (is_mask and hidden.shape == (B, N) or is_index and hidden.dim() == 2 and len(hidden) == B):
        raise ValueError(f"hidden must be (B, N) = ({B}, {N}) bool or ({B}, U) int64, got {describe(hidden)}")
    dtypes = _PRED_DTYPES[image_BCHW.dtype]
    if pred.shape != (*hidden.shape, P) or pred.dtype not in dtypes:
        raise ValueError(
            f"pred must be {(*hidden.shape, P)} {' or '.join(map(dtype_name, dtypes))} for this image and hidden, "
            f"got {describe(pred)}"
        )
    if image_BCHW.dtype == torch.uint8:
        for name, statistic in (("mean", mean), ("std", std)):
            if statistic is None or statistic.shape != (3, 1, 1) or statistic.dtype != torch.float32:
                raise ValueError(f"{name} must be (3, 1, 1) float32 for a uint8 image, got {describe(statistic)}")
        mean, std = mean.detach().contiguous(), std.detach().contiguous()
    elif mean is not None or std is not None:
        raise ValueError(
            f"mean and std must be None for an image of {dtype_name(image_BCHW.dtype)}, which is normalised"
        )
    check_one_device(pred=pred, image=image_BCHW, hidden=hidden, mean=mean, std=std)
    inputs = (pred, image_BCHW.detach(), hidden, patch_size_px, normalize_target, mean, std)
    if torch.is_grad_enabled() and pred.requires_grad:
        return _MaskedPixelLoss.apply(*inputs)
    return torch.ops.fastm3ae.masked_pixel_loss(*inputs, False)[0]
