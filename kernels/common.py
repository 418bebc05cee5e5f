"""What the ops of this folder share: words for a tensor in a message, and the way to the Triton launchers."""

import functools
import importlib
from types import ModuleType

from torch import Tensor

__all__ = ["describe", "triton_kernels"]


def describe(x: Tensor) -> str:
    """Returns a tensor's shape and dtype as the messages of ValueErrors say them."""
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


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
