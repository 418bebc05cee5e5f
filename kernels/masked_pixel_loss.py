"""loss = 1/|hidden| sum over hidden patches of mean_P (pred - target)^2, target = (pixel - mean) / sqrt(var + 1e-6).

Mean and unbiased variance are those of the patch itself, so the target is a function of the image alone.
"""

import torch
from torch import Tensor

from fastm3ae import _C

__all__ = ["masked_pixel_loss", "masked_pixel_loss_backward_reference", "masked_pixel_loss_reference"]

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def _target_BNP(image_BCHW: Tensor, patch_size_px: int, normalize_target: bool) -> Tensor:
    B, C, H, W = image_BCHW.shape
    p = patch_size_px
    patches = image_BCHW.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)
    target_BNP = patches.reshape(B, (H // p) * (W // p), p * p * C)
    if not normalize_target:
        return target_BNP
    var_BN1, mean_BN1 = torch.var_mean(target_BNP, dim=-1, correction=1, keepdim=True)
    return (target_BNP - mean_BN1) / (var_BN1 + 1e-6).sqrt()


def masked_pixel_loss_reference(
    pred_BNP: Tensor, image_BCHW: Tensor, is_hidden_BN: Tensor, patch_size_px: int, normalize_target: bool
) -> Tensor:
    """The loss in eager PyTorch: the specification. Arguments and result are those of ``masked_pixel_loss``."""
    target_BNP = _target_BNP(image_BCHW, patch_size_px, normalize_target)
    error_BN = (pred_BNP.to(image_BCHW.dtype) - target_BNP).square().mean(dim=-1)
    return error_BN.where(is_hidden_BN, 0).sum() / is_hidden_BN.sum().clamp(min=1)


def masked_pixel_loss_backward_reference(
    pred_BNP: Tensor, image_BCHW: Tensor, is_hidden_BN: Tensor, patch_size_px: int, normalize_target: bool
) -> Tensor:
    """The loss's gradient: 2 (pred - target) / (P |hidden|) at hidden patches, 0 at visible ones."""
    target_BNP = _target_BNP(image_BCHW, patch_size_px, normalize_target)
    num_values = is_hidden_BN.sum().clamp(min=1) * pred_BNP.shape[-1]
    grad_BNP = (pred_BNP.to(image_BCHW.dtype) - target_BNP) * (2 / num_values)
    return grad_BNP.where(is_hidden_BN[..., None], 0)


# The op returns the gradient beside the loss, because the number of hidden patches is all that it needs and pred and
# target are at hand; without needs_grad that output is empty. It stays in the image's dtype: in float16 it would
# underflow before the loss scale reaches it.
torch.library.define(
    "fastm3ae::masked_pixel_loss",
    "(Tensor pred_BNP, Tensor image_BCHW, Tensor is_hidden_BN, int patch_size_px, bool normalize_target, "
    "bool needs_grad) -> (Tensor loss, Tensor grad_pred_BNP)",
)


def _empty_outputs(pred_BNP, image_BCHW, is_hidden_BN, patch_size_px, normalize_target, needs_grad):
    return image_BCHW.new_empty(()), image_BCHW.new_empty(pred_BNP.shape if needs_grad else (0,))


def launch_masked_pixel_loss_cpu(
    pred_BNP: Tensor,
    image_BCHW: Tensor,
    is_hidden_BN: Tensor,
    patch_size_px: int,
    normalize_target: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Runs csrc/masked_pixel_loss_cpu.cpp on as many threads as torch may use. Returns the loss and its gradient."""
    pred_BNP = pred_BNP.to(image_BCHW.dtype).contiguous()
    image_BCHW, is_hidden_BN = image_BCHW.contiguous(), is_hidden_BN.contiguous()
    loss, grad_pred_BNP = _empty_outputs(
        pred_BNP, image_BCHW, is_hidden_BN, patch_size_px, normalize_target, needs_grad
    )
    is_float64 = image_BCHW.dtype == torch.float64
    launch = _C.masked_pixel_loss_cpu_float64 if is_float64 else _C.masked_pixel_loss_cpu_float32
    B, _, H, W = image_BCHW.shape
    launch(
        pred=pred_BNP.data_ptr(),
        image=image_BCHW.data_ptr(),
        is_hidden=is_hidden_BN.data_ptr(),
        batch_size=B,
        height=H,
        width=W,
        patch_size=patch_size_px,
        normalize_target=normalize_target,
        num_threads=torch.get_num_threads(),
        loss=loss.data_ptr(),
        grad_pred=grad_pred_BNP.data_ptr() if needs_grad else 0,
    )
    return loss, grad_pred_BNP


def launch_masked_pixel_loss_eager(
    pred_BNP: Tensor,
    image_BCHW: Tensor,
    is_hidden_BN: Tensor,
    patch_size_px: int,
    normalize_target: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Runs the references. Returns the loss and its gradient."""
    inputs = (pred_BNP, image_BCHW, is_hidden_BN, patch_size_px, normalize_target)
    loss = masked_pixel_loss_reference(*inputs)
    return loss, masked_pixel_loss_backward_reference(*inputs) if needs_grad else loss.new_empty(0)


class _MaskedPixelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred_BNP, *inputs):
        loss, grad_pred_BNP = torch.ops.fastm3ae.masked_pixel_loss(pred_BNP, *inputs, True)
        ctx.pred_dtype = pred_BNP.dtype
        ctx.save_for_backward(grad_pred_BNP)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        (grad_pred_BNP,) = ctx.saved_tensors
        return (grad_pred_BNP * grad_loss).to(ctx.pred_dtype), None, None, None, None


torch.library.impl("fastm3ae::masked_pixel_loss", "cpu", launch_masked_pixel_loss_cpu)
# There is no CUDA kernel yet: PyTorch's own operations let the model run on a GPU.
torch.library.impl("fastm3ae::masked_pixel_loss", "cuda", launch_masked_pixel_loss_eager)
torch.library.register_fake("fastm3ae::masked_pixel_loss", _empty_outputs)


def masked_pixel_loss(
    pred_BNP: Tensor, image_BCHW: Tensor, is_hidden_BN: Tensor, *, patch_size_px: int, normalize_target: bool
) -> Tensor:
    """Mean squared error of the predicted pixels over the hidden patches of the whole batch.

    Differentiable once, with respect to ``pred_BNP`` alone. Visible patches are never read; where nothing is hidden
    the loss and its gradient are 0. The result has the same bits whatever the number of threads.

    Args:
        pred_BNP: (B, N, P) predicted pixels of each patch in (row, column, channel) order, P = patch_size_px^2 * 3;
            float32, bfloat16 or float16 with a float32 image, float64 with a float64 image.
        image_BCHW: (B, 3, H, W) image as the model sees it, that is after the normalisation of its channels; float32
            or float64. Its N = (H / patch_size_px) * (W / patch_size_px) patches are in row-major order.
        is_hidden_BN: (B, N) bool, True where the patch was hidden from the encoder.
        patch_size_px: Height and width of a patch in pixels.
        normalize_target: Whether a patch's target is its pixels minus their mean, over their standard deviation
            (unbiased, 1e-6 added to the variance), or the pixels as they are.

    Returns:
        The loss, () in the image's dtype.

    Raises:
        ValueError: A shape, dtype or device is not as above.

    Source:
        compute_mim in m3ae/modules/objectives.py of zhjohnchan/M3AE.
    """
    if image_BCHW.dim() != 4 or image_BCHW.shape[1] != 3 or image_BCHW.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"image must be (B, 3, H, W) float32 or float64, got {_describe(image_BCHW)}")
    B, _, H, W = image_BCHW.shape
    if patch_size_px < 1 or H % patch_size_px or W % patch_size_px:
        raise ValueError(f"patch_size_px must divide the image's {H} x {W} pixels, got {patch_size_px}")
    N, P = (H // patch_size_px) * (W // patch_size_px), patch_size_px * patch_size_px * 3
    dtypes = (torch.float64,) if image_BCHW.dtype == torch.float64 else (torch.float32, *_LOW_PRECISION)
    if pred_BNP.shape != (B, N, P) or pred_BNP.dtype not in dtypes:
        raise ValueError(
            f"pred must be (B, N, P) = ({B}, {N}, {P}) {' or '.join(map(_name, dtypes))} for this image, "
            f"got {_describe(pred_BNP)}"
        )
    if is_hidden_BN.shape != (B, N) or is_hidden_BN.dtype != torch.bool:
        raise ValueError(f"is_hidden must be (B, N) = ({B}, {N}) bool, got {_describe(is_hidden_BN)}")
    if not pred_BNP.device == image_BCHW.device == is_hidden_BN.device:
        raise ValueError(
            f"pred, image and is_hidden must be on one device, "
            f"got {pred_BNP.device}, {image_BCHW.device} and {is_hidden_BN.device}"
        )
    inputs = (pred_BNP, image_BCHW.detach(), is_hidden_BN, patch_size_px, normalize_target)
    if torch.is_grad_enabled() and pred_BNP.requires_grad:
        return _MaskedPixelLoss.apply(*inputs)
    return torch.ops.fastm3ae.masked_pixel_loss(*inputs, False)[0]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {_name(x.dtype)}"
