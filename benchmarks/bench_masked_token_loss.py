"""Linear layer and cross entropy at the masked tokens, at the official width and vocabulary: D = 768, V = 50,265.

    python benchmarks/bench_masked_token_loss.py            # the table
    python benchmarks/bench_masked_token_loss.py --check    # and exit with 1 below the target
    pytest benchmarks/bench_masked_token_loss.py --benchmark-json=history.json

The three products need 6 M D V operations, 356 GFLOP at M = 1,536, the masked tokens of a batch of 256. Bytes: the
tokens, the weight and their gradients once each; the logits are each variant's own doing.

Peers: eager and torch.compile on the masked tokens, PyTorch's own chunked loss where this version has it, and of the
extra "bench" liger-kernel's Triton kernel and cut-cross-entropy's exact one, which need a GPU.
"""

import functools
import importlib.util

import harness
import pytest
import torch
import torch.nn.functional as F

from fastm3ae.kernels import masked_token_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_TOKENS, DTYPE = (1536, torch.bfloat16) if DEVICE == "cuda" else (384, torch.float32)
WIDTH, VOCAB_SIZE = 768, 50265
# On the CPU nearly all of the time goes into the products, which are the same ones.
TARGET = 2.0 if DEVICE == "cuda" else 0.95


def eager(tokens, weight, bias, labels):
    return F.cross_entropy(F.linear(tokens, weight, bias), labels)


def ours(tokens, weight, bias, labels):
    return masked_token_loss(tokens, weight, bias, labels)[0]


def torch_chunked(tokens, weight, bias, labels):
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(tokens, weight, labels, linear_bias=bias, options=options)


def liger(tokens, weight, bias, labels):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, tokens, labels, bias)


def cut_cross_entropy(tokens, weight, bias, labels):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(tokens, weight, labels, bias=bias, impl="cce_exact")


VARIANTS = {"eager": eager, "torch.compile": torch.compile(eager, fullgraph=True)}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):
    VARIANTS["torch chunked"] = torch_chunked
if DEVICE == "cuda" and importlib.util.find_spec("liger_kernel"):
    VARIANTS["liger"] = liger
if DEVICE == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
    VARIANTS["cut ce exact"] = cut_cross_entropy
VARIANTS["ours"] = ours


def forward(function, *inputs):
    with torch.no_grad():
        return [function(*inputs)]


def forward_backward(function, *inputs):
    return torch.autograd.grad(function(*inputs), inputs[:3])


DIRECTIONS = {"forward": forward, "forward+backward": forward_backward}


def make_inputs(num_tokens, num_positions=None, device=DEVICE, dtype=DTYPE):
    """tokens, weight, bias and labels; of all positions, where given, with the label -100 where nothing is masked."""
    torch.manual_seed(0)
    labels = torch.full((num_positions or num_tokens,), -100)
    labels[torch.randperm(len(labels))[:num_tokens]] = torch.randint(VOCAB_SIZE, (num_tokens,))
    shapes = (len(labels), WIDTH), (VOCAB_SIZE, WIDTH), (VOCAB_SIZE,)
    tokens, weight, bias = (torch.randn(shape, device=device) for shape in shapes)
    inputs = [x.to(dtype).requires_grad_() for x in (tokens, weight.mul_(WIDTH**-0.5), bias)]
    return *inputs, labels.to(device)


def check(variants, direction, inputs):
    """Holds every variant's results to float32's eager ones."""
    exact = [x.detach().float().requires_grad_() for x in inputs[:3]]
    truth = direction(eager, *exact, inputs[3])
    for name, function in variants.items():
        for got, want in zip(direction(function, *inputs), truth, strict=True):
            error = (got.float() - want).abs().max() / want.abs().max()
            bound = 16 * torch.finfo(DTYPE).eps
            assert error < bound, f"{name} is not timed: it is wrong by {error:.1e}"


@functools.cache
def workloads():
    inputs = make_inputs(NUM_TOKENS)
    num_values = (NUM_TOKENS + VOCAB_SIZE) * WIDTH
    made = {}
    for name, direction in DIRECTIONS.items():
        check(VARIANTS, direction, inputs)
        runs = {variant: functools.partial(direction, function, *inputs) for variant, function in VARIANTS.items()}
        made[name] = harness.Workload(runs, num_values * inputs[0].itemsize * (1 + (name != "forward")))
    return made


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_token_loss(benchmark, variant, direction):
    workload = workloads()[direction]
    run = workload.variants[variant]
    timings = harness.measure({"eager": workload.variants["eager"], "this": run}, rounds=3, warm_up_rounds=1)
    benchmark.extra_info["ratio_to_eager"] = timings["eager"].median_s / timings["this"].median_s
    benchmark.extra_info["num_bytes"] = workload.num_bytes
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)


if __name__ == "__main__":
    harness.main(
        __doc__,
        f"masked_token_loss, {NUM_TOKENS} masked tokens, width {WIDTH}, vocabulary {VOCAB_SIZE}, {DTYPE}, {DEVICE}",
        workloads,
        baseline="eager",
        ours="ours",
        gate="forward+backward",
        target=TARGET,
    )
