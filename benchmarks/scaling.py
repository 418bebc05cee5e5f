"""The plan for many GPUs: what a step sends, counted in real runs, and how fast 8 to 512 GPUs would be, calculated.

    python benchmarks/scaling.py                # both; 16 short runs of 2 and 4 processes
    python benchmarks/scaling.py --check        # and exit with 1 where what was counted is not what the formulas say
    python benchmarks/scaling.py --update       # also put the tables into docs/scaling.md

Counted, on the demo's models, through the whole training loop: the bytes that a process sends in a step (see
scaling_traffic.py). They must be the gradients of all trained parameters once, in float32, however many passes a step
makes; the features of MPMA's pairs; and a handful of bytes of counts. The loopback interface, which counts everything
that travels, must have sent as much; it also counts what others on this machine send, so that a busy moment fails the
check. Calculated, for the official model: everything else (see scaling_model.py for what is assumed).
"""

import argparse
import dataclasses
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import figures
import flops
import harness
import original_step
import scaling_tables
import torch
from scaling_model import M3AE_MESSAGES, MEANS_BYTES, MPMA_MESSAGES, WEIGHT_BYTES, HostMessages, Workload
from scaling_traffic import (
    BATCH_SIZE,
    COUNTS,
    GRADIENTS,
    HANDFUL_BYTES,
    MODELS,
    PARALLEL,
    PARAMETERS,
    ROWS,
    Case,
    Traffic,
    measure,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fastm3ae.config.presets import preset
from fastm3ae.data.decode import decode_image
from fastm3ae.data.images import make_transform
from fastm3ae.training.flops import DIRECTIONS, count_flops, model_without_values

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
NUM_PROCESSES, NUM_PASSES = (2, 4), (1, 2)
MAX_STATE_DEVIATION = 0.01  # of a checkpoint's size
# FSDP sums the norm of each gradient, too, pads what it gathers, and gathers a layer ahead in vain where one stack of
# layers ends: shares that are the smaller, the larger the model is.
MAX_EXCESS = {("fsdp", GRADIENTS): 0.001, ("fsdp", PARAMETERS): 0.15}
MAX_HEADERS = 0.05  # of the loopback interface's bytes
MESSAGES = {"m3ae": M3AE_MESSAGES, "mpma": MPMA_MESSAGES}
NUM_PAIRS, NUM_VALID, NUM_MASKED, NUM_TOKENS = 4, 40, 6, 64
RADIOGRAPH_SIZE_PX, RADIOGRAPH_GRAIN = (2544, 3056), 2  # encodes to 1.6 MB, as much as one of MIMIC-CXR-JPG


class Launches(TorchDispatchMode):
    """Counts operations that start a kernel: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num += not function.is_view
        return function(*args, **(kwargs or {}))


def official_workload() -> Workload:
    """Counts what the official model needs, on tensors without values."""
    config = flops.official_config()
    model = model_without_values(config)

    def make_batch(num_false: int, num_valid: int, num_masked: int):
        batch = original_step.make_batch(config, [num_valid] * NUM_PAIRS, num_masked, NUM_TOKENS)
        return dataclasses.replace(
            batch,
            itm_labels_B=(torch.arange(NUM_PAIRS) >= num_false).long(),
            false_image_FCHW=batch.image_BCHW[:num_false],
            itm_index_B=None,
            itm_rows_B=None,
        ).to("meta")

    def count(*batch: int) -> list[float]:
        (counted,) = count_flops(model, flops.packed(model, make_batch(*batch))).values()
        return [sum(number for (_, way), number in counted.items() if way == name) for name in DIRECTIONS]

    half = NUM_PAIRS // 2
    forward, backward = count(half, NUM_VALID, NUM_MASKED)
    more_tokens, more_false = sum(count(half, NUM_TOKENS, 10)), sum(count(half + 1, NUM_VALID, NUM_MASKED))
    return Workload(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        gradient_bytes=4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        embedding_bytes=4 * config.text.vocab_size * config.text.width,
        # Blocks of the towers and of the decoder, layers of both streams of the fusion, and the rest.
        num_units=config.vision.num_blocks
        + config.text.num_layers
        + 2 * config.fusion.num_layers
        + config.mim.decoder_num_layers
        + 1,
        forward_flops=forward / NUM_PAIRS,
        backward_flops=backward / NUM_PAIRS,
        token_flops=(more_tokens - forward - backward) / (NUM_PAIRS * (NUM_TOKENS - NUM_VALID)),
        false_image_flops=more_false - forward - backward,
    )


def count_launches() -> int:
    """Counts the kernels of a pass, forward and backward, and those that copy each gradient into a bucket of DDP.

    How many an operation is made of depends on torch.
    """
    model, batch = flops.make_inputs(flops.CASES[1])
    with Launches() as launches:
        for _, loss in flops.packed(model.train(), batch):
            loss.backward()
    return launches.num + sum(parameter.requires_grad for parameter in model.parameters())


def cases() -> list[Case]:
    return [
        Case(model, parallel, num_processes, num_passes)
        for model in MODELS
        for parallel in PARALLEL
        for num_processes in NUM_PROCESSES
        for num_passes in NUM_PASSES
    ]


def faults(found: Traffic) -> list[str]:
    """What is not as the formulas say."""
    case, wrong = found.case, []
    alignment = getattr(preset(MODELS[case.model]).model, "alignment", None)
    expected = found.expected(alignment.width if alignment else 0)
    for kind in sorted(found.num_bytes.keys() - {COUNTS, ROWS} | expected.keys()):
        got, want = found.num_bytes.get(kind, 0), expected.get(kind, 0)
        if not 0 <= got - want <= MAX_EXCESS.get((case.parallel, kind), 0) * want:
            wrong.append(f"{got:,.0f} bytes of {kind}, expected {want:,.0f}")
    handful = sum(found.num_bytes.get(kind, 0) for kind in (COUNTS, ROWS))
    if handful > HANDFUL_BYTES:
        wrong.append(f"{handful:,.0f} bytes from host to host, expected at most {HANDFUL_BYTES}")
    messages = HostMessages(*(round(found.num_messages.get(kind, 0)) for kind in (COUNTS, ROWS)))
    if messages != MESSAGES[case.model]:
        wrong.append(f"{messages}, expected {MESSAGES[case.model]}")
    state_bytes = (WEIGHT_BYTES + MEANS_BYTES) * found.num_parameters
    if abs(found.checkpoint_bytes - state_bytes) > MAX_STATE_DEVIATION * state_bytes:
        wrong.append(f"a checkpoint of {found.checkpoint_bytes:,} bytes, expected {state_bytes:,}")
    if not 1 <= found.loopback_bytes / found.wire_bytes <= 1 + MAX_HEADERS:
        wrong.append(f"{found.loopback_bytes:,.0f} bytes through the loopback, counted {found.wire_bytes:,.0f}")
    return [f"{case}: {fault}" for fault in wrong]


def radiograph_cpu_ms(rounds: int = 9) -> float:
    """Processor time to decode a large grey JPEG and make the model's square of it."""
    image = figures.draw_grey(0, RADIOGRAPH_SIZE_PX, RADIOGRAPH_GRAIN).convert("L")
    encoded = figures.encode(image, "JPEG", quality=95)
    transform, times = make_transform("clip", 288), []
    for _ in range(rounds):
        start = time.process_time()
        transform(decode_image(encoded))
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


def update(tables: dict[str, str]) -> None:
    """Puts tables into the page, each between <!-- its name --> and <!-- end -->."""
    text = PAGE.read_text()
    for name, table in tables.items():
        text, num = re.subn(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{table}\n\g<2>", text, flags=re.DOTALL)
        assert num == 1, f"{PAGE} has {num} places for the table {name}"
    PAGE.write_text(text)


def print_tables(tables: dict[str, str]) -> None:
    for name, table in tables.items():
        print(f"{name}:\n\n{table}\n", flush=True)


def simulate(chosen: Iterable[Case]) -> list[Traffic]:
    with tempfile.TemporaryDirectory() as folder:
        return [measure(case, Path(folder)) for case in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 where counts are not what the formulas say")
    parser.add_argument("--update", action="store_true", help="put the tables into docs/scaling.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"scaling, demo's models, {BATCH_SIZE} pairs a step\n{harness.machine()}\n")
    print(f"a radiograph of 1.6 MB: {radiograph_cpu_ms():.1f} ms of a processor")
    print(f"kernels of a pass: {count_launches():,}\n", flush=True)
    tables = scaling_tables.calculated(official_workload())
    print_tables(tables)
    measured = simulate(cases())
    tables["traffic"] = scaling_tables.traffic(measured)
    print_tables({"traffic": tables["traffic"]})
    wrong = [fault for found in measured for fault in faults(found)]
    for found in measured:
        ratio = found.loopback_bytes / found.wire_bytes
        print(f"{found.case}: {found.loopback_bytes:,.0f} bytes by the loopback, {ratio:.3f} times what was counted")
    for fault in wrong:
        print(f"failed: {fault}")
    if arguments.update:
        update(tables)
    print(f"\n{len(measured)} runs, {len(wrong)} of their figures not as calculated (target: 0)")
    if arguments.check and wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
