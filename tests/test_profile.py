"""`fastm3ae profile`: the steps are a run's, and what is said of them is so."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from runs import MODEL, command, run, write_config, write_corpus
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fastm3ae import objectives
from fastm3ae.cli import main
from fastm3ae.config import PretrainConfig
from fastm3ae.config.files import from_dict
from fastm3ae.device import batch_mover
from fastm3ae.model.m3ae import M3AE
from fastm3ae.training import profile as profiling
from fastm3ae.training.distributed import Processes
from fastm3ae.training.pretrain import PRETRAINING
from fastm3ae.training.run import build_loader, resolve_and_build, with_micro_batch

CPU = torch.device("cpu")
PHASES = ["waiting for data", "copy, normalisation", "forward", "backward", "optimiser"]


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    monkeypatch.setitem(profiling.MATMUL_SIZE, "cpu", 128)


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path)
    return tmp_path


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still, but for what a test adds to its ``now``."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(profiling, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def make_steps(folder, num_steps=1, **changes):
    """The steps of the tiny run, its resolved configuration and its model."""
    config = from_dict(PretrainConfig(), yaml.safe_load(write_config(folder, **changes).read_text()))
    processes = Processes("cpu")
    config, tokenizer, model = resolve_and_build(config, processes)
    config = with_micro_batch(config, model, PRETRAINING, processes)
    loader = build_loader(config, tokenizer, PRETRAINING, "train", processes)
    bar = tqdm(total=num_steps, disable=True)
    return profiling.Steps(config, model, loader, processes, bar), config, model


def profile(folder, *arguments, **changes):
    return main(["profile", *command(folder, **changes)[1:], *arguments])


def files(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def test_the_report_and_the_trace(corpus, capsys):
    write_config(corpus)
    before = files(corpus)
    trace = corpus / "a" / "b" / "trace.json"
    assert profile(corpus, "--steps", "2", "--warm-up", "1", "--trace", str(trace.parent)) == 0
    assert files(corpus) - before == {trace}

    out = capsys.readouterr().out
    values = {line[:24].strip(): line[24:].split() for line in out.splitlines()}
    assert values["precision"] == ["fp32"] and values["device"]
    assert values["batch"] == "8 pairs a step, at most 8 a pass".split()
    assert values["step"] == "packed, objectives mlm, mim, itm".split()
    assert values["steps"] == "2 after 1 to warm up".split()
    assert [name for name in values if name in PHASES] == PHASES
    assert values["text encoder"] and values["fusion, image layers"] and values["MIM decoder"]
    assert values["utilisation"][0].endswith("%") and float(values["peak memory"][0]) > 0.01
    assert values["trace of one step"] == [str(trace)]

    events = Counter(event.get("name") for event in json.loads(trace.read_text())["traceEvents"])
    for name in ("fastm3ae::packed_attention", "fastm3ae::packed_attention_backward", "fastm3ae::masked_token_loss"):
        assert events[name] > 0
    assert [events[phase] for phase in PHASES] == [1] * 5  # of one step, not of that which warmed up


def test_the_numbers_of_the_report():
    measured = profiling.Profile(
        facts={"device": "an abacus"},
        step_s=(2.0, 4.0, 1.0, 5.0),
        num_pairs=8,
        phase_s={"forward": 1.5, "backward": 4.5},
        flops=Counter({("text encoder", "forward"): 4_000_000_000, ("MLM head", "backward"): 12_000_000_000}),
        matmul="2^3 in float64",
        matmul_flops_per_s=32e9,
        peak_bytes=3 << 29,
        memory="of beads",
        trace=None,
    )
    lines = [line.split() for line in measured.render().splitlines()]
    for line in (
        "device an abacus",
        "time of a step 2000.00 ms, the median of 4: 1000.00 to 5000.00",
        "samples per second 4",
        "forward 1500.00 25.0%",
        "backward 4500.00 75.0%",
        "together 6000.00",
        "text encoder 4.000 0.000 25.0%",
        "MLM head 0.000 12.000 75.0%",
        "together 4.000 12.000",
        "a sample 0.500 1.500",
        "reached 8 GFLOP/s",
        "2^3 in float64 32 GFLOP/s, measured in this process",
        "utilisation 25.0%",
        "peak memory 1.50 GiB of beads",
    ):
        assert line.split() in lines
    assert "trace" not in measured.render()
    faster = dataclasses.replace(measured, step_s=(0.01,))
    assert ["reached", "1.6", "TFLOP/s"] in [line.split() for line in faster.render().splitlines()]


def test_the_steps_are_those_of_a_run(corpus):
    """Also when their phases are timed: the weights are the same to the last bit, dropout included."""
    assert run(corpus, "--train.num-steps", "2") == 0
    steps, _, model = make_steps(corpus, num_steps=2)
    steps()
    profiling.time_phases(steps, 1, CPU)
    want = load_file(corpus / "run" / "checkpoints" / "step_000002" / "model.safetensors")
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("clip", [None, 1.0])
def test_every_phase_gets_its_own_time(corpus, clock, clip):
    """Each part of the step takes another time, by a clock that nothing else moves; a step has two passes."""
    steps, _, model = make_steps(corpus, train={"micro_batch": 4}, optim={"clip_grad_norm": clip})

    def takes(seconds):
        clock.now += seconds

    batches, to_device = steps.batches, steps.to_device
    steps.batches = (takes(1) or pieces for pieces in batches)
    steps.to_device = lambda piece: takes(2) or to_device(piece)
    model.register_forward_pre_hook(lambda *_: takes(4))
    model.image_proj.weight.register_post_accumulate_grad_hook(lambda _: takes(16))
    steps.make_step.optimizer.register_step_post_hook(lambda *_: takes(64))
    names = [*PHASES[:3], "backward" if clip is None else "backward, clipping", PHASES[4]]
    want = dict(zip(names, (1, 4, 8, 32, 64), strict=True))
    assert profiling.time_phases(steps, 3, CPU) == want


def test_phases_leave_nothing_out(clock):
    timer = profiling.PhaseClock(CPU)
    for phase, seconds in (("a", 1.0), ("b", 2.0), ("a", 4.0), (None, 8.0), ("b", 16.0), (None, 0.0)):
        timer.begin(phase)
        clock.now += seconds
    assert timer.seconds == {"a": 5.0, "b": 18.0}


def test_the_rate_of_the_product(monkeypatch, clock):
    """Its median time counts, without the first ones, which are slow."""
    durations = iter([50.0, 50.0, *[1.0, 3.0] * 5])
    product = torch.mm

    def mm(a, b, *, out):
        clock.now += next(durations)
        return product(a, b, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    assert profiling.measure_matmul(CPU, torch.float32) == 2 * 128**3 / 2.0


@pytest.mark.parametrize("step", ["packed", "original"])
@pytest.mark.parametrize("micro_batch", [8, 3])
def test_flops_are_those_of_a_step_with_values(corpus, step, micro_batch):
    steps, config, _ = make_steps(corpus, train={"step": step, "micro_batch": micro_batch})
    model, to_device = M3AE(config.model), batch_mover(config.data, CPU)
    on_host = next(steps.batches)
    assert len(on_host) == -(-8 // micro_batch)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for piece in map(to_device, on_host):
            outputs = model(piece, **config.step_options())
            objectives.total(objectives.losses(outputs, piece, config.model)).backward()
    counted = profiling.count_step(config, [piece.to("meta") for piece in on_host])
    assert counted.total() == counter.get_total_flops() > 0


def test_flops_of_the_text_encoder_by_hand(corpus):
    """Two products for each weight and token, two for each pair of tokens and channel; twice that backward.

    With matching as the only objective each text is encoded once: padded in the original's step, and without padding in
    the packed one.
    """
    width, mlp_width = MODEL["text"]["width"], MODEL["text"]["mlp_width"]
    totals = {}
    for step in ("original", "packed"):
        steps, config, _ = make_steps(corpus, model={**MODEL, "objectives": ["itm"]}, train={"step": step})
        (piece,) = next(steps.batches)
        num_texts, num_tokens = piece.text_ids_BT.shape
        lengths = piece.num_tokens_B.tolist() if step == "packed" else [num_tokens] * num_texts
        want = sum(2 * length * (4 * width**2 + 2 * width * mlp_width) + 4 * length**2 * width for length in lengths)
        counted = profiling.count_step(config, [piece.to("meta")])
        assert [counted["text encoder", way] for way in ("forward", "backward")] == [want, 2 * want]
        totals[step] = counted.total()
    assert totals["packed"] < totals["original"]


def test_what_is_computed_twice_counts_once(corpus):
    steps, config, _ = make_steps(corpus)
    pieces = [piece.to("meta") for piece in next(steps.batches)]
    twice = dataclasses.replace(config, train=dataclasses.replace(config.train, checkpoint_activations=True))
    assert profiling.count_step(twice, pieces) == profiling.count_step(config, pieces)


MISTAKES = {
    "missing data": (["--data.root", "/nowhere"], "nowhere"),
    "no steps": (["--steps", "0"], "--steps must be at least 1"),
    "negative warm-up": (["--warm-up", "-1"], "--warm-up at least 0"),
    "a file for the trace": (["--trace", __file__], f"The folder {Path(__file__)} of the trace cannot be made"),
    "too large a batch": (["--train.batch-size", "100"], "100 pairs"),
    "unknown preset": (["--preset", "dmo"], "Did you mean 'demo'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_one_sentence(corpus, capsys, name):
    arguments, message = MISTAKES[name]
    write_config(corpus)
    before = files(corpus)
    assert profile(corpus, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1
    assert files(corpus) == before


def test_several_processes_are_refused(corpus, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert profile(corpus) == 2
    assert "start it without torchrun" in capsys.readouterr().err


def test_full_memory(corpus, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    assert profile(corpus) == 2
    assert "was full in step 1, with passes of 8 pairs: give a smaller --train.micro-batch" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_on_a_gpu(corpus, capsys, monkeypatch, precision):
    monkeypatch.setitem(profiling.MATMUL_SIZE, "cuda", 1024)
    changes = {"train": {"device": "cuda", "precision": precision}}
    assert profile(corpus, "--steps", "4", "--trace", str(corpus / "trace"), **changes) == 0
    out = capsys.readouterr().out
    assert "GiB in the tensors on the GPU" in out and f"1024^3 in {'b' * (precision == 'bf16')}float16" in out
    assert all(phase in out for phase in PHASES)
    events = json.loads((corpus / "trace" / "trace.json").read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
