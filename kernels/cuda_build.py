"""What the launchers of csrc's CUDA kernels share: whether the kernels are there, and on which stream they run."""

import torch
from torch import Tensor

from fastm3ae import _C

__all__ = ["current_stream", "require_cuda_build"]


def require_cuda_build(op: str) -> None:
    """Checks that the CUDA kernels were compiled.

    Raises:
        RuntimeError: They were not.
    """
    if not _C.cuda_architectures:
        raise RuntimeError(
            f"{op} of CUDA tensors needs fastm3ae's CUDA kernels, and this installation was built without them. "
            "Install it again where there is an nvcc, or with FASTM3AE_CUDA=1, which fetches one from PyPI "
            "(`fastm3ae doctor` says more); or move the tensors to the CPU."
        )


def current_stream(x: Tensor) -> int:
    """Returns the cudaStream_t on which PyTorch would work on a CUDA tensor."""
    return torch.cuda.current_stream(x.device).cuda_stream
