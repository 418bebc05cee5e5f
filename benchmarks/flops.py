"""FLOPs per sample of a pre-training step at the official configuration: ViT-B/16 at 288 px, RoBERTa-base, 64 tokens.

    python benchmarks/flops.py            # a table for each step: part of the model x objective, forward / backward
    python benchmarks/flops.py --check    # and exit with 1 when a step misses its target

What is counted, and how, says fastm3ae/training/flops.py.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import original_step
from torch import Tensor

from fastm3ae import objectives
from fastm3ae.config import M3AEConfig
from fastm3ae.config.presets import preset
from fastm3ae.data.batch import PretrainBatch
from fastm3ae.model.m3ae import M3AE
from fastm3ae.training.flops import DIRECTIONS, PARTS, Flops, count_flops, model_without_values

NUM_PAIRS, NUM_TOKENS = 2, 64


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


def official_config() -> M3AEConfig:
    """The preset m3ae with RoBERTa's vocabulary."""
    config = preset("m3ae").model
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=50265, pad_token_id=1))


def make_inputs(case: Case) -> tuple[M3AE, PretrainBatch]:
    """Returns a model and a batch that have shapes and no values, but for what the step reads on the host."""
    config = official_config()
    batch = original_step.make_batch(config, [case.num_valid] * NUM_PAIRS, case.num_masked, NUM_TOKENS)
    host = {name: getattr(batch, name) for name in case.host_fields}
    return model_without_values(config), dataclasses.replace(batch.to("meta"), **host)


def count(case: Case) -> dict[str, Flops]:
    """Counts a step's FLOPs for each loss that it gives, those of all samples together."""
    model, batch = make_inputs(case)
    return count_flops(model, case.losses(model, batch))


def per_sample(flops: Mapping[str, Flops], direction: str) -> int:
    num_flops = sum(num for column in flops.values() for (_, way), num in column.items() if way == direction)
    assert num_flops % NUM_PAIRS == 0
    return num_flops // NUM_PAIRS


def print_table(flops: Mapping[str, Flops]) -> None:
    print(f"{'GFLOP, forward / backward':28}" + "".join(f"{name:>20}" for name in flops))
    for part in [*dict.fromkeys(PARTS.values()), "total"]:
        cells = []
        for column in flops.values():
            sums = [
                sum(num for (name, way), num in column.items() if way == direction and part in (name, "total"))
                for direction in DIRECTIONS
            ]
            cells.append(" / ".join(f"{num / NUM_PAIRS / 1e9:.3f}" for num in sums) if any(sums) else "")
        if any(cells):
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
