"""Front door of the kernels: ``fastm3ae.kernels.<op>`` are the checked public functions.

The files live in the folder ``kernels`` of the repository, next to the package, and are installed into the package.
That folder has no ``__init__.py``, because a top-level package of this name would shadow Hugging Face's ``kernels``.
"""

from pathlib import Path

try:
    from fastm3ae import _C
except ImportError as error:
    raise ImportError(
        f"fastm3ae's C++ kernels are not built in {Path(__file__).parent}: run `pip install .` in the repository and "
        "start Python from another folder, or `pip install -e .` to work on the checkout itself."
    ) from error

_installed, _checkout = Path(__file__).parent / "kernels", Path(__file__).parents[1] / "kernels"
__path__ = [str(_installed if _installed.is_dir() else _checkout)]

from fastm3ae.kernels.gather_image_patches import gather_image_patches  # noqa: E402
from fastm3ae.kernels.gather_patches import gather_patches, scatter_patches_  # noqa: E402
from fastm3ae.kernels.masked_pixel_loss import masked_pixel_loss  # noqa: E402
from fastm3ae.kernels.masked_token_loss import IGNORED_LABEL as IGNORED_LABEL  # noqa: E402
from fastm3ae.kernels.masked_token_loss import masked_token_loss  # noqa: E402
from fastm3ae.kernels.memory_attention import memory_attention  # noqa: E402
from fastm3ae.kernels.packed_attention import CUDA_HEAD_DIMS, packed_attention  # noqa: E402
from fastm3ae.kernels.random_patch_order import random_patch_order, random_patch_order_from_seed  # noqa: E402
from fastm3ae.kernels.resize_crop import resize_crop  # noqa: E402
from fastm3ae.kernels.restore_patches import restore_patches  # noqa: E402
from fastm3ae.kernels.topk_attention import topk_attention  # noqa: E402

__all__ = [
    "gather_image_patches",
    "gather_patches",
    "masked_pixel_loss",
    "masked_token_loss",
    "memory_attention",
    "packed_attention",
    "random_patch_order",
    "random_patch_order_from_seed",
    "resize_crop",
    "restore_patches",
    "scatter_patches_",
    "topk_attention",
]

CUDA_ARCHITECTURES: tuple[str, ...] = _C.cuda_architectures
"""What the CUDA kernels were compiled for, such as sm_80 or compute_90; empty where they were not."""
CUDA_VERSION: str | None = _C.cuda_version
"""The version of the nvcc that compiled them."""
PACKED_ATTENTION_HEAD_DIMS: tuple[int, ...] = CUDA_HEAD_DIMS
"""The widths of a head that packed_attention and topk_attention take on a GPU."""
