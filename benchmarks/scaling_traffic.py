"""What the processes of a run send one another in a step: counted in real runs of several processes on this machine.

scaling.py starts this file once for each process. It runs ``fastm3ae.training.pretrain.pretrain`` on the demo's data
and takes, from the beginning of one optimiser step to the beginning of a later one, torch's profile (whose events of
gloo hold kind, type and shape of every message) and, as a second witness, the bytes that the loopback interface has
sent by then. So whatever a step sends is counted, wherever in the package it is sent.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from fastm3ae.config import PretrainConfig
from fastm3ae.config.presets import preset
from fastm3ae.data.demo import ensure_demo_corpus
from fastm3ae.training.launch import launch
from fastm3ae.training.parallel import LAYERS
from fastm3ae.training.pretrain import pretrain
from fastm3ae.training.step import OptimizerStep

MODELS = {"m3ae": "demo", "mpma": "mpma-demo"}
PARALLEL = ("ddp", "fsdp")  # values of train.parallel
BATCH_SIZE, NUM_WARM_UP, NUM_STEPS = 16, 2, 4
HANDFUL_BYTES, TOWERS = 256, ("vision.", "text.")
NUM_BYTES = {"float": 4, "double": 8, "long int": 8, "int": 4, "unsigned char": 1}
KINDS = GRADIENTS, PARAMETERS, FEATURES, COUNTS, ROWS = (
    "gradients",
    "parameters",
    "features",
    "counts",
    "numbers of rows",
)
LOOPBACK = Path("/proc/net/dev")


@dataclass(frozen=True)
class Case:
    """A run.

    Args:
        model: Which of ``MODELS``.
        parallel: How the processes share the model: ``train.parallel``.
        num_processes: How many.
        num_passes: Forward and backward passes of each process in a step.
    """

    model: str
    parallel: str
    num_processes: int
    num_passes: int

    def config(self, folder: Path) -> PretrainConfig:
        """The demo's preset with small batches, in which nothing but steps happens while they are measured."""
        config = preset(MODELS[self.model])
        share = BATCH_SIZE // self.num_processes
        train = dataclasses.replace(
            config.train,
            num_steps=NUM_WARM_UP + NUM_STEPS + 1,
            batch_size=BATCH_SIZE,
            micro_batch=math.ceil(share / self.num_passes),
            num_workers=0,
            log_every_steps=1000,
            validate_every_steps=1000,
            save_every_steps=1000,
            max_val_batches=1,
            num_pictures=0,
            tensorboard=False,
            device="cpu",
            parallel=self.parallel,
        )
        root = folder / "corpus"
        data = dataclasses.replace(config.data, root=str(root), tokenizer=str(root / "tokenizer"))
        output = "_".join(map(str, ("run", *dataclasses.astuple(self))))
        return dataclasses.replace(config, output=str(folder / output), data=data, train=train)


@dataclass(frozen=True)
class Traffic:
    """What one process of a case sends in a step.

    Args:
        case: The run.
        num_parameters: Of the model.
        num_trained: Those that have a gradient.
        num_reduced: So many gradients are summed: FSDP pads a parameter to parts of one size, by its first dimension.
        num_in_layers: Those of the layers that FSDP gathers one by one.
        num_in_towers: Those of them that are in the towers.
        num_bytes: By kind, the bytes that it gives to collectives.
        num_messages: By kind, how many collectives.
        wire_bytes: What of it travels: of N processes each sends 2 (N - 1) / N times what is summed, (N - 1) / N times
            what is summed and scattered, and N - 1 times what it gives to be gathered.
        loopback_bytes: What the loopback interface has sent, over the number of processes, headers included.
        checkpoint_bytes: Of a checkpoint's files.
    """

    case: Case
    num_parameters: int
    num_trained: int
    num_reduced: int
    num_in_layers: int
    num_in_towers: int
    num_bytes: Mapping[str, float]
    num_messages: Mapping[str, float]
    wire_bytes: float
    loopback_bytes: float
    checkpoint_bytes: int

    def expected(self, width: int) -> dict[str, float]:
        """The bytes that each kind must have: gradients once, however many passes.

        Args:
            width: Of the features that global alignment compares.
        """
        case = self.case
        expected = {GRADIENTS: 4 * self.num_reduced}
        if case.model == "mpma":
            expected[FEATURES] = BATCH_SIZE // case.num_processes * 2 * width * 4
        if case.parallel == "fsdp":
            # Layers for each forward and each backward pass, the rest once; and towers to make all features first.
            gathered = case.num_passes * (self.num_parameters + self.num_in_layers)
            if case.model == "mpma" and case.num_passes > 1:
                gathered += case.num_passes * self.num_in_towers
            expected[PARAMETERS] = 4 * gathered / case.num_processes
        return expected


def kind_of(collective: str, dtype: str, shape: Sequence[int]) -> str:
    """What a message is for: type and shape tell."""
    if dtype == "float":
        if collective == "all_gather":
            return FEATURES if len(shape) == 3 else PARAMETERS
        return GRADIENTS
    return COUNTS if collective == "all_reduce" else ROWS


def read_trace(path: Path, num_processes: int) -> tuple[Counter, Counter, float]:
    """Bytes and messages by kind, and bytes on the wire, of all events of gloo in a trace."""
    num_bytes, num_messages, wire = Counter(), Counter(), 0.0
    times = {
        "all_reduce": 2 * (num_processes - 1) / num_processes,
        "reduce_scatter": (num_processes - 1) / num_processes,
        "all_gather": num_processes - 1,
    }
    for event in json.loads(path.read_text())["traceEvents"]:
        backend, _, name = event.get("name", "").partition(":")
        if backend != "gloo":
            continue
        collective = next(known for known in times if known in name)
        for dtype, shape in zip(event["args"]["Input type"], event["args"]["Input Dims"], strict=True):
            size = math.prod(shape) * NUM_BYTES[dtype]
            kind = kind_of(collective, dtype, shape)
            num_bytes[kind] += size
            num_messages[kind] += 1
            wire += size * times[collective]
    return num_bytes, num_messages, wire


def loopback_sent() -> int:
    """Bytes that the loopback interface has sent since the machine started."""
    (line,) = (line for line in LOOPBACK.read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


class Witness:
    """Stands before each optimiser step of this process, and profiles those that are measured."""

    def __init__(self) -> None:
        self.num_begun, self.loopback = 0, []
        self.profile = torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def before_step(self) -> None:
        if self.num_begun >= NUM_WARM_UP:
            self.loopback.append(loopback_sent() if LOOPBACK.exists() else 0)
        if self.num_begun == NUM_WARM_UP:
            self.profile.start()
        elif self.num_begun == NUM_WARM_UP + NUM_STEPS:
            self.profile.stop()
        self.num_begun += 1


def work(case: Case, folder: Path) -> None:
    """Trains as one of the processes; writes what it has sent."""
    witness, make_step = Witness(), OptimizerStep.__call__
    seen = {}

    def step(maker, *arguments):
        seen["model"] = maker.model
        witness.before_step()
        return make_step(maker, *arguments)

    OptimizerStep.__call__ = step
    config = case.config(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        summary = pretrain(config)
    if summary is None:  # of all processes but the first
        return
    trace = folder / "trace.json"
    witness.profile.export_chrome_trace(str(trace))
    num_bytes, num_messages, wire = read_trace(trace, case.num_processes)
    # Others on this machine may use the interface as well, but hardly in most of the steps.
    per_step = [after - before for before, after in zip(witness.loopback, witness.loopback[1:], strict=False)]
    model = seen["model"]
    trained = [parameter.shape for parameter in model.parameters() if parameter.requires_grad]
    parts = case.num_processes if case.parallel == "fsdp" else 1
    in_layers = [
        (name, sum(parameter.numel() for parameter in module.parameters()))
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
    ]
    (checkpoint,) = (Path(config.output) / "checkpoints").glob("step_*")
    token_files = {path.name for path in Path(config.data.tokenizer).iterdir()}
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name not in token_files]
    measured = {
        "num_parameters": summary["num_parameters"],
        "num_trained": sum(map(math.prod, trained)),
        "num_reduced": sum(math.ceil(first / parts) * parts * math.prod(rest) for first, *rest in trained),
        "num_in_layers": sum(number for _, number in in_layers),
        "num_in_towers": sum(number for name, number in in_layers if name.startswith(TOWERS)),
        "num_bytes": {kind: number / NUM_STEPS for kind, number in num_bytes.items()},
        "num_messages": {kind: number / NUM_STEPS for kind, number in num_messages.items()},
        "wire_bytes": wire / NUM_STEPS,
        "loopback_bytes": statistics.median(per_step) / case.num_processes,
        "checkpoint_bytes": sum(path.stat().st_size for path in files),
    }
    (folder / "measured.json").write_text(json.dumps(measured))


def measure(case: Case, folder: Path) -> Traffic:
    """Runs the case's processes; ``folder`` keeps the data for the next case."""
    ensure_demo_corpus(folder / "corpus")
    options = [f"--{field.name}={getattr(case, field.name)}" for field in dataclasses.fields(case)]
    status = launch([sys.executable, __file__, *options, f"--folder={folder}"], case.num_processes)
    assert status == 0, f"{case} ended with {status}"
    return Traffic(case, **json.loads((folder / "measured.json").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Case):
        parser.add_argument(f"--{field.name}", type=field.type, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = vars(parser.parse_args())
    folder = arguments.pop("folder")
    torch.set_num_threads(1)
    work(Case(**arguments), folder)


if __name__ == "__main__":
    main()
