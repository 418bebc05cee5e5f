"""Unshuffled tokens: a program moves a few rows of one sample; the backward one a quarter of a sample, summing."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch_restore_patches", "launch_restore_patches_backward"]

# Eight elements per thread: one load of 16 bytes of bfloat16.
_BLOCK_L, _BLOCK_D = 8, 128
# Parts of a sample that are summed apart; a number of its own, so that the sum does not depend on the device.
_NUM_SPLITS = 4


@triton.jit
def _load_source(restore_ptr, b, place, N):
    """From which of "CLS, kept patches, hidden patches" the tokens at these places come; N + 1 beyond the last."""
    rank = tl.load(restore_ptr + b * N + place - 1, mask=(place > 0) & (place <= N), other=0)
    tl.device_assert((rank >= 0) & (rank < N) | (place == 0) | (place > N), "restore must be from 0 to N - 1")
    return tl.where(place == 0, 0, tl.where(place <= N, 1 + rank, N + 1))


@triton.jit
def _restore_patches_fwd_kernel(
    x_ptr,
    restore_ptr,
    mask_token_ptr,
    positions_ptr,
    tokens_ptr,
    N,
    K,
    D,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype = tokens_ptr.dtype.element_ty
    sum_dtype: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    b = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    source = _load_source(restore_ptr, b, place, N)
    is_visible = (source <= K)[:, None]
    is_token = (place <= N)[:, None] & (d < D)
    x = tl.load(x_ptr + (b * (1 + K) + source)[:, None] * D + d, mask=is_visible & is_token, other=0.0)
    mask_token = tl.load(mask_token_ptr + d, mask=d < D, other=0.0)
    positions = tl.load(positions_ptr + place[:, None].to(tl.int64) * D + d, mask=is_token, other=0.0)
    tokens = tl.where(is_visible, x.to(sum_dtype), mask_token.to(sum_dtype)) + positions.to(sum_dtype)
    tl.store(tokens_ptr + (b * (1 + N) + place)[:, None] * D + d, tokens.to(dtype), mask=is_token)


@triton.jit
def _restore_patches_bwd_kernel(
    grad_ptr,
    restore_ptr,
    grad_x_ptr,
    partial_ptr,
    N,
    K,
    D,
    places_per_split,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sum_dtype: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_L, BLOCK_D), dtype=sum_dtype)
    for start in range(0, places_per_split, BLOCK_L):
        in_split = start + tl.arange(0, BLOCK_L)
        place = split * places_per_split + in_split
        source = _load_source(restore_ptr, b, place, N)
        is_token = ((in_split < places_per_split) & (place <= N))[:, None] & (d < D)[None, :]
        grad = tl.load(grad_ptr + (b * (1 + N) + place)[:, None] * D + d[None, :], mask=is_token, other=0.0)
        is_visible = (source <= K)[:, None]
        grad_x_ptrs = grad_x_ptr + (b * (1 + K) + source)[:, None] * D + d[None, :]
        tl.store(grad_x_ptrs, grad, mask=is_token & is_visible)
        total += tl.where(is_visible, 0.0, grad.to(sum_dtype))
    tl.store(partial_ptr + (b * tl.num_programs(1) + split) * D + d, tl.sum(total, axis=0), mask=d < D)


def launch_restore_patches(x_BLD: Tensor, restore_BN: Tensor, mask_token_D: Tensor, positions_LD: Tensor) -> Tensor:
    """Runs the forward kernel. Arguments and result are those of ``restore_patches``."""
    (B, N), K, D = restore_BN.shape, x_BLD.shape[1] - 1, x_BLD.shape[2]
    tokens_BLD = x_BLD.new_empty((B, 1 + N, D))
    if tokens_BLD.numel():
        with torch.cuda.device_of(x_BLD):
            _restore_patches_fwd_kernel[B, triton.cdiv(1 + N, _BLOCK_L), triton.cdiv(D, _BLOCK_D)](
                x_BLD.contiguous(),
                restore_BN.contiguous(),
                mask_token_D.contiguous(),
                positions_LD.contiguous(),
                tokens_BLD,
                N,
                K,
                D,
                BLOCK_L=_BLOCK_L,
                BLOCK_D=_BLOCK_D,
            )
    return tokens_BLD


def launch_restore_patches_backward(grad_BLD: Tensor, restore_BN: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """Runs the backward kernel. Arguments and results are those of ``restore_patches_backward_reference``."""
    (B, N), D = restore_BN.shape, grad_BLD.shape[-1]
    grad_x_BLD = grad_BLD.new_empty((B, 1 + num_kept, D))
    sum_dtype = torch.promote_types(grad_BLD.dtype, torch.float32)
    partial_BSD = grad_BLD.new_empty((B, _NUM_SPLITS, D), dtype=sum_dtype)
    if grad_x_BLD.numel():
        with torch.cuda.device_of(grad_BLD):
            _restore_patches_bwd_kernel[B, _NUM_SPLITS, triton.cdiv(D, _BLOCK_D)](
                grad_BLD.contiguous(),
                restore_BN.contiguous(),
                grad_x_BLD,
                partial_BSD,
                N,
                num_kept,
                D,
                triton.cdiv(1 + N, _NUM_SPLITS),
                BLOCK_L=_BLOCK_L,
                BLOCK_D=_BLOCK_D,
            )
    return grad_x_BLD, partial_BSD.sum(dim=(0, 1))
