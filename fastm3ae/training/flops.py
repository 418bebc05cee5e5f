"""FLOPs of a training step, by part of the model.

Counted are matrix products and convolutions, 2 FLOPs for a multiplication with its addition, on tensors without values
(device "meta"), so that it takes seconds and no memory. Attention runs as plain products, because the counter does not
see the CPU's fused kernel. Nor does it see into our own ops: those that multiply matrices have formulas here, in which
attention costs what plain products would, without what a kernel computes again in its backward pass.

A FLOP belongs to the part of the model whose parameters were used last before it, and so does its backward pass.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from fastm3ae.config import ModelConfig
from fastm3ae.model.build import Model, build_model

__all__ = ["DIRECTIONS", "PARTS", "Flops", "FlopsByPart", "count_flops", "model_without_values"]

# By the beginning of a parameter's name.
PARTS = {
    "text.": "text encoder",
    "vision.": "image encoder",
    "text_proj.": "projections",
    "image_proj.": "projections",
    "modality_embeddings.": "projections",
    "fusion.text_layers.": "fusion, text layers",
    "fusion.image_layers.": "fusion, image layers",
    "text_pooler.": "poolers",
    "image_pooler.": "poolers",
    "mlm_head.": "MLM head",
    "mim_decoder.": "MIM decoder",
    "itm_head.": "ITM head",
    "vqa_head.": "VQA head",
    "classification_head.": "classification head",
    "retrieval_head.": "retrieval head",
    "fusion.layers.": "memory fusion",
    "fusion.slots.": "memory fusion",
    "fusion.topk.": "memory fusion",
    "global_head.": "alignment heads",
    "local_head.": "alignment heads",
}
DIRECTIONS = ("forward", "backward")

Flops = Counter[tuple[str, str]]
"""By part and direction."""

# Tensors on "meta" that were copied from the host, and what they were split into, by id; each with its values.
_HOST_VALUES: dict[int, tuple[Tensor, Tensor]] = {}


@register_flop_formula(torch.ops.fastm3ae.masked_token_loss)
def masked_token_loss_flops(tokens, weight, bias, labels, needs_tokens, needs_weight, needs_bias, **_) -> int:
    """Logits and, as the op makes them in its forward pass, the gradients of tokens and weight."""
    (num_masked, width), vocab_size = tokens, weight[0]
    return 2 * num_masked * width * vocab_size * (1 + needs_tokens + needs_weight)


@register_flop_formula(torch.ops.fastm3ae.packed_attention, get_raw=True)
def packed_attention_flops(q_QHd, k_SHd, v_SHd, q_offsets, k_offsets, memory_k_MHd, *_, **__) -> int:
    """Scores and weighted sums."""
    q_lengths, k_lengths = (
        (_HOST_VALUES[id(offsets)][1] if offsets.is_meta else offsets).diff() for offsets in (q_offsets, k_offsets)
    )
    num_weights = int((q_lengths * (k_lengths + len(memory_k_MHd))).sum())
    return 4 * num_weights * q_QHd.shape[1] * q_QHd.shape[2]


@register_flop_formula(torch.ops.fastm3ae.packed_attention_backward, get_raw=True)
def packed_attention_backward_flops(grad_QHd, q_QHd, k_SHd, v_SHd, out_QHd, lse_HQ, *places, **_) -> int:
    """Two products for each of the forward pass."""
    return 2 * packed_attention_flops(q_QHd, k_SHd, v_SHd, *places)


@register_flop_formula(torch.ops.fastm3ae.topk_attention)
def topk_attention_flops(q_shape, k_shape, *_, **__) -> int:
    """Scores and weighted sums, in which most weights are 0."""
    num_queries, num_heads, head_dim = q_shape
    return 4 * num_queries * k_shape[0] * num_heads * head_dim


@register_flop_formula(torch.ops.fastm3ae.topk_attention_backward)
def topk_attention_backward_flops(grad_shape, q_shape, k_shape, *_, **__) -> int:
    """Two products for each of the forward pass."""
    return 2 * topk_attention_flops(q_shape, k_shape)


def model_without_values(config: ModelConfig) -> Model:
    """Returns a model on the device "meta"."""
    with torch.device("meta"):
        return build_model(config).to("meta")  # .to: the decoder's positions come from NumPy


def count_flops(model: Model, losses: Iterable[tuple[str, Tensor]]) -> dict[str, Flops]:
    """Counts the FLOPs of losses and their gradients.

    Args:
        model: The model, without values or with them.
        losses: Gives losses, each with a name, as it computes them.

    Returns:
        For each name, the FLOPs of all losses of that name.
    """
    flops: defaultdict[str, Flops] = defaultdict(Counter)
    with FlopsByPart(model) as counter:
        for name, loss in losses:
            flops[name] += counter.take()
            counter.direction = "backward"
            loss.backward()
            flops[name] += counter.take()
            counter.direction = "forward"
    return dict(flops)


class FlopsByPart(TorchFunctionMode):
    """Attributes what torch's counter counts.

    The part changes when a function gets one of the model's parameters, and in the backward pass when an operation gets
    back what it had saved. Tensors that are made of parameters alone, such as slices, count as parameters.

    Attributes:
        direction: "forward" or "backward": what runs now.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.direction = "forward"
        self.counter = FlopCounterMode(display=False)
        self.context = ExitStack()
        self.part, self.num_seen, self.flops = "before any parameter", 0, Counter()
        self.part_of, self.kept = {}, []
        for name, parameter in model.named_parameters():
            self._keep(parameter, next(part for prefix, part in PARTS.items() if name.startswith(prefix)))

    def __enter__(self) -> "FlopsByPart":
        for context in (sdpa_kernel(SDPBackend.MATH), saved_tensors_hooks(self._save, self._load), self.counter):
            self.context.enter_context(context)
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self.context.__exit__(*exception)
        _HOST_VALUES.clear()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = [*_tensors(args), *_tensors((kwargs or {}).values())]
        parts = [self.part_of[id(tensor)] for tensor in given if id(tensor) in self.part_of]
        reads_attribute = getattr(function, "__name__", "") == "__get__"
        if parts and not reads_attribute:
            self._switch(parts[-1])
        result = function(*args, **(kwargs or {}))
        if parts and len(parts) == len(given) and not reads_attribute:
            for tensor in _tensors([result]):
                self._keep(tensor, parts[-1])
        self._keep_values(function, args, kwargs or {}, result)
        return result

    def _keep_values(self, function, args, kwargs, result) -> None:
        if function is Tensor.to and args[0].device.type == "cpu":
            _HOST_VALUES[id(result)] = result, args[0]
        elif function is Tensor.split and id(args[0]) in _HOST_VALUES:
            values = function(_HOST_VALUES[id(args[0])][1], *args[1:], **kwargs)
            _HOST_VALUES.update((id(part), (part, value)) for part, value in zip(result, values, strict=True))

    def _keep(self, tensor: Tensor, part: str) -> None:
        self.kept.append(tensor)  # so that no other tensor gets its id
        self.part_of[id(tensor)] = part

    def _save(self, tensor: Tensor) -> tuple[str, Tensor]:
        return self.part, tensor

    def _load(self, saved: tuple[str, Tensor]) -> Tensor:
        self._switch(saved[0])
        return saved[1]

    def _switch(self, part: str) -> None:
        num_counted = self.counter.get_total_flops()
        if num_counted > self.num_seen:
            self.flops[self.part, self.direction] += num_counted - self.num_seen
        self.part, self.num_seen = part, num_counted

    def take(self) -> Flops:
        """Returns what was counted since the last time."""
        self._switch("before any parameter")
        taken, self.flops = self.flops, Counter()
        return taken


def _tensors(values: Iterable) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
