"""tokens[1 + n] = (x[1 + r] if r < K else mask_token) + positions[1 + n] with r = restore[n]: patches in image order.

CLS stays in front: tokens[0] = x[0] + positions[0]. The mask token's gradient is the sum of that of the hidden
patches' tokens, over the whole batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastm3ae.kernels.common import FLOAT_DTYPES, check_index, check_one_device, describe, triton_kernels

__all__ = ["restore_patches", "restore_patches_backward_reference", "restore_patches_reference"]


def restore_patches_reference(x_BLD: Tensor, restore_BN: Tensor, mask_token_D: Tensor, positions_LD: Tensor) -> Tensor:
    """The tokens in eager PyTorch: the specification. Arguments and result are those of ``restore_patches``."""
    (B, num_visible, D), N = x_BLD.shape, restore_BN.shape[1]
    sum_dtype = _sum_dtype(x_BLD)
    mask_tokens_BMD = mask_token_D.to(sum_dtype).expand(B, N + 1 - num_visible, D)
    x_BND = torch.cat([x_BLD[:, 1:].to(sum_dtype), mask_tokens_BMD], dim=1)
    x_BND = x_BND.gather(1, restore_BN[..., None].expand(-1, -1, D))
    return (torch.cat([x_BLD[:, :1].to(sum_dtype), x_BND], dim=1) + positions_LD.to(sum_dtype)).to(x_BLD.dtype)


def restore_patches_backward_reference(grad_BLD: Tensor, restore_BN: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """The gradients: of x, gathered back; of the mask token, summed over the hidden patches of the batch.

    Args:
        grad_BLD: (B, 1 + N, D) gradient of the tokens.
        restore_BN: (B, N) int64.
        num_kept: K.

    Returns:
        grad_x_BLD: (B, 1 + K, D) in the gradient's dtype.
        grad_mask_token_D: (D,) float32, or float64 of a float64 gradient.
    """
    D = grad_BLD.shape[-1]
    keep_BK = restore_BN.argsort(dim=1)[:, :num_kept]
    grad_x_BKD = grad_BLD[:, 1:].gather(1, keep_BK[..., None].expand(-1, -1, D))
    is_hidden_BN1 = (restore_BN >= num_kept)[..., None]
    hidden_BND = grad_BLD[:, 1:].to(_sum_dtype(grad_BLD)).where(is_hidden_BN1, 0)
    # A sum's order, and so its bits, would follow the strides.
    return torch.cat([grad_BLD[:, :1], grad_x_BKD], dim=1), hidden_BND.contiguous().sum(dim=(0, 1))


def launch_restore_patches_cpu(x_BLD: Tensor, restore_BN: Tensor, mask_token_D: Tensor, positions_LD: Tensor) -> Tensor:
    """Copies rows of one table, all visible tokens and the mask token after them, and adds positions in place."""
    (B, num_visible, D), N = x_BLD.shape, restore_BN.shape[1]
    check_index("restore", restore_BN, N)
    sum_dtype = _sum_dtype(x_BLD)
    rows = torch.cat([x_BLD.reshape(-1, D).to(sum_dtype), mask_token_D[None].to(sum_dtype)])
    first_B1 = torch.arange(B)[:, None] * num_visible
    row_BN = (first_B1 + 1 + restore_BN).where(restore_BN < num_visible - 1, B * num_visible)
    tokens_BLD = F.embedding(torch.cat([first_B1, row_BN], dim=1), rows)
    return tokens_BLD.add_(positions_LD.to(sum_dtype)).to(x_BLD.dtype)


def launch_restore_patches_backward_cpu(grad_BLD: Tensor, restore_BN: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """Copies the visible rows, and sums those of the hidden ones, an image after another, where they are."""
    (B, L, D), N = grad_BLD.shape, restore_BN.shape[1]
    order_BN = torch.empty_like(restore_BN).scatter_(1, restore_BN, torch.arange(N).expand(B, -1))
    row_BL = F.pad(1 + order_BN, (1, 0)) + torch.arange(B)[:, None] * L
    rows, num_hidden = grad_BLD.reshape(-1, D), N - num_kept
    grad_x_BLD = F.embedding(row_BL[:, : 1 + num_kept], rows)
    hidden, starts_B = row_BL[:, 1 + num_kept :].flatten(), torch.arange(B) * num_hidden
    grad_mask_token_BD = F.embedding_bag(hidden, rows.to(_sum_dtype(rows)), starts_B, mode="sum")
    return grad_x_BLD, grad_mask_token_BD.sum(dim=0)


def launch_restore_patches_cuda(
    x_BLD: Tensor, restore_BN: Tensor, mask_token_D: Tensor, positions_LD: Tensor
) -> Tensor:
    """Runs the Triton kernel."""
    return triton_kernels("restore_patches").launch_restore_patches(x_BLD, restore_BN, mask_token_D, positions_LD)


def launch_restore_patches_backward_cuda(grad_BLD: Tensor, restore_BN: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """Runs the Triton kernel of the backward pass."""
    return triton_kernels("restore_patches").launch_restore_patches_backward(grad_BLD, restore_BN, num_kept)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _empty_tokens(x_BLD: Tensor, restore_BN: Tensor, mask_token_D: Tensor, positions_LD: Tensor) -> Tensor:
    B, N = restore_BN.shape
    return x_BLD.new_empty((B, 1 + N, x_BLD.shape[-1]))


def _empty_gradients(grad_BLD: Tensor, restore_BN: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    B, _, D = grad_BLD.shape
    return grad_BLD.new_empty((B, 1 + num_kept, D)), grad_BLD.new_empty((D,), dtype=_sum_dtype(grad_BLD))


torch.library.define(
    "fastm3ae::restore_patches", "(Tensor x_BLD, Tensor restore_BN, Tensor mask_token_D, Tensor positions_LD) -> Tensor"
)
torch.library.impl("fastm3ae::restore_patches", "cpu", launch_restore_patches_cpu)
torch.library.impl("fastm3ae::restore_patches", "cuda", launch_restore_patches_cuda)
torch.library.register_fake("fastm3ae::restore_patches", _empty_tokens)

torch.library.define(
    "fastm3ae::restore_patches_backward",
    "(Tensor grad_BLD, Tensor restore_BN, SymInt num_kept) -> (Tensor grad_x_BLD, Tensor grad_mask_token_D)",
)
torch.library.impl("fastm3ae::restore_patches_backward", "cpu", launch_restore_patches_backward_cpu)
torch.library.impl("fastm3ae::restore_patches_backward", "cuda", launch_restore_patches_backward_cuda)
torch.library.register_fake("fastm3ae::restore_patches_backward", _empty_gradients)


class _RestorePatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BLD, restore_BN, mask_token_D, positions_LD):
        ctx.save_for_backward(restore_BN)
        ctx.num_kept, ctx.mask_token_dtype = x_BLD.shape[1] - 1, mask_token_D.dtype
        return torch.ops.fastm3ae.restore_patches(x_BLD, restore_BN, mask_token_D, positions_LD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BLD):
        (restore_BN,) = ctx.saved_tensors
        needs_x, _, needs_mask_token, _ = ctx.needs_input_grad
        grad_x_BLD, grad_mask_token_D = torch.ops.fastm3ae.restore_patches_backward(grad_BLD, restore_BN, ctx.num_kept)
        return (
            grad_x_BLD if needs_x else None,
            None,
            grad_mask_token_D.to(ctx.mask_token_dtype) if needs_mask_token else None,
            None,
        )


def restore_patches(x_BLD: Tensor, restore_BN: Tensor, mask_token_D: Tensor, positions_LD: Tensor) -> Tensor:
    """Puts visible tokens back into image order, the mask token where a patch was hidden, and adds positions.

    Differentiable once with respect to ``x_BLD`` and ``mask_token_D``; the positions are constants. The mask token's
    gradient is summed in float32 and has the same bits every time. An index outside 0 ... N - 1 is an error on the CPU;
    on a GPU it is one with TRITON_DEBUG=1, and writes foreign memory in the backward pass without.

    Args:
        x_BLD: (B, 1 + K, D) CLS and the visible tokens, in the order in which they were kept; float32, float64,
            bfloat16 or float16.
        restore_BN: (B, N) int64, each row a permutation of 0 ... N - 1: for each patch its place in "kept patches,
            then hidden patches"; N >= K.
        mask_token_D: (D,) the token of hidden patches; a floating-point dtype as above.
        positions_LD: (1 + N, D), the position of CLS and those of the patches, without a gradient; a floating-point
            dtype as above.

    Returns:
        (B, 1 + N, D) in x's dtype; each sum is float32 (float64 where x is) and rounded once.

    Raises:
        ValueError: A shape, dtype or device is not as above, or the positions require a gradient.

    Source:
        ``MIMHead`` in m3ae/modules/prediction_heads.py of zhjohnchan/M3AE.
    """
    if x_BLD.dim() != 3 or x_BLD.shape[1] < 1 or x_BLD.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x must be (B, 1 + K, D) in a floating-point dtype, got {describe(x_BLD)}")
    B, num_visible, D = x_BLD.shape
    if restore_BN.dim() != 2 or len(restore_BN) != B or restore_BN.dtype != torch.int64:
        raise ValueError(f"restore must be (B, N) = ({B}, N) int64, got {describe(restore_BN)}")
    N = restore_BN.shape[1]
    if num_visible - 1 > N:
        raise ValueError(f"x must have at most 1 + N = {1 + N} tokens for restore's patches, got {describe(x_BLD)}")
    if mask_token_D.shape != (D,) or mask_token_D.dtype not in FLOAT_DTYPES:
        raise ValueError(f"mask_token must be (D,) = ({D},) in a floating-point dtype, got {describe(mask_token_D)}")
    if positions_LD.shape != (1 + N, D) or positions_LD.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"positions must be (1 + N, D) = ({1 + N}, {D}) in a floating-point dtype, got {describe(positions_LD)}"
        )
    if positions_LD.requires_grad:
        raise ValueError("positions must not require a gradient, because they get none: detach them")
    check_one_device(x=x_BLD, restore=restore_BN, mask_token=mask_token_D, positions=positions_LD)
    return _RestorePatches.apply(x_BLD, restore_BN, mask_token_D, positions_LD)
