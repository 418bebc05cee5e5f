"""What the ops of this folder share: words for tensors in a message, a check, and the way to the Triton launchers."""

import functools
import importlib
from collections.abc import Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["FLOAT_DTYPES", "check_index", "check_one_device", "describe", "dtype_name", "philox", "triton_kernels"]

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """Returns float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def describe(x: Tensor | None) -> str:
    """Returns a tensor's shape and dtype as the messages of ValueErrors say them."""
    return "None" if x is None else f"{tuple(x.shape)} {dtype_name(x.dtype)}"


def check_one_device(**tensors: Tensor | None) -> None:
    """Checks that all tensors that are given, by the names that the message shall say, are on one device.

    Raises:
        ValueError: They are not.
    """
    devices = {name: str(x.device) for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{_join(devices)} must be on one device, got {_join(devices.values())}")


def check_index(name: str, index: Tensor, size: int) -> None:
    """Checks that an index on the CPU, where that waits for nothing, is from 0 to ``size`` - 1.

    Raises:
        IndexError: It is not.
    """
    if index.numel():
        lowest, highest = (extreme.item() for extreme in index.aminmax())
        if lowest < 0 or highest >= size:
            wrong = lowest if lowest < 0 else highest
            raise IndexError(f"{name} must be indices from 0 to {size - 1}, got {wrong}")


def _join(words: Iterable[str]) -> str:
    *rest, last = words
    return f"{', '.join(rest)} and {last}"


def philox(seed: Tensor, counters: Sequence[Tensor | int], num_rounds: int) -> tuple[Tensor, ...]:
    """Philox-4x32 in PyTorch: the specification of what kernels draw.

    Args:
        seed: () int64, the 64 bits of the key.
        counters: Four words from 0 to 2^32 - 1, int64 tensors or numbers that broadcast.
        num_rounds: 10 in general; 7 pass all statistical tests, too.

    Returns:
        Four words, int64 from 0 to 2^32 - 1, of the counters' broadcast shape.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), section 4.3 and table 2.
    """
    word = 0xFFFFFFFF
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, device=seed.device) for c in counters))
    k0, k1 = seed & word, (seed >> 32) & word
    for _ in range(num_rounds):
        # int64 wraps around, so that these are the 64 bits of the unsigned products.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) & word ^ c1 ^ k0, b & word, (a >> 32) & word ^ c3 ^ k1, a & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return c0, c1, c2, c3


@functools.cache
def triton_kernels(op: str) -> ModuleType:
    """Imports kernels/<op>_triton.py, and Triton with it, on the first call with a CUDA tensor.

    Raises:
        RuntimeError: Triton is not installed.
    """
    try:
        return importlib.import_module(f"fastm3ae.kernels.{op}_triton")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError(
            f"{op} of CUDA tensors runs in Triton, which is not installed: pip install 'triton>=3.6', "
            "or move the tensors to the CPU"
        ) from error
