"""FLOPs per sample of a pre-training step at the official configuration: ViT-B/16 at 288 px, RoBERTa-base, 64 tokens.

    python benchmarks/flops.py            # a table for each step: part of the model x objective, forward / backward
    python benchmarks/flops.py --check    # and exit with 1 when a step misses its target

Counted are matrix products and convolutions, 2 FLOPs for a multiplication with its addition, on tensors without values
(device "meta"), so that it takes seconds and no memory. Attention runs as plain products, because the counter does not
see the CPU's fused kernel. Nor does it see into our own ops: those that multiply matrices have formulas here, in which
attention costs what plain products would, without what a kernel computes again in its backward pass.

A FLOP belongs to the part of the model whose parameters were used last before it, and so does its backward pass.
"""

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import original_step
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from fastm3ae import objectives
from fastm3ae.config import M3AEConfig
from fastm3ae.data.batch import PretrainBatch
from fastm3ae.model.m3ae import M3AE
from fastm3ae.presets import preset

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
}
DIRECTIONS = ("forward", "backward")
NUM_PAIRS, NUM_TOKENS = 2, 64

# For each loss that a step gives, by name: FLOPs by part and direction.
Flops = dict[str, Counter[tuple[str, str]]]


@dataclass(frozen=True)
class Case:
    """A step, the texts that it is counted on, and what it must reach.

    Args:
        title: What is counted.
        losses: Gives the step's losses, each with the name of its column; it may run lazily.
        num_valid: Tokens of a text that are not padding.
        num_masked: Tokens of a text that are masked.
        host_fields: Tensors of the batch whose values the step reads.
        target: The target in words.
        is_met: Whether so many FLOPs per sample, forward and in total, meet it.
    """

    title: str
    losses: Callable[[M3AE, PretrainBatch], Iterable[tuple[str, Tensor]]]
    num_valid: int
    num_masked: int
    host_fields: tuple[str, ...]
    target: str
    is_met: Callable[[int, int], bool]


def packed(model: M3AE, batch: PretrainBatch) -> Iterable[tuple[str, Tensor]]:
    yield "all", objectives.total(objectives.losses(model(batch, step="packed"), batch, model.config))


def original(model: M3AE, batch: PretrainBatch) -> Iterator[tuple[str, Tensor]]:
    for objective, outputs in original_step.passes(model, batch):
        yield objective, outputs.loss


# Tensors on "meta" that were copied from the host, and what they were split into, by id; each with its values.
HOST_VALUES: dict[int, tuple[Tensor, Tensor]] = {}


@register_flop_formula(torch.ops.fastm3ae.masked_token_loss)
def masked_token_loss_flops(tokens, weight, bias, labels, needs_tokens, needs_weight, needs_bias, **_) -> int:
    """Logits and, as the op makes them in its forward pass, the gradients of tokens and weight."""
    (num_masked, width), vocab_size = tokens, weight[0]
    return 2 * num_masked * width * vocab_size * (1 + needs_tokens + needs_weight)


@register_flop_formula(torch.ops.fastm3ae.packed_attention, get_raw=True)
def packed_attention_flops(q_QHd, k_SHd, v_SHd, q_offsets, k_offsets, memory_k_MHd, *_, **__) -> int:
    """Scores and weighted sums."""
    q_lengths, k_lengths = (
        (HOST_VALUES[id(offsets)][1] if offsets.is_meta else offsets).diff() for offsets in (q_offsets, k_offsets)
    )
    num_weights = int((q_lengths * (k_lengths + len(memory_k_MHd))).sum())
    return 4 * num_weights * q_QHd.shape[1] * q_QHd.shape[2]


@register_flop_formula(torch.ops.fastm3ae.packed_attention_backward, get_raw=True)
def packed_attention_backward_flops(grad_QHd, q_QHd, k_SHd, v_SHd, out_QHd, lse_HQ, *places, **_) -> int:
    """Two products for each of the forward pass."""
    return 2 * packed_attention_flops(q_QHd, k_SHd, v_SHd, *places)


# The original's own code was counted with the same formulas: these are its numbers.
ORIGINAL_FLOPS = (277_776_758_784, 800_875_573_248)
CASES = (
    Case(
        title="the original's step",
        losses=original,
        num_valid=64,
        num_masked=10,
        host_fields=("itm_labels_B",),
        target="exactly {:,} forward, {:,} in total".format(*ORIGINAL_FLOPS),
        is_met=lambda forward, total: (forward, total) == ORIGINAL_FLOPS,
    ),
    Case(
        title="the packed step",
        losses=packed,
        num_valid=40,
        num_masked=6,
        host_fields=(),
        target="at most 612 GFLOP in total",
        is_met=lambda forward, total: total <= 612e9,
    ),
    Case(
        title="the packed step on short texts",
        losses=packed,
        num_valid=25,
        num_masked=4,
        host_fields=(),
        target="at most 576 GFLOP in total",
        is_met=lambda forward, total: total <= 576e9,
    ),
)


class FlopsByPart(TorchFunctionMode):
    """Attributes what torch's counter counts.

    The part changes when a function gets one of the model's parameters, and in the backward pass when an operation gets
    back what it had saved. Tensors that are made of parameters alone, such as slices, count as parameters.

    Attributes:
        direction: "forward" or "backward": what runs now.
    """

    def __init__(self, model: M3AE) -> None:
        super().__init__()
        self.direction = "forward"
        self.counter = FlopCounterMode(display=False)
        self.context = ExitStack()
        self.part, self.num_seen, self.flops = "before any parameter", 0, Counter()
        self.part_of, self.kept = {}, []
        for name, parameter in model.named_parameters():
            self.keep(parameter, next(part for prefix, part in PARTS.items() if name.startswith(prefix)))

    def __enter__(self) -> "FlopsByPart":
        for context in (sdpa_kernel(SDPBackend.MATH), saved_tensors_hooks(self.save, self.load), self.counter):
            self.context.enter_context(context)
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self.context.__exit__(*exception)
        HOST_VALUES.clear()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = [*tensors(args), *tensors((kwargs or {}).values())]
        parts = [self.part_of[id(tensor)] for tensor in given if id(tensor) in self.part_of]
        reads_attribute = getattr(function, "__name__", "") == "__get__"
        if parts and not reads_attribute:
            self.switch(parts[-1])
        result = function(*args, **(kwargs or {}))
        if parts and len(parts) == len(given) and not reads_attribute:
            for tensor in tensors([result]):
                self.keep(tensor, parts[-1])
        self.keep_values(function, args, kwargs or {}, result)
        return result

    def keep_values(self, function, args, kwargs, result) -> None:
        if function is Tensor.to and args[0].device.type == "cpu":
            HOST_VALUES[id(result)] = result, args[0]
        elif function is Tensor.split and id(args[0]) in HOST_VALUES:
            values = function(HOST_VALUES[id(args[0])][1], *args[1:], **kwargs)
            HOST_VALUES.update((id(part), (part, value)) for part, value in zip(result, values, strict=True))

    def keep(self, tensor: Tensor, part: str) -> None:
        self.kept.append(tensor)  # so that no other tensor gets its id
        self.part_of[id(tensor)] = part

    def save(self, tensor: Tensor) -> tuple[str, Tensor]:
        return self.part, tensor

    def load(self, saved: tuple[str, Tensor]) -> Tensor:
        self.switch(saved[0])
        return saved[1]

    def switch(self, part: str) -> None:
        num_counted = self.counter.get_total_flops()
        if num_counted > self.num_seen:
            self.flops[self.part, self.direction] += num_counted - self.num_seen
        self.part, self.num_seen = part, num_counted

    def take(self) -> Counter[tuple[str, str]]:
        """Returns what was counted since the last time."""
        self.switch("before any parameter")
        taken, self.flops = self.flops, Counter()
        return taken


def tensors(values: Iterable) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors(value)


def official_config() -> M3AEConfig:
    """The preset m3ae with RoBERTa's vocabulary."""
    config = preset("m3ae").model
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=50265, pad_token_id=1))


def make_inputs(case: Case) -> tuple[M3AE, PretrainBatch]:
    """Returns a model and a batch that have shapes and no values, but for what the step reads on the host."""
    config = official_config()
    with torch.device("meta"):
        model = M3AE(config).to("meta")  # .to: the decoder's positions come from NumPy
    batch = original_step.make_batch(config, [case.num_valid] * NUM_PAIRS, case.num_masked, NUM_TOKENS)
    host = {name: getattr(batch, name) for name in case.host_fields}
    return model, dataclasses.replace(batch.to("meta"), **host)


def count(case: Case) -> Flops:
    """Counts a step's FLOPs, those of all samples together."""
    model, batch = make_inputs(case)
    flops = {}
    with FlopsByPart(model) as counter:
        for name, loss in case.losses(model, batch):
            flops[name] = counter.take()
            counter.direction = "backward"
            loss.backward()
            flops[name] += counter.take()
            counter.direction = "forward"
    return flops


def per_sample(flops: Mapping[str, Mapping[tuple[str, str], int]], direction: str) -> int:
    num_flops = sum(num for column in flops.values() for (_, way), num in column.items() if way == direction)
    assert num_flops % NUM_PAIRS == 0
    return num_flops // NUM_PAIRS


def print_table(flops: Flops) -> None:
    print(f"{'GFLOP, forward / backward':28}" + "".join(f"{name:>20}" for name in flops))
    for part in [*dict.fromkeys(PARTS.values()), "total"]:
        cells = []
        for column in flops.values():
            sums = [
                sum(num for (name, way), num in column.items() if way == direction and part in (name, "total"))
                for direction in DIRECTIONS
            ]
            cells.append(" / ".join(f"{num / NUM_PAIRS / 1e9:.3f}" for num in sums) if any(sums) else "")
        print(f"{part:28}" + "".join(f"{cell:>20}" for cell in cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a step misses its target")
    arguments = parser.parse_args()
    is_met = True
    for case in CASES:
        print(f"{case.title}: {case.num_valid} of {NUM_TOKENS} tokens valid, {case.num_masked} masked\n")
        flops = count(case)
        print_table(flops)
        forward, backward = (per_sample(flops, direction) for direction in DIRECTIONS)
        print(f"\n{forward:,} forward, {forward + backward:,} in total (target: {case.target})\n")
        is_met &= case.is_met(forward, forward + backward)
    if arguments.check and not is_met:
        sys.exit(1)


if __name__ == "__main__":
    main()
