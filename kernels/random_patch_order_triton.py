"""Ranks by counting: a program compares a block of an image's patches with all of its patches, block by block."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch_random_patch_order", "launch_random_patch_order_from_seed"]

_BLOCK_N, _BLOCK_M = 64, 32


@triton.jit
def _noise(noise_ptr, seed, b, n, N, FROM_SEED: tl.constexpr):
    """The noise of patches n of sample b, and whether it is NaN; beyond the last patch anything."""
    if FROM_SEED:
        zero = tl.zeros_like(n)
        noise, _, _, _ = tl.philox(seed, n, zero + b, zero, zero)
    else:
        noise = tl.load(noise_ptr + b.to(tl.int64) * N + n, mask=n < N, other=0.0)
    return noise, noise != noise


@triton.jit
def _random_patch_order_fwd_kernel(
    noise_ptr,
    seed_ptr,
    keep_ptr,
    restore_ptr,
    is_hidden_ptr,
    N,
    K,
    FROM_SEED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    b = tl.program_id(0)
    seed = tl.load(seed_ptr) if FROM_SEED else 0
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    noise_n, is_nan_n = _noise(noise_ptr, seed, b, n, N, FROM_SEED)
    num_before = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for start in range(0, N, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        noise_m, is_nan_m = _noise(noise_ptr, seed, b, m, N, FROM_SEED)
        is_less = (noise_m[None, :] < noise_n[:, None]) | (is_nan_n[:, None] & ~is_nan_m[None, :])
        is_equal = (noise_m[None, :] == noise_n[:, None]) | (is_nan_n[:, None] & is_nan_m[None, :])
        is_before = (is_less | (is_equal & (m[None, :] < n[:, None]))) & (m[None, :] < N)
        num_before += is_before.to(tl.int32)
    rank = tl.sum(num_before, axis=1)
    row = b.to(tl.int64) * N + n
    tl.store(restore_ptr + row, rank.to(tl.int64), mask=n < N)
    tl.store(is_hidden_ptr + row, rank >= K, mask=n < N)
    tl.store(keep_ptr + b.to(tl.int64) * K + rank, n.to(tl.int64), mask=(n < N) & (rank < K))


def _launch(
    device_of: Tensor, noise_BN: Tensor | None, seed: Tensor | None, batch_size: int, num_patches: int, num_kept: int
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (batch_size, num_patches)
    keep_BK = device_of.new_empty((batch_size, num_kept), dtype=torch.int64)
    restore_BN = device_of.new_empty(shape, dtype=torch.int64)
    is_hidden_BN = device_of.new_empty(shape, dtype=torch.bool)
    if restore_BN.numel():
        with torch.cuda.device_of(device_of):
            _random_patch_order_fwd_kernel[batch_size, triton.cdiv(num_patches, _BLOCK_N)](
                noise_BN,
                seed,
                keep_BK,
                restore_BN,
                is_hidden_BN,
                num_patches,
                num_kept,
                FROM_SEED=seed is not None,
                BLOCK_N=_BLOCK_N,
                BLOCK_M=_BLOCK_M,
            )
    return keep_BK, restore_BN, is_hidden_BN


def launch_random_patch_order(noise_BN: Tensor, num_kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks given noise. Arguments and results are those of ``random_patch_order``."""
    return _launch(noise_BN, noise_BN.contiguous(), None, *noise_BN.shape, num_kept)


def launch_random_patch_order_from_seed(
    seed: Tensor, batch_size: int, num_patches: int, num_kept: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks noise that is drawn in the kernel. Arguments and results are those of ``random_patch_order_from_seed``."""
    return _launch(seed, None, seed, batch_size, num_patches, num_kept)
