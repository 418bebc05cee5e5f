"""CLS and the visible patches: a program moves a few rows of one sample, the backward one the same rows of many."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch_gather_patches", "launch_gather_patches_backward", "launch_scatter_patches_"]

# Eight or sixteen elements per thread: one or two loads of 16 bytes of bfloat16.
_BLOCK_L, _BLOCK_L_BACKWARD, _BLOCK_D, _BLOCK_K = 8, 4, 256, 128
# Parts of the batch that are summed apart; a number of its own, so that the sums do not depend on the device.
_NUM_SPLITS = 8


@triton.jit
def _load_keep(keep_ptr, b, k, is_kept, N, K):
    """The patches that stand at places k of sample b, -1 where not is_kept."""
    patch = tl.load(keep_ptr + b * K + k, mask=is_kept, other=-1)
    tl.device_assert((patch >= -1) & (patch < N), "keep must be from 0 to N - 1")
    return patch


@triton.jit
def _gather_patches_fwd_kernel(
    x_ptr, keep_ptr, positions_ptr, cls_ptr, tokens_ptr, N, K, D, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr
):
    dtype = tokens_ptr.dtype.element_ty
    sum_dtype: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    b = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    is_patch = (place > 0) & (place <= K)
    patch = _load_keep(keep_ptr, b, place - 1, is_patch, N, K)
    x = tl.load(x_ptr + (b * N + patch)[:, None] * D + d, mask=is_patch[:, None] & (d < D), other=0.0)
    cls = tl.load(cls_ptr + d, mask=d < D, other=0.0)
    is_token = (place <= K)[:, None] & (d < D)
    positions = tl.load(positions_ptr + (patch + 1)[:, None] * D + d, mask=is_token, other=0.0)
    tokens = tl.where((place == 0)[:, None], cls.to(sum_dtype), x.to(sum_dtype)) + positions.to(sum_dtype)
    tl.store(tokens_ptr + (b * (1 + K) + place)[:, None] * D + d, tokens.to(dtype), mask=is_token)


@triton.jit
def _gather_patches_bwd_kernel(
    grad_ptr,
    keep_ptr,
    grad_x_ptr,
    partial_ptr,
    B,
    N,
    K,
    D,
    samples_per_split,
    NEEDS_POSITIONS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sum_dtype: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    place = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    split = tl.program_id(2)
    is_row = (place <= N)[:, None] & (d < D)
    total = tl.zeros((BLOCK_L, BLOCK_D), dtype=sum_dtype)
    for sample in range(0, tl.minimum(samples_per_split, B - split * samples_per_split)):
        b = split.to(tl.int64) * samples_per_split + sample
        # Where patch place - 1 stands among the tokens, by comparing: a table would cost launches to fill.
        token = tl.zeros((BLOCK_L,), dtype=tl.int32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            patch = _load_keep(keep_ptr, b, k, k < K, N, K)
            token += tl.sum(tl.where((patch + 1)[None, :] == place[:, None], (k + 1)[None, :], 0), axis=1)
        is_seen = (token > 0) | (place == 0)
        # Hidden patches read nothing and get zeros; places beyond K have patch -1, which only CLS would match.
        token = tl.where(place == 0, 0, token)
        grad = tl.load(grad_ptr + (b * (1 + K) + token)[:, None] * D + d, mask=is_seen[:, None] & is_row, other=0.0)
        tl.store(
            grad_x_ptr + (b * N + place - 1)[:, None] * D + d,
            grad.to(grad_x_ptr.dtype.element_ty),
            mask=(place > 0)[:, None] & is_row,
        )
        if NEEDS_POSITIONS:
            total += grad.to(sum_dtype)
    if NEEDS_POSITIONS:
        tl.store(partial_ptr + (split.to(tl.int64) * (1 + N) + place)[:, None] * D + d, total, mask=is_row)


@triton.jit
def _scatter_patches_kernel(x_ptr, update_ptr, keep_ptr, N, K, D, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    dtype = x_ptr.dtype.element_ty
    sum_dtype: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    is_kept = (k < K)[:, None] & (d < D)
    patch = _load_keep(keep_ptr, b, k, k < K, N, K)
    update = tl.load(update_ptr + (b * (1 + K) + k + 1)[:, None] * D + d, mask=is_kept, other=0.0)
    x_ptrs = x_ptr + (b * N + patch)[:, None] * D + d
    x = tl.load(x_ptrs, mask=is_kept, other=0.0)
    tl.store(x_ptrs, (x.to(sum_dtype) + update.to(sum_dtype)).to(dtype), mask=is_kept)


def launch_gather_patches(x_BND: Tensor, keep_BK: Tensor, positions_LD: Tensor, cls_D: Tensor) -> Tensor:
    """Runs the forward kernel. Arguments and result are those of ``gather_patches``."""
    (B, N, D), K = x_BND.shape, keep_BK.shape[1]
    dtype = torch.promote_types(x_BND.dtype, positions_LD.dtype)
    tokens_BLD = x_BND.new_empty((B, 1 + K, D), dtype=dtype)
    if tokens_BLD.numel():
        with torch.cuda.device_of(x_BND):
            _gather_patches_fwd_kernel[B, triton.cdiv(1 + K, _BLOCK_L), triton.cdiv(D, _BLOCK_D)](
                x_BND.contiguous(),
                keep_BK.contiguous(),
                positions_LD.contiguous(),
                cls_D.contiguous(),
                tokens_BLD,
                N,
                K,
                D,
                BLOCK_L=_BLOCK_L,
                BLOCK_D=_BLOCK_D,
            )
    return tokens_BLD


def launch_gather_patches_backward(
    grad_BLD: Tensor, keep_BK: Tensor, num_patches: int, x_dtype: torch.dtype, needs_positions: bool
) -> tuple[Tensor, Tensor]:
    """Runs the backward kernel. Arguments and results are those of ``gather_patches_backward_reference``."""
    B, K, N, D = *keep_BK.shape, num_patches, grad_BLD.shape[-1]
    sum_dtype = torch.promote_types(grad_BLD.dtype, torch.float32)
    grad_x_BND = grad_BLD.new_empty((B, N, D), dtype=x_dtype)
    shape = (_NUM_SPLITS, 1 + N, D) if needs_positions else (0,)
    partial_SLD = grad_BLD.new_empty(shape, dtype=sum_dtype)
    if grad_x_BND.numel() or partial_SLD.numel():
        with torch.cuda.device_of(grad_BLD):
            _gather_patches_bwd_kernel[triton.cdiv(1 + N, _BLOCK_L_BACKWARD), triton.cdiv(D, _BLOCK_D), _NUM_SPLITS](
                grad_BLD.contiguous(),
                keep_BK.contiguous(),
                grad_x_BND,
                partial_SLD,
                B,
                N,
                K,
                D,
                triton.cdiv(B, _NUM_SPLITS),
                NEEDS_POSITIONS=needs_positions,
                BLOCK_L=_BLOCK_L_BACKWARD,
                BLOCK_K=_BLOCK_K,
                BLOCK_D=_BLOCK_D,
            )
    return grad_x_BND, partial_SLD.sum(0) if needs_positions else partial_SLD


def launch_scatter_patches_(x_BND: Tensor, update_BLD: Tensor, keep_BK: Tensor) -> None:
    """Runs the accumulating kernel. Arguments are those of ``scatter_patches_``."""
    (B, N, D), K = x_BND.shape, keep_BK.shape[1]
    if B * K * D:
        with torch.cuda.device_of(x_BND):
            _scatter_patches_kernel[B, triton.cdiv(K, _BLOCK_L), triton.cdiv(D, _BLOCK_D)](
                x_BND,
                update_BLD.contiguous(),
                keep_BK.contiguous(),
                N,
                K,
                D,
                BLOCK_L=_BLOCK_L,
                BLOCK_D=_BLOCK_D,
            )
