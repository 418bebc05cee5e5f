"""What a training step costs: time by phase, FLOPs by part of the model, memory, and a trace of one step.

Nothing is learnt that is kept: the model starts from random weights, which take as long as others, and no run folder is
written.
"""

import itertools
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import record_function, schedule
from tqdm import tqdm

from fastm3ae import objectives
from fastm3ae.config import PretrainConfig
from fastm3ae.data.batch import PretrainBatch
from fastm3ae.data.loader import Loader
from fastm3ae.device import batch_mover, compute_dtype
from fastm3ae.errors import UserError
from fastm3ae.model.build import Model
from fastm3ae.training.distributed import Processes
from fastm3ae.training.flops import DIRECTIONS, PARTS, Flops, count_flops, model_without_values
from fastm3ae.training.launch import is_one_of_several
from fastm3ae.training.loop import build_step
from fastm3ae.training.memory import explain_full_memory
from fastm3ae.training.pretrain import PRETRAINING, check_objectives
from fastm3ae.training.run import build_loader, resolve_and_build, with_micro_batch
from fastm3ae.training.run_folder import environment
from fastm3ae.training.step import OptimizerStep

__all__ = ["Profile", "profile"]

MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}
NUM_MATMULS = 10

Begin = Callable[[str | None], None]
"""Called with the name of a phase where it begins, and with None where the last one ends."""


@dataclass(frozen=True)
class Profile:
    """What was measured.

    Args:
        facts: By name what was measured where.
        step_s: Seconds of each step.
        num_pairs: Pairs of the step that took the median time.
        phase_s: Median seconds of each phase, in steps of their own, in which the device was waited for.
        flops: FLOPs of the step that took the median time.
        matmul: The product that is compared with, in words.
        matmul_flops_per_s: FLOPs per second of that product.
        peak_bytes: The most memory that was in use at once.
        memory: Which memory, in words.
        trace: The trace's file, if one was written.
    """

    facts: Mapping[str, str]
    step_s: tuple[float, ...]
    num_pairs: int
    phase_s: Mapping[str, float]
    flops: Flops
    matmul: str
    matmul_flops_per_s: float
    peak_bytes: int
    memory: str
    trace: Path | None

    @property
    def median_s(self) -> float:
        """Median time of a step: that of one of them."""
        return statistics.median_low(self.step_s)

    @property
    def flops_per_s(self) -> float:
        """FLOPs per second that the step reaches."""
        return self.flops.total() / self.median_s

    def render(self) -> str:
        """Returns the report."""
        lines = [f"{name:<24}{value}" for name, value in self.facts.items()]
        lines += ["", *self._time(), "", *self._flops(), ""]
        lines.append(f"{'peak memory':<24}{self.peak_bytes / 2**30:.2f} GiB {self.memory}")
        if self.trace is not None:
            lines.append(f"{'trace of one step':<24}{self.trace}")
        return "\n".join(lines)

    def _time(self) -> Iterator[str]:
        fastest, slowest = (_ms(seconds) for seconds in (min(self.step_s), max(self.step_s)))
        yield f"{'time of a step':<24}{_ms(self.median_s)} ms, the median of {len(self.step_s)}: {fastest} to {slowest}"
        yield f"{'samples per second':<24}{self.num_pairs / self.median_s:.4g}"
        yield ""
        total_s = sum(self.phase_s.values())
        yield f"{'phase':<24}{'ms':>12}{'share':>8}"
        for name, seconds in self.phase_s.items():
            yield f"{name:<24}{_ms(seconds):>12}{seconds / total_s:>8.1%}"
        yield f"{'together':<24}{_ms(total_s):>12}"
        yield "Medians of as many further steps, in which the device is waited for where a phase begins. The time of a"
        yield "step above is without that."

    def _flops(self) -> Iterator[str]:
        total = self.flops.total()
        yield f"{'GFLOP of a step':<24}" + "".join(f"{direction:>12}" for direction in DIRECTIONS) + f"{'share':>8}"
        for part in dict.fromkeys(PARTS.values()):
            counts = [self.flops[part, direction] for direction in DIRECTIONS]
            if any(counts):
                cells = "".join(f"{count / 1e9:>12.3f}" for count in counts)
                yield f"{part:<24}{cells}{sum(counts) / total:>8.1%}"
        sums = [sum(n for (_, way), n in self.flops.items() if way == direction) for direction in DIRECTIONS]
        yield f"{'together':<24}" + "".join(f"{count / 1e9:>12.3f}" for count in sums)
        yield f"{'a sample':<24}" + "".join(f"{count / 1e9 / self.num_pairs:>12.3f}" for count in sums)
        yield ""
        yield f"{'reached':<24}{_rate(self.flops_per_s)}"
        yield f"{self.matmul:<24}{_rate(self.matmul_flops_per_s)}, measured in this process"
        yield f"{'utilisation':<24}{self.flops_per_s / self.matmul_flops_per_s:.1%}"


def profile(
    config: PretrainConfig, *, num_steps: int = 10, num_warm_up: int = 3, trace_folder: Path | None = None
) -> Profile:
    """Measures the steps of a pre-training, on this process's device.

    Args:
        config: The run.
        num_steps: Steps of which the time is taken, and as many for the time of their phases.
        num_warm_up: Steps before.
        trace_folder: Where a trace of one more step is written, after one that warms the profiler up.

    Raises:
        UserError: Something that the configuration names is missing or does not fit, the memory is too small, or there
            are several processes.
    """
    if num_steps < 1 or num_warm_up < 0:
        raise UserError(f"--steps must be at least 1 and --warm-up at least 0, got {num_steps} and {num_warm_up}.")
    if is_one_of_several():
        raise UserError("fastm3ae profile measures one process: start it without torchrun.")
    trace = None if trace_folder is None else _make_folder(trace_folder) / "trace.json"
    processes = Processes(config.train.device)
    device = processes.device
    check_objectives(config)
    config, tokenizer, model = resolve_and_build(config, processes)
    config = with_micro_batch(config, model, PRETRAINING, processes)
    loader = build_loader(config, tokenizer, PRETRAINING, "train", processes)
    dtype = compute_dtype(config.train, device)
    matmul_flops_per_s = measure_matmul(device, dtype)

    total = num_warm_up + 2 * num_steps + (0 if trace is None else 2)
    with tqdm(total=total, desc="profile", unit="step", dynamic_ncols=True) as bar:
        steps = Steps(config, model, loader, processes, bar)
        for _ in range(num_warm_up):
            steps()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        marks = Marks(device)
        marks.set()
        made = []
        for _ in range(num_steps):
            made.append(steps())
            marks.set()
        step_s = marks.intervals_s()
        phase_s = time_phases(steps, num_steps, device)
        peak_bytes = _peak_bytes(device)
        if trace is not None:
            write_trace(steps, trace)
    pieces = made[step_s.index(statistics.median_low(step_s))]
    return Profile(
        facts=_facts(config, device, num_steps, num_warm_up),
        step_s=tuple(step_s),
        num_pairs=sum(map(len, pieces)),
        phase_s=phase_s,
        flops=count_step(config, pieces),
        matmul=f"{MATMUL_SIZE[device.type]}^3 in {str(dtype).removeprefix('torch.')}",
        matmul_flops_per_s=matmul_flops_per_s,
        peak_bytes=peak_bytes,
        memory="in the tensors on the GPU" if device.type == "cuda" else "resident in this process, loaders apart",
        trace=trace,
    )


class Steps:
    """Makes the steps that a run would make.

    Args:
        config: The run, resolved.
        model: The model.
        loader: Its training batches.
        processes: This process.
        bar: Counts the steps.
    """

    def __init__(self, config: PretrainConfig, model: Model, loader: Loader, processes: Processes, bar: tqdm) -> None:
        self.device, self.micro_batch, self.bar = processes.device, config.train.micro_batch, bar
        self.make_step = build_step(config, model.train(), bar.total, processes)
        self.to_device = batch_mover(config.data, processes.device)
        self.batches = (pieces for epoch in itertools.count() for pieces in loader.epoch(epoch) if pieces)

    def __call__(self, begin: Begin = lambda phase: None) -> list[PretrainBatch]:
        """Makes a step, and returns the pieces of its batch, without values."""
        begin("waiting for data")
        on_host = next(self.batches)
        begin("copy, normalisation")
        with explain_full_memory(self.device, self.bar.n + 1, self.micro_batch), watched(self.make_step, begin):
            pieces = [self.to_device(piece) for piece in on_host]
            self.make_step(pieces, self.make_step.count(pieces))
        begin(None)
        self.bar.update()
        return [piece.to("meta") for piece in on_host]


@contextmanager
def watched(make_step: OptimizerStep, begin: Begin) -> Iterator[None]:
    """Within it, ``begin`` is called where a phase of the step begins."""
    autocast, graphs = make_step.autocast, make_step.graphs
    # Gradients are checked, freed of fp16's scale and clipped before the optimiser is called.
    backward = "backward" if make_step.config.clip_grad_norm is None else "backward, clipping"

    @contextmanager
    def forward() -> Iterator[None]:
        begin("forward")
        with autocast():
            yield
        begin(backward)

    def replay(*arguments):
        begin("forward, backward")
        return graphs(*arguments)

    if graphs is None:
        make_step.autocast = forward
    else:  # within a recorded pass nothing can be waited for
        make_step.graphs = replay
    hook = make_step.optimizer.register_step_pre_hook(lambda *_: begin("optimiser"))
    try:
        yield
    finally:
        make_step.autocast, make_step.graphs = autocast, graphs
        hook.remove()


class Marks:
    """Points in time of the device's work, which is not waited for until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []

    def set(self) -> None:
        """Adds the point at which all work that was given to the device so far is done."""
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def intervals_s(self) -> list[float]:
        """Returns the seconds between each point and the next."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(self.marks)]
        return [after - before for before, after in itertools.pairwise(self.marks)]


class PhaseClock:
    """Seconds by phase: every moment belongs to one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, Counter()
        self._phase: str | None = None
        self._since = 0.0

    def begin(self, phase: str | None) -> None:
        """Waits for the device, and goes on with this phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._phase is not None:
            self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now


class PhaseLabels:
    """Names of phases in a trace."""

    def __init__(self) -> None:
        self._label: record_function | None = None

    def begin(self, phase: str | None) -> None:
        """Ends the phase before, and begins this one."""
        if self._label is not None:
            self._label.__exit__(None, None, None)
        self._label = None if phase is None else record_function(phase)
        if self._label is not None:
            self._label.__enter__()


def time_phases(steps: Steps, num_steps: int, device: torch.device) -> dict[str, float]:
    """Returns the median seconds of each phase."""
    clocks = [PhaseClock(device) for _ in range(num_steps)]
    for clock in clocks:
        steps(clock.begin)
    # A step that fp16's scaler leaves out has no optimiser.
    phases = dict.fromkeys(phase for clock in clocks for phase in clock.seconds)
    return {phase: statistics.median(clock.seconds[phase] for clock in clocks) for phase in phases}


def write_trace(steps: Steps, path: Path) -> None:
    """Writes what the profiler of torch sees in a step, for chrome://tracing or ui.perfetto.dev."""
    labels = PhaseLabels()
    once = schedule(wait=0, warmup=1, active=1, repeat=1)
    with torch.profiler.profile(
        schedule=once, on_trace_ready=lambda trace: trace.export_chrome_trace(str(path))
    ) as trace:
        for _ in range(2):
            steps(labels.begin)
            trace.step()


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOPs per second of a large product."""
    size = MATMUL_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    marks = Marks(device)
    for number in range(2 + NUM_MATMULS):  # the first ones warm up
        if number >= 2:
            marks.set()
        torch.mm(a, b, out=out)
    marks.set()
    return 2 * size**3 / statistics.median(marks.intervals_s())


def count_step(config: PretrainConfig, pieces: list[PretrainBatch]) -> Flops:
    """Returns the FLOPs that a step needs.

    Args:
        config: The run, resolved.
        pieces: The pieces of its batch.
    """
    model, to_meta = model_without_values(config.model), batch_mover(config.data, torch.device("meta"))
    # What is computed a second time, to save memory, is work that the step does not need.
    options = config.step_options() | {"checkpoint_activations": False}

    def losses() -> Iterator[tuple[str, torch.Tensor]]:
        for piece in map(to_meta, pieces):
            outputs = model(piece, **options)
            yield "step", objectives.total(objectives.losses(outputs, piece, config.model))

    return count_flops(model, losses())["step"]


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder} of the trace cannot be made: {error.strerror}.") from error
    return folder


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _facts(config: PretrainConfig, device: torch.device, num_steps: int, num_warm_up: int) -> dict[str, str]:
    train, here = config.train, environment(device)
    is_cpu, num_threads = device.type == "cpu", here["num_threads"]
    threads = f", {num_threads} thread{'s' * (num_threads > 1)}" if is_cpu else ""
    return {
        "device": f"{here['device']}{threads}, torch {here['libraries']['torch']}",
        "precision": "fp32" if is_cpu else train.precision,
        "batch": f"{train.batch_size} pairs a step, at most {train.micro_batch} a pass",
        "step": f"{train.step}, objectives {', '.join(config.model.objectives)}",
        "steps": f"{num_steps} after {num_warm_up} to warm up",
    }


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _rate(flops_per_s: float) -> str:
    return f"{flops_per_s / 1e12:.4g} TFLOP/s" if flops_per_s >= 1e12 else f"{flops_per_s / 1e9:.4g} GFLOP/s"
