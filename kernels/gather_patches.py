"""tokens[0] = cls + positions[0], tokens[1 + k] = x[keep[k]] + positions[1 + keep[k]]: CLS and the visible patches.

The gradient of x is that of the tokens, put back to the patches they came from, and 0 at hidden ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastm3ae.kernels.common import FLOAT_DTYPES, check_index, check_one_device, describe, triton_kernels

__all__ = [
    "gather_patches",
    "gather_patches_backward_reference",
    "gather_patches_reference",
    "scatter_patches_",
    "scatter_patches_reference_",
]


def gather_patches_reference(x_BND: Tensor, keep_BK: Tensor, positions_LD: Tensor, cls_D: Tensor) -> Tensor:
    """The tokens in eager PyTorch: the specification. Arguments and result are those of ``gather_patches``."""
    dtype = torch.promote_types(x_BND.dtype, positions_LD.dtype)
    x_BKD = x_BND.gather(1, keep_BK[..., None].expand(-1, -1, x_BND.shape[-1])).to(dtype)
    cls_B1D = cls_D.to(dtype).expand(len(x_BND), 1, -1)
    place_BL = F.pad(keep_BK + 1, (1, 0))
    return torch.cat([cls_B1D, x_BKD], dim=1) + positions_LD.to(dtype)[place_BL]


def gather_patches_backward_reference(
    grad_BLD: Tensor, keep_BK: Tensor, num_patches: int, x_dtype: torch.dtype, needs_positions: bool
) -> tuple[Tensor, Tensor]:
    """The gradients: of x, scattered; of the positions, summed over the batch, whose first row is that of CLS too.

    Args:
        grad_BLD: (B, 1 + K, D) gradient of the tokens.
        keep_BK: (B, K) int64.
        num_patches: N.
        x_dtype: What x is.
        needs_positions: Whether the positions' gradient is wanted; it is empty otherwise.

    Returns:
        grad_x_BND: In x's dtype.
        grad_positions_LD: (1 + N, D) float32, or float64 of a float64 gradient.
    """
    B, _, D = grad_BLD.shape
    grad_BLD = grad_BLD.to(_sum_dtype(grad_BLD))
    grad_x_BND = grad_BLD.new_zeros(B, num_patches, D)
    grad_x_BND[torch.arange(B, device=grad_BLD.device)[:, None], keep_BK] = grad_BLD[:, 1:]
    if not needs_positions:
        return grad_x_BND.to(x_dtype), grad_BLD.new_empty(0)
    return grad_x_BND.to(x_dtype), torch.cat([grad_BLD[:, :1].sum(0), grad_x_BND.sum(0)])


def scatter_patches_reference_(x_BND: Tensor, update_BLD: Tensor, keep_BK: Tensor) -> None:
    """The sum in eager PyTorch: the specification. Arguments are those of ``scatter_patches_``."""
    index_BKD = keep_BK[..., None].expand(-1, -1, x_BND.shape[-1])
    x_BND.scatter_add_(1, index_BKD, update_BLD[:, 1:].to(x_BND.dtype))


def launch_gather_patches_cpu(x_BND: Tensor, keep_BK: Tensor, positions_LD: Tensor, cls_D: Tensor) -> Tensor:
    """The reference's sums, whose rows are copied whole and written where they stay."""
    check_index("keep", keep_BK, x_BND.shape[1])
    tokens_BLD = _empty_tokens(x_BND, keep_BK, positions_LD, cls_D)
    x_BKD = x_BND[torch.arange(len(x_BND))[:, None], keep_BK]
    torch.add(x_BKD, F.embedding(keep_BK + 1, positions_LD), out=tokens_BLD[:, 1:])
    tokens_BLD[:, 0] = cls_D.to(tokens_BLD.dtype) + positions_LD[0].to(tokens_BLD.dtype)
    return tokens_BLD


def launch_gather_patches_cuda(x_BND: Tensor, keep_BK: Tensor, positions_LD: Tensor, cls_D: Tensor) -> Tensor:
    """Runs the Triton kernel."""
    return triton_kernels("gather_patches").launch_gather_patches(x_BND, keep_BK, positions_LD, cls_D)


def launch_gather_patches_backward_cuda(
    grad_BLD: Tensor, keep_BK: Tensor, num_patches: int, x_dtype: torch.dtype, needs_positions: bool
) -> tuple[Tensor, Tensor]:
    """Runs the Triton kernel of the backward pass."""
    launch = triton_kernels("gather_patches").launch_gather_patches_backward
    return launch(grad_BLD, keep_BK, num_patches, x_dtype, needs_positions)


def launch_scatter_patches_cuda_(x_BND: Tensor, update_BLD: Tensor, keep_BK: Tensor) -> None:
    """Runs the Triton kernel of the accumulating form."""
    triton_kernels("gather_patches").launch_scatter_patches_(x_BND, update_BLD, keep_BK)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _empty_tokens(x_BND: Tensor, keep_BK: Tensor, positions_LD: Tensor, cls_D: Tensor) -> Tensor:
    B, K = keep_BK.shape
    dtype = torch.promote_types(x_BND.dtype, positions_LD.dtype)
    return x_BND.new_empty((B, 1 + K, x_BND.shape[-1]), dtype=dtype)


def _empty_gradients(
    grad_BLD: Tensor, keep_BK: Tensor, num_patches: int, x_dtype: torch.dtype, needs_positions: bool
) -> tuple[Tensor, Tensor]:
    B, _, D = grad_BLD.shape
    shape = (1 + num_patches, D) if needs_positions else (0,)
    return (
        grad_BLD.new_empty((B, num_patches, D), dtype=x_dtype),
        grad_BLD.new_empty(shape, dtype=_sum_dtype(grad_BLD)),
    )


torch.library.define(
    "fastm3ae::gather_patches", "(Tensor x_BND, Tensor keep_BK, Tensor positions_LD, Tensor cls_D) -> Tensor"
)
torch.library.impl("fastm3ae::gather_patches", "cpu", launch_gather_patches_cpu)
torch.library.impl("fastm3ae::gather_patches", "cuda", launch_gather_patches_cuda)
torch.library.register_fake("fastm3ae::gather_patches", _empty_tokens)

torch.library.define(
    "fastm3ae::gather_patches_backward",
    "(Tensor grad_BLD, Tensor keep_BK, SymInt num_patches, ScalarType x_dtype, bool needs_positions) "
    "-> (Tensor grad_x_BND, Tensor grad_positions_LD)",
)
torch.library.impl("fastm3ae::gather_patches_backward", "cpu", gather_patches_backward_reference)
torch.library.impl("fastm3ae::gather_patches_backward", "cuda", launch_gather_patches_backward_cuda)
torch.library.register_fake("fastm3ae::gather_patches_backward", _empty_gradients)

torch.library.define("fastm3ae::scatter_patches_", "(Tensor(a!) x_BND, Tensor update_BLD, Tensor keep_BK) -> ()")
torch.library.impl("fastm3ae::scatter_patches_", "cpu", scatter_patches_reference_)
torch.library.impl("fastm3ae::scatter_patches_", "cuda", launch_scatter_patches_cuda_)
torch.library.register_fake("fastm3ae::scatter_patches_", lambda x_BND, update_BLD, keep_BK: None)


class _GatherPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BND, keep_BK, positions_LD, cls_D):
        ctx.save_for_backward(keep_BK)
        ctx.num_patches, ctx.dtypes = x_BND.shape[1], (x_BND.dtype, positions_LD.dtype, cls_D.dtype)
        return torch.ops.fastm3ae.gather_patches(x_BND, keep_BK, positions_LD, cls_D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BLD):
        (keep_BK,) = ctx.saved_tensors
        needs_x, _, needs_positions, needs_cls = ctx.needs_input_grad
        x_dtype, positions_dtype, cls_dtype = ctx.dtypes
        grad_x_BND, grad_positions_LD = torch.ops.fastm3ae.gather_patches_backward(
            grad_BLD, keep_BK, ctx.num_patches, x_dtype, needs_positions or needs_cls
        )
        return (
            grad_x_BND if needs_x else None,
            None,
            grad_positions_LD.to(positions_dtype) if needs_positions else None,
            grad_positions_LD[0].to(cls_dtype) if needs_cls else None,
        )


def gather_patches(x_BND: Tensor, keep_BK: Tensor, positions_LD: Tensor, cls_D: Tensor) -> Tensor:
    """Adds positions to the visible patches and puts CLS, with its position, in front of them, in one pass.

    Differentiable once with respect to ``x_BND``, ``positions_LD`` and ``cls_D``. Sums over the batch are float32 and
    have the same bits every time. An index outside 0 ... N - 1 is an error on the CPU; on a GPU it is one with
    TRITON_DEBUG=1, and reads foreign memory without.

    Args:
        x_BND: (B, N, D) embedded patches; float32, float64, bfloat16 or float16.
        keep_BK: (B, K) int64, the visible patches in the order of the result; the indices of a row differ.
        positions_LD: (1 + N, D), the position of CLS and those of the patches; a floating-point dtype as above.
        cls_D: (D,) the CLS token, in the positions' dtype.

    Returns:
        (B, 1 + K, D) in the promoted dtype of x and positions; each sum is rounded once.

    Raises:
        ValueError: A shape, dtype or device is not as above.

    Source:
        ``forward_patch_embed``, ``forward_pos_embed`` and ``random_masking`` of the original's clip_model.py and
        m3ae_module.py.
    """
    if x_BND.dim() != 3 or x_BND.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x must be (B, N, D) in a floating-point dtype, got {describe(x_BND)}")
    B, N, D = x_BND.shape
    _check_keep(keep_BK, B)
    if positions_LD.shape != (1 + N, D) or positions_LD.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"positions must be (1 + N, D) = ({1 + N}, {D}) in a floating-point dtype, got {describe(positions_LD)}"
        )
    if cls_D.shape != (D,) or cls_D.dtype != positions_LD.dtype:
        raise ValueError(f"cls must be (D,) = ({D},) in the positions' dtype, got {describe(cls_D)}")
    check_one_device(x=x_BND, keep=keep_BK, positions=positions_LD, cls=cls_D)
    return _GatherPatches.apply(x_BND, keep_BK, positions_LD, cls_D)


def scatter_patches_(x_BND: Tensor, update_BLD: Tensor, keep_BK: Tensor) -> None:
    """x[keep[k]] += update[1 + k] in place: the gradient of visible patches, added to one that is already there.

    Not differentiable; reads and writes the kept rows alone.

    Args:
        x_BND: (B, N, D) contiguous; float32, float64, bfloat16 or float16.
        update_BLD: (B, 1 + K, D) in x's dtype; its first row, of CLS, is not read.
        keep_BK: (B, K) int64; the indices of a row differ.

    Raises:
        ValueError: A shape, dtype or device is not as above.
    """
    if x_BND.dim() != 3 or x_BND.dtype not in FLOAT_DTYPES or not x_BND.is_contiguous():
        raise ValueError(f"x must be (B, N, D) in a floating-point dtype and contiguous, got {describe(x_BND)}")
    B, _, D = x_BND.shape
    _check_keep(keep_BK, B)
    shape = (B, 1 + keep_BK.shape[1], D)
    if update_BLD.shape != shape or update_BLD.dtype != x_BND.dtype:
        raise ValueError(f"update must be (B, 1 + K, D) = {shape} in x's dtype, got {describe(update_BLD)}")
    check_one_device(x=x_BND, update=update_BLD, keep=keep_BK)
    torch.ops.fastm3ae.scatter_patches_(x_BND, update_BLD, keep_BK)


def _check_keep(keep_BK: Tensor, batch_size: int) -> None:
    if keep_BK.dim() != 2 or len(keep_BK) != batch_size or keep_BK.dtype != torch.int64:
        raise ValueError(f"keep must be (B, K) = ({batch_size}, K) int64, got {describe(keep_BK)}")
