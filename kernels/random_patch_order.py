"""restore[n] = #{m : noise[m] < noise[n], or noise[m] = noise[n] and m < n}, the rank of patch n; keep[restore[n]] = n.

The patches of rank below K are kept, the others hidden. The noise is given, or drawn by Philox from a seed.
"""

import torch
from torch import Tensor

from fastm3ae.kernels.common import describe, philox, triton_kernels

__all__ = [
    "philox_noise",
    "random_patch_order",
    "random_patch_order_from_seed",
    "random_patch_order_from_seed_reference",
    "random_patch_order_reference",
]


def random_patch_order_reference(noise_BN: Tensor, num_kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order by a stable sort: the specification. Arguments and results are those of ``random_patch_order``."""
    order_BN = torch.argsort(noise_BN, dim=1, stable=True)
    rank_BN = torch.arange(noise_BN.shape[1], device=noise_BN.device).expand_as(order_BN)
    restore_BN = torch.empty_like(order_BN).scatter_(1, order_BN, rank_BN)
    return order_BN[:, :num_kept].contiguous(), restore_BN, restore_BN >= num_kept


def philox_noise(seed: Tensor, batch_size: int, num_patches: int) -> Tensor:
    """noise[b, n] = the first word of Philox-4x32-10 with counter (n, b, 0, 0) and the seed's 64 bits as its key.

    So a sample's noise depends on the seed and on its place in the batch, and on nothing else.

    Args:
        seed: () int64.
        batch_size: B.
        num_patches: N.

    Returns:
        (B, N) int64 in [0, 2^32).

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), section 4.3.
    """
    n_N = torch.arange(num_patches, device=seed.device)
    b_B1 = torch.arange(batch_size, device=seed.device)[:, None]
    return philox(seed, (n_N, b_B1, 0, 0), num_rounds=10)[0]


def random_patch_order_from_seed_reference(
    seed: Tensor, batch_size: int, num_patches: int, num_kept: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The order of ``philox_noise``. Arguments and results are those of ``random_patch_order_from_seed``."""
    return random_patch_order_reference(philox_noise(seed, batch_size, num_patches), num_kept)


def launch_random_patch_order_cuda(noise_BN: Tensor, num_kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the Triton kernel on given noise."""
    return triton_kernels("random_patch_order").launch_random_patch_order(noise_BN, num_kept)


def launch_random_patch_order_from_seed_cuda(
    seed: Tensor, batch_size: int, num_patches: int, num_kept: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the Triton kernel, which draws the noise itself."""
    launch = triton_kernels("random_patch_order").launch_random_patch_order_from_seed
    return launch(seed, batch_size, num_patches, num_kept)


def _empty_outputs(x: Tensor, batch_size: int, num_patches: int, num_kept: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (batch_size, num_patches)
    return (
        x.new_empty((batch_size, num_kept), dtype=torch.int64),
        x.new_empty(shape, dtype=torch.int64),
        x.new_empty(shape, dtype=torch.bool),
    )


torch.library.define(
    "fastm3ae::random_patch_order",
    "(Tensor noise_BN, SymInt num_kept) -> (Tensor keep_BK, Tensor restore_BN, Tensor is_hidden_BN)",
)
torch.library.impl("fastm3ae::random_patch_order", "cpu", random_patch_order_reference)
torch.library.impl("fastm3ae::random_patch_order", "cuda", launch_random_patch_order_cuda)
torch.library.register_fake(
    "fastm3ae::random_patch_order", lambda noise_BN, num_kept: _empty_outputs(noise_BN, *noise_BN.shape, num_kept)
)

torch.library.define(
    "fastm3ae::random_patch_order_from_seed",
    "(Tensor seed, SymInt batch_size, SymInt num_patches, SymInt num_kept) "
    "-> (Tensor keep_BK, Tensor restore_BN, Tensor is_hidden_BN)",
)
torch.library.impl("fastm3ae::random_patch_order_from_seed", "cpu", random_patch_order_from_seed_reference)
torch.library.impl("fastm3ae::random_patch_order_from_seed", "cuda", launch_random_patch_order_from_seed_cuda)
torch.library.register_fake("fastm3ae::random_patch_order_from_seed", _empty_outputs)


def random_patch_order(noise_BN: Tensor, num_kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the K patches of each image that have the smallest noise; of equal noise the lower patch counts as smaller.

    NaN counts as larger than every number. Nothing is differentiable.

    Args:
        noise_BN: (B, N) float32 or float64, one number per patch.
        num_kept: K, 0 <= K <= N.

    Returns:
        keep_BK: (B, K) int64, the kept patches by rising noise.
        restore_BN: (B, N) int64, the rank of each patch; ranks from K on are hidden.
        is_hidden_BN: (B, N) bool.

    Raises:
        ValueError: A shape, dtype or number is not as above.

    Source: ``random_masking`` in the original's modules/m3ae_module.py.
    Deviation: The original's sort is unstable, so that ties fall as they may.
    """
    if noise_BN.dim() != 2 or noise_BN.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"noise must be (B, N) float32 or float64, got {describe(noise_BN)}")
    _check_num_kept(num_kept, noise_BN.shape[1])
    return torch.ops.fastm3ae.random_patch_order(noise_BN.detach(), num_kept)


def random_patch_order_from_seed(
    seed: Tensor, *, batch_size: int, num_patches: int, num_kept: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps K random patches of each image: ``random_patch_order`` of ``philox_noise``, which is never stored.

    The result is the same on every device. The seed is a tensor, so that a captured or compiled step can change it.

    Args:
        seed: () int64, on the device of the results.
        batch_size: B.
        num_patches: N < 2^31.
        num_kept: K, 0 <= K <= N.

    Returns:
        What ``random_patch_order`` returns.

    Raises:
        ValueError: A shape, dtype or number is not as above.
    """
    if seed.shape != () or seed.dtype != torch.int64:
        raise ValueError(f"seed must be () int64, got {describe(seed)}")
    if batch_size < 0:
        raise ValueError(f"batch_size must be at least 0, got {batch_size}")
    if not 0 <= num_patches < 2**31:
        raise ValueError(f"num_patches must be at least 0 and below 2^31, got {num_patches}")
    _check_num_kept(num_kept, num_patches)
    return torch.ops.fastm3ae.random_patch_order_from_seed(seed, batch_size, num_patches, num_kept)


def _check_num_kept(num_kept: int, num_patches: int) -> None:
    if not 0 <= num_kept <= num_patches:
        raise ValueError(f"num_kept must be from 0 to the number of patches, {num_patches}, got {num_kept}")
