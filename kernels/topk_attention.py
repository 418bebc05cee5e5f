"""out[i] = sum_j w[i, j] v[j] with w[i, j] = softmax_j(q[i] . k[j] / sqrt(d)), over the K keys of largest score.

The keys are the same for all queries; those that are kept are each query's own, in each head. Of equal scores the one
of the lower index counts as larger.
"""

import torch
from torch import Tensor

from fastm3ae.kernels.common import FLOAT_DTYPES, check_one_device, describe, triton_kernels
from fastm3ae.kernels.packed_attention import CUDA_DTYPES, CUDA_HEAD_DIMS
from fastm3ae.kernels.topk_attention_cpu import topk_attention_backward_cpu, topk_attention_cpu

__all__ = ["topk_attention", "topk_attention_reference"]


def topk_attention_reference(q_SHd: Tensor, k_MHd: Tensor, v_MHd: Tensor, num_kept: int) -> Tensor:
    """The sums by a stable sort of all scores: the specification. Arguments and result are those of the op."""
    sum_dtype = torch.promote_types(q_SHd.dtype, torch.float32)
    q_HSd, k_HMd, v_HMd = (x.transpose(0, 1).to(sum_dtype) for x in (q_SHd, k_MHd, v_MHd))
    products_HSM = q_HSd @ k_HMd.mT
    index_HSK = products_HSM.sort(dim=-1, descending=True, stable=True).indices[..., :num_kept]
    weights_HSK = (products_HSM.gather(-1, index_HSK) * q_SHd.shape[-1] ** -0.5).softmax(dim=-1)
    weights_HSM = torch.zeros_like(products_HSM).scatter(-1, index_HSK, weights_HSK)
    return (weights_HSM @ v_HMd).transpose(0, 1).to(q_SHd.dtype)


def launch_topk_attention_cuda(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the Triton kernel."""
    return triton_kernels("topk_attention").launch_topk_attention(*arguments)


def launch_topk_attention_backward_cuda(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the Triton kernels of the backward pass."""
    return triton_kernels("topk_attention").launch_topk_attention_backward(*arguments)


def _empty_out(q_SHd: Tensor, k_MHd: Tensor, v_MHd: Tensor, num_kept: int) -> tuple[Tensor, Tensor, Tensor]:
    S, H, _ = q_SHd.shape
    if q_SHd.is_cuda:
        kept_shape, softmax_shape = (H, S, (len(k_MHd) + 31) // 32), (H, S)
    else:
        kept_shape = softmax_shape = (H, S, num_kept)
    softmax_dtype = torch.promote_types(q_SHd.dtype, torch.float32)
    return (
        q_SHd.new_empty(q_SHd.shape),
        q_SHd.new_empty(kept_shape, dtype=torch.int32),
        q_SHd.new_empty(softmax_shape, dtype=softmax_dtype),
    )


def _empty_gradients(grad_SHd, q_SHd, k_MHd, v_MHd, *_) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (q_SHd, k_MHd, v_MHd))


# What the backward pass needs of the forward pass: on the CPU the kept keys' indices and their weights, on CUDA a bit
# for each key and the logarithm of the sum of the exponentials.
torch.library.define(
    "fastm3ae::topk_attention",
    "(Tensor q_SHd, Tensor k_MHd, Tensor v_MHd, SymInt num_kept) -> (Tensor out_SHd, Tensor kept, Tensor softmax)",
)
torch.library.impl("fastm3ae::topk_attention", "cpu", topk_attention_cpu)
torch.library.impl("fastm3ae::topk_attention", "cuda", launch_topk_attention_cuda)
torch.library.register_fake("fastm3ae::topk_attention", _empty_out)

torch.library.define(
    "fastm3ae::topk_attention_backward",
    "(Tensor grad_SHd, Tensor q_SHd, Tensor k_MHd, Tensor v_MHd, Tensor out_SHd, Tensor kept, Tensor softmax) -> "
    "(Tensor grad_q_SHd, Tensor grad_k_MHd, Tensor grad_v_MHd)",
)
torch.library.impl("fastm3ae::topk_attention_backward", "cpu", topk_attention_backward_cpu)
torch.library.impl("fastm3ae::topk_attention_backward", "cuda", launch_topk_attention_backward_cuda)
torch.library.register_fake("fastm3ae::topk_attention_backward", _empty_gradients)


def _save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output)


@torch.autograd.function.once_differentiable
def _backward(ctx, grad_SHd: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    if grad_SHd is None:
        return (None,) * 4
    return *torch.ops.fastm3ae.topk_attention_backward(grad_SHd, *ctx.saved_tensors), None


# As of packed attention, because one tensor may be both keys and values.
torch.library.register_autograd("fastm3ae::topk_attention", _backward, setup_context=_save_for_backward)


def topk_attention(q_SHd: Tensor, k_MHd: Tensor, v_MHd: Tensor, num_kept: int) -> Tensor:
    """Lets each query attend, in each head, to those of the memory's slots whose keys match it best.

    Differentiable once with respect to q, k and v, with the same bits every time; which keys are kept counts as
    constant. Sums are in float32 (float64 of float64), and so is what decides: the product of query and key before the
    division by sqrt(d). Scores of all keys never exist together. With NaN in a query, or in a key of its head, the
    result is NaN.

    Args:
        q_SHd: (S, H, d), the queries; float32, bfloat16, float16, or on the CPU float64. Strided views are read where
            they are, if their last dimension is contiguous. On CUDA d is 32 or 64.
        k_MHd: (M, H, d) in the same dtype, the keys of all queries.
        v_MHd: (M, H, d) in the same dtype, their values.
        num_kept: K, how many keys a query attends to, from 1 to M.

    Returns:
        (S, H, d) in q's dtype.

    Raises:
        ValueError: A shape, dtype, device or number is not as above.

    Source:
        Chen et al., "Cross-modal Memory Networks for Radiology Report Generation" (ACL 2021), section 2.2.
    """
    if q_SHd.dim() != 3 or not q_SHd.shape[2] or q_SHd.dtype not in FLOAT_DTYPES:
        raise ValueError(f"q must be (S, H, d) in a floating-point dtype, d > 0, got {describe(q_SHd)}")
    _, H, d = q_SHd.shape
    for name, x_MHd in (("k", k_MHd), ("v", v_MHd)):
        if x_MHd.dim() != 3 or x_MHd.shape != (len(k_MHd), H, d) or x_MHd.dtype != q_SHd.dtype:
            raise ValueError(f"{name} must be (M, {H}, {d}) in q's dtype, as many as k, got {describe(x_MHd)}")
    if not 1 <= num_kept <= len(k_MHd):
        raise ValueError(f"num_kept must be from 1 to the number of keys, {len(k_MHd)}, got {num_kept}")
    check_one_device(q=q_SHd, k=k_MHd, v=v_MHd)
    if q_SHd.is_cuda and (d not in CUDA_HEAD_DIMS or q_SHd.dtype not in CUDA_DTYPES):
        raise ValueError(f"q must have d = 32 or 64 and no float64 on CUDA, got {describe(q_SHd)}")
    return torch.ops.fastm3ae.topk_attention(q_SHd, k_MHd, v_MHd, num_kept)[0]
