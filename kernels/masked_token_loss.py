"""loss = 1/N sum over the N labelled tokens of log(sum_v exp(x_v)) - x_label, with logits x = weight token + bias.

The gradient with respect to x is (softmax(x) - one_hot(label)) / N; those of token, weight and bias are products of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastm3ae import _C
from fastm3ae.kernels.common import check_one_device, describe, dtype_name
from fastm3ae.kernels.cuda_build import current_stream, require_cuda_build

__all__ = ["masked_token_loss", "masked_token_loss_backward_reference", "masked_token_loss_reference"]

IGNORED_LABEL = -100  # PyTorch's own
# On the CPU the logits of all tokens never exist together. With fewer at a time the products become slower.
_CHUNK_MIB = 128
# On a GPU the logits have a multiple of so many columns: cuBLAS has its fast kernels for rows that begin at multiples
# of 16 bytes, and our kernel reads in such words.
_COLUMNS_MULTIPLE = 64


def masked_token_loss_reference(
    tokens_MD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_M: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss in eager PyTorch: the specification. Arguments and results are those of ``masked_token_loss``."""
    dtype = tokens_MD.dtype
    logits_MV = F.linear(tokens_MD, weight_VD.to(dtype), bias_V.to(dtype))
    loss = F.cross_entropy(logits_MV.to(_loss_dtype(dtype)), labels_M, ignore_index=IGNORED_LABEL, reduction="sum")
    return loss / _num_labelled(labels_M), (logits_MV.argmax(dim=-1) == labels_M).sum()


def masked_token_loss_backward_reference(
    tokens_MD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_M: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss's gradients with respect to tokens, weight and bias."""
    softmax_MV = F.linear(tokens_MD, weight_VD, bias_V).softmax(dim=-1)
    is_labelled_M = labels_M != IGNORED_LABEL
    grad_MV = softmax_MV - F.one_hot(labels_M.where(is_labelled_M, 0), len(weight_VD))
    grad_MV = grad_MV * is_labelled_M[:, None] / _num_labelled(labels_M)
    return grad_MV @ weight_VD, grad_MV.T @ tokens_MD, grad_MV.sum(dim=0)


# The op returns the gradients beside the loss, because the logits are at hand: those of N * loss, which are neither too
# small nor too large for float16, as they can be after the division by N and before the loss scale has reached them.
# What is not needed is empty.
torch.library.define(
    "fastm3ae::masked_token_loss",
    "(Tensor tokens_MD, Tensor weight_VD, Tensor bias_V, Tensor labels_M, bool needs_grad_tokens, "
    "bool needs_grad_weight, bool needs_grad_bias) -> "
    "(Tensor loss, Tensor num_correct, Tensor grad_tokens_MD, Tensor grad_weight_VD, Tensor grad_bias_V)",
)


def _empty_outputs(
    tokens_MD, weight_VD, bias_V, labels_M, needs_grad_tokens, needs_grad_weight, needs_grad_bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss_dtype = _loss_dtype(tokens_MD.dtype)
    return (
        tokens_MD.new_empty((), dtype=loss_dtype),
        labels_M.new_empty(()),
        tokens_MD.new_empty(tokens_MD.shape if needs_grad_tokens else 0),
        tokens_MD.new_empty(weight_VD.shape if needs_grad_weight else 0),
        tokens_MD.new_empty(bias_V.shape if needs_grad_bias else 0, dtype=loss_dtype),
    )


def launch_masked_token_loss_cpu(
    tokens_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    labels_M: Tensor,
    needs_grad_tokens: bool,
    needs_grad_weight: bool,
    needs_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs csrc/masked_token_loss_cpu.cpp between the products, chunk by chunk. Returns the op's results."""
    _check_labels(labels_M, len(weight_VD))
    (M, _), V, dtype = tokens_MD.shape, len(weight_VD), tokens_MD.dtype
    weight_VD, bias_V, labels_M = weight_VD.to(dtype), bias_V.to(dtype), labels_M.contiguous()
    needs = (needs_grad_tokens, needs_grad_weight, needs_grad_bias)
    loss, _, *grads = _empty_outputs(tokens_MD, weight_VD, bias_V, labels_M, *needs)
    grad_tokens_MD, grad_weight_VD, grad_bias_V = grads
    grad_bias_V.zero_()
    if M == 0:
        grad_weight_VD.zero_()
    loss_M, is_correct_M = loss.new_empty(M), labels_M.new_empty(M, dtype=torch.bool)
    launch = _C.masked_token_loss_cpu_float64 if dtype == torch.float64 else _C.masked_token_loss_cpu_float32

    num_chunks = max(1, -(-M * V * loss.itemsize // (_CHUNK_MIB << 20)))
    chunk_size = max(1, -(-M // num_chunks))
    buffer = tokens_MD.new_empty(min(M, chunk_size), V)
    for first in range(0, M, chunk_size):
        chunk = slice(first, min(M, first + chunk_size))
        logits = torch.addmm(bias_V, tokens_MD[chunk], weight_VD.T, out=buffer[: chunk.stop - first])
        logits = logits.to(loss.dtype)
        launch(
            logits=logits.data_ptr(),
            labels=labels_M[chunk].data_ptr(),
            num_tokens=len(logits),
            vocab_size=V,
            needs_grad=any(needs),
            num_threads=torch.get_num_threads(),
            loss=loss_M[chunk].data_ptr(),
            is_correct=is_correct_M[chunk].data_ptr(),
        )
        grad_logits = logits.to(dtype)
        if needs_grad_tokens:
            torch.mm(grad_logits, weight_VD, out=grad_tokens_MD[chunk])
        if needs_grad_weight:
            # With beta = 0 the first chunk writes what the others add to: the weight's gradient is not worth a pass.
            torch.addmm(grad_weight_VD, grad_logits.T, tokens_MD[chunk], beta=min(first, 1), out=grad_weight_VD)
        if needs_grad_bias:
            grad_bias_V += logits.sum(dim=0)
    return loss_M.sum() / _num_labelled(labels_M), is_correct_M.sum(), grad_tokens_MD, grad_weight_VD, grad_bias_V


def launch_masked_token_loss_cuda(
    tokens_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    labels_M: Tensor,
    needs_grad_tokens: bool,
    needs_grad_weight: bool,
    needs_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queues csrc/masked_token_loss.cu between the products on the current stream. Returns the op's results."""
    require_cuda_build("masked_token_loss")
    if torch.is_anomaly_enabled():
        _check_labels(labels_M, len(weight_VD))
    M, V = len(tokens_MD), len(weight_VD)
    num_columns = -(-V // _COLUMNS_MULTIPLE) * _COLUMNS_MULTIPLE
    weight, bias = tokens_MD.new_empty(num_columns, weight_VD.shape[1]), tokens_MD.new_empty(num_columns)
    weight[:V], bias[:V], labels_M = weight_VD, bias_V, labels_M.contiguous()
    # Logits of -infinity behind the vocabulary have the probability and the gradient 0.
    weight[V:], bias[V:] = 0, -torch.inf
    needs = (needs_grad_tokens, needs_grad_weight, needs_grad_bias)
    _, _, grad_tokens_MD, grad_weight_VD, grad_bias_V = _empty_outputs(tokens_MD, weight_VD, bias_V, labels_M, *needs)
    loss_M = tokens_MD.new_empty(M, dtype=torch.float32)
    is_correct_M = labels_M.new_empty(M, dtype=torch.bool)

    logits = torch.addmm(bias, tokens_MD, weight.T)
    _C.masked_token_loss_cuda(
        logits_dtype=dtype_name(logits.dtype),
        logits=logits.data_ptr(),
        labels=labels_M.data_ptr(),
        num_tokens=M,
        vocab_size=V,
        num_columns=num_columns,
        needs_grad=any(needs),
        device=logits.get_device(),
        stream=current_stream(logits),
        loss=loss_M.data_ptr(),
        is_correct=is_correct_M.data_ptr(),
    )
    if needs_grad_tokens:
        grad_tokens_MD = torch.mm(logits, weight)
    if needs_grad_weight:
        grad_weight_VD = torch.mm(logits.T, tokens_MD)[:V]
    if needs_grad_bias:
        grad_bias_V = logits.sum(dim=0, dtype=torch.float32)[:V]
    return loss_M.sum() / _num_labelled(labels_M), is_correct_M.sum(), grad_tokens_MD, grad_weight_VD, grad_bias_V


def _num_labelled(labels_M: Tensor) -> Tensor:
    return (labels_M != IGNORED_LABEL).sum().clamp(min=1)


def _check_labels(labels_M: Tensor, vocab_size: int) -> None:
    wrong = labels_M[((labels_M < 0) & (labels_M != IGNORED_LABEL)) | (labels_M >= vocab_size)]
    if len(wrong):
        raise IndexError(f"labels must be from 0 to {vocab_size - 1}, got {wrong[0].item()}")


class _MaskedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens_MD, weight_VD, bias_V, labels_M):
        inputs = (tokens_MD, weight_VD, bias_V)
        loss, num_correct, *grads = torch.ops.fastm3ae.masked_token_loss(*inputs, labels_M, *ctx.needs_input_grad[:3])
        ctx.dtypes = [x.dtype for x in inputs]
        ctx.save_for_backward(_num_labelled(labels_M), *grads)
        ctx.mark_non_differentiable(num_correct)
        return loss, num_correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        # One dimension makes the factor take part in the promotion of dtypes: the product is rounded once, at its end.
        num_labelled, *grads = ctx.saved_tensors
        factor = (grad_loss / num_labelled).view(1)
        grads = [
            torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype)) if is_needed else None
            for grad, dtype, is_needed in zip(grads, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        return *grads, None


torch.library.impl("fastm3ae::masked_token_loss", "cpu", launch_masked_token_loss_cpu)
torch.library.impl("fastm3ae::masked_token_loss", "cuda", launch_masked_token_loss_cuda)
torch.library.register_fake("fastm3ae::masked_token_loss", _empty_outputs)


def masked_token_loss(tokens_MD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of a linear layer's logits at the labelled tokens, and at how many of them it is right.

    Differentiable once. The logits are rounded to the tokens' dtype, the rest is computed in float32 (float64 for
    float64 tokens); no (M, V) tensor outlives the call. Under autocast the tokens are those of autocast's dtype.
    Without labels the loss and its gradients are 0. The result has the same bits in every run.

    Args:
        tokens_MD: (M, D) features of the masked tokens; float32, bfloat16, float16, or on the CPU float64.
        weight_VD: (V, D) weight of the layer, of the tokens' dtype, or float32 and rounded to it.
        bias_V: (V,) bias of the layer, of the tokens' dtype, or float32 and rounded to it.
        labels_M: (M,) int64 true tokens, from 0 to V - 1; -100: the token is passed over. On a GPU others make loss and
            gradient NaN, except in PyTorch's anomaly detection, which is the debug mode.

    Returns:
        The loss, () in float32 (float64 for float64 tokens), and the number of tokens whose label is the first of the
        largest logits, () int64.

    Raises:
        ValueError: A shape, dtype or device is not as above.
        IndexError: A label is not in the vocabulary (on the CPU, and in the debug mode).
        RuntimeError: The tensors are on a GPU, and the CUDA kernels are not built.

    Source:
        compute_mlm in m3ae/modules/objectives.py of zhjohnchan/M3AE.

    Deviation:
        The original computes the logits of all tokens of the text, and gives NaN where none is masked.
    """
    check_one_device(tokens=tokens_MD, weight=weight_VD, bias=bias_V, labels=labels_M)
    device = tokens_MD.device
    can_autocast = torch.amp.is_autocast_available(device.type)  # not on "meta"
    if can_autocast and torch.is_autocast_enabled(device.type) and tokens_MD.dtype == torch.float32:
        tokens_MD = tokens_MD.to(torch.get_autocast_dtype(device.type))
    dtypes = [torch.float32, torch.bfloat16, torch.float16] + [torch.float64] * (device.type == "cpu")
    if tokens_MD.dim() != 2 or tokens_MD.dtype not in dtypes:
        raise ValueError(f"tokens must be (M, D) {_names(dtypes)} on {device.type}, got {describe(tokens_MD)}")
    M, D = tokens_MD.shape
    dtypes = sorted({tokens_MD.dtype, _loss_dtype(tokens_MD.dtype)}, key=str)
    if weight_VD.dim() != 2 or weight_VD.shape[1] != D or weight_VD.dtype not in dtypes:
        raise ValueError(
            f"weight must be (V, D) = (V, {D}) {_names(dtypes)} for these tokens, got {describe(weight_VD)}"
        )
    V = len(weight_VD)
    if bias_V.shape != (V,) or bias_V.dtype not in dtypes:
        raise ValueError(f"bias must be (V,) = ({V},) {_names(dtypes)} for these tokens, got {describe(bias_V)}")
    if labels_M.shape != (M,) or labels_M.dtype != torch.int64:
        raise ValueError(f"labels must be (M,) = ({M},) int64, got {describe(labels_M)}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (tokens_MD, weight_VD, bias_V)):
        return _MaskedTokenLoss.apply(tokens_MD, weight_VD, bias_V, labels_M)
    return torch.ops.fastm3ae.masked_token_loss(tokens_MD, weight_VD, bias_V, labels_M, False, False, False)[:2]


def _loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _names(dtypes: list[torch.dtype]) -> str:
    return " or ".join(map(dtype_name, dtypes))
