"""Linear layer and cross entropy at the masked tokens, at the official width and vocabulary: D = 768, V = 50,265.

    python benchmarks/bench_masked_token_loss.py            # the table
    python benchmarks/bench_masked_token_loss.py --check    # and exit with 1 below a target
    pytest benchmarks/bench_masked_token_loss.py --benchmark-json=history.json

The three products need 6 M D V operations, 356 GFLOP at M = 1,536, the masked tokens of a batch of 256. Bytes: the
tokens, the weight and their gradients once each; the logits are each variant's own doing.

Peers: eager and torch.compile on the masked tokens, PyTorch's own chunked loss where this version has it, and of the
extra "bench" liger-kernel's Triton kernel and cut-cross-entropy's exact one, which need a GPU. There, too, the
original's way: the logits of all 64 positions of the texts, from which the loss leaves out those that are not masked.
"""

import importlib.util
from functools import partial

import torch
import torch.nn.functional as F
from op_benchmark import DEVICE, OpBenchmark, Target, Workload, main, pytest_cases

from fastm3ae.kernels import masked_token_loss

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
WIDTH, VOCAB_SIZE = 768, 50265
# Of a text of the batch, 64 positions of which 40 are valid, 15 % of them masked.
MASKED_PER_TEXT, POSITIONS_PER_TEXT = 6, 64


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


VARIANTS = {"eager": eager, "torch.compile": torch.compile(eager, fullgraph=True, dynamic=False)}
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
    """Holds every variant's results to float64's eager ones."""
    exact = [x.detach().double().requires_grad_() for x in inputs[:3]]
    truth = direction(eager, *exact, inputs[3])
    for name, function in variants.items():
        bound = 16 * torch.finfo(DTYPE).eps
        if name == "torch chunked":  # whose gradient of few tokens is off by 1e-5
            bound = max(1e-4, bound)
        for got, want in zip(direction(function, *inputs), truth, strict=True):
            error = (got - want).abs().max() / want.abs().max()
            assert error < bound, f"{name} is not timed: it is wrong by {error:.1e}"


def make(batch_size):
    num_tokens = batch_size * MASKED_PER_TEXT
    inputs = make_inputs(num_tokens)
    num_values = (num_tokens + VOCAB_SIZE) * WIDTH
    made = {}
    for name, direction in {"forward": forward, "forward+backward": forward_backward}.items():
        check(VARIANTS, direction, inputs)
        runs = {variant: partial(direction, function, *inputs) for variant, function in VARIANTS.items()}
        if DEVICE == "cuda":
            of_all = make_inputs(num_tokens, batch_size * POSITIONS_PER_TEXT)
            runs["original's way"] = partial(direction, eager, *of_all)
        num_passes = 1 if direction is forward else 3
        num_bytes = num_values * inputs[0].itemsize * min(num_passes, 2)
        made[name] = Workload(runs, num_bytes, num_flops=num_passes * 2 * num_tokens * WIDTH * VOCAB_SIZE)
    return made


SPEC = OpBenchmark(
    op="masked_token_loss",
    shape=f"{MASKED_PER_TEXT} masked tokens of a text, width {WIDTH}, vocabulary {VOCAB_SIZE}, {DTYPE}",
    workloads=("forward", "forward+backward"),
    variants=(*VARIANTS, *(["original's way"] if DEVICE == "cuda" else [])),
    make=make,
    batch_size={"cuda": 256, "cpu": 64},
    targets={
        "cuda": (
            Target("forward+backward", "original's way", 22.0),
            Target("forward+backward", "torch.compile", 1.25),
            Target("forward+backward", "liger", 4.0),
            Target("forward+backward", "cut ce exact", 1.3),
            Target("forward+backward", "product", 0.75),
        ),
        # Nearly all of the time goes into the products, which are the same ones.
        "cpu": (Target("forward+backward", "eager", 0.95),),
    },
    rounds={"cuda": 50, "cpu": 4},
)
test_masked_token_loss = pytest_cases(SPEC)

if __name__ == "__main__":
    main(SPEC, __doc__)
