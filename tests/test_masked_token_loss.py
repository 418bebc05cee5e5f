import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from fastm3ae import _C
from fastm3ae.kernels import masked_token_loss
from fastm3ae.kernels.masked_token_loss import (
    launch_masked_token_loss_cpu,
    launch_masked_token_loss_cuda,
    masked_token_loss_backward_reference,
    masked_token_loss_reference,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
pytestmark = pytest.mark.usefixtures("nan_filled_empty")


@pytest.fixture
def small_chunks(monkeypatch):
    """On the CPU chunks of 1 MiB of logits: three at 61 x 10,007, three at 12 x 50,265."""
    # Not by its name: that is the function's in the front door.
    monkeypatch.setattr(sys.modules["fastm3ae.kernels.masked_token_loss"], "_CHUNK_MIB", 1)


@dataclass(frozen=True)
class Case:
    num_tokens: int
    width: int
    vocab_size: int

    def inputs(self, dtype=torch.float32, device="cpu"):
        """tokens, weight, bias and labels; every other token has its label's logit above all others."""
        torch.manual_seed(0)
        M, D, V = self.num_tokens, self.width, self.vocab_size
        tokens, weight, bias = torch.randn(M, D).double(), torch.randn(V, D).double() / D**0.5, torch.randn(V).double()
        labels = torch.randint(V, (M,))
        labels[::2] = F.linear(tokens, weight, bias)[::2].argmax(1)
        return tuple(x.to(device, dtype) for x in (tokens, weight, bias)) + (labels.to(device),)


CASES = {
    "one": Case(1, 1, 1),
    "one_token": Case(1, 8, 31),
    "odd": Case(7, 5, 33),
    "prime": Case(61, 13, 10007),
    "multiple_of_64": Case(6, 16, 128),
    "no_tokens": Case(0, 8, 50),
    "official": Case(12, 768, 50265),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
ODD, PRIME = CASES["odd"], CASES["prime"]


def loss_and_grads(loss_function, *inputs):
    """The loss, the number of right predictions, and the gradients of tokens, weight and bias."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    loss, num_correct = loss_function(*leaves, inputs[3])
    return loss.detach(), num_correct, *torch.autograd.grad(loss, leaves)


@each_case
@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("small_chunks")
def test_error_is_at_most_twice_that_of_eager(case, dtype, device):
    inputs = case.inputs(dtype, device)
    exact = loss_and_grads(masked_token_loss_reference, *(x.double() for x in inputs[:3]), inputs[3])
    eager = loss_and_grads(masked_token_loss_reference, *inputs)
    ours = loss_and_grads(masked_token_loss, *inputs)
    for got, approximate, true in zip(ours, eager, exact, strict=True):
        assert got.dtype == approximate.dtype and got.shape == approximate.shape
        if got.dtype == torch.int64:
            continue
        if got.numel():
            rounding = torch.finfo(got.dtype).eps * true.abs().max()
            assert (got - true).abs().max() <= 2 * (approximate - true).abs().max() + rounding


@each_case
@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_number_of_right_predictions(case, dtype, device):
    inputs = case.inputs(dtype, device)
    logits = F.linear(*(x.double() for x in inputs[:3]))
    is_label = F.one_hot(inputs[3], case.vocab_size).bool()
    lead = logits[is_label] - logits.masked_fill(is_label, -torch.inf).amax(1)
    rounding = 2 * torch.finfo(dtype).eps * logits.abs().amax(1)
    _, num_correct = masked_token_loss(*inputs)
    assert (lead > rounding).sum() <= num_correct <= (lead > -rounding).sum()
    assert dtype != torch.float32 or (lead > rounding).sum() == (lead > -rounding).sum() >= case.num_tokens / 2


@each_case
def test_float64_agrees_with_the_reference(case):
    inputs = case.inputs(torch.float64)
    want = loss_and_grads(masked_token_loss_reference, *inputs)
    for got, expected in zip(loss_and_grads(masked_token_loss, *inputs), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@each_case
def test_reference_gradients_are_those_of_the_reference_loss(case):
    inputs = case.inputs(torch.float64)
    _, _, *grads = loss_and_grads(masked_token_loss_reference, *inputs)
    for got, expected in zip(masked_token_loss_backward_reference(*inputs), grads, strict=True):
        torch.testing.assert_close(got, expected)


def test_gradcheck():
    *inputs, labels = ODD.inputs(torch.float64)
    for x in inputs:
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: masked_token_loss(*x, labels)[0], inputs)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@each_device
def test_opcheck(dtype, needs, device):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("there is no float64 kernel on a GPU")
    torch.library.opcheck(torch.ops.fastm3ae.masked_token_loss.default, (*ODD.inputs(dtype, device), *needs))


@each_device
def test_compiles_into_one_graph(device):
    inputs = ODD.inputs(device=device)
    compiled = torch.compile(masked_token_loss, fullgraph=True)
    ours = loss_and_grads(masked_token_loss, *inputs)
    for got, want in zip(loss_and_grads(compiled, *inputs), ours, strict=True):
        assert torch.equal(got, want)


@each_device
def test_non_contiguous_inputs(device):
    tokens, weight, bias, labels = inputs = PRIME.inputs(device=device)
    every_other = [x.repeat_interleave(2)[::2] for x in (bias, labels)]
    strided = (tokens.T.contiguous().T, weight.T.contiguous().T, *every_other)
    assert not any(x.is_contiguous() for x in strided)
    for got, want in zip(
        loss_and_grads(masked_token_loss, *strided), loss_and_grads(masked_token_loss, *inputs), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@each_device
@pytest.mark.parametrize("needs_grad", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)])
def test_gradients_of_what_asks_for_one(needs_grad, device):
    inputs = PRIME.inputs(device=device)
    _, _, *want = loss_and_grads(masked_token_loss, *inputs)
    leaves = [x.detach().requires_grad_(bool(needed)) for x, needed in zip(inputs[:3], needs_grad, strict=True)]
    masked_token_loss(*leaves, inputs[3])[0].backward()
    for leaf, expected in zip(leaves, want, strict=True):
        assert torch.equal(leaf.grad, expected) if leaf.requires_grad else leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_gives_the_same_bits_for_every_number_of_threads(dtype):
    torch.manual_seed(0)
    M, V = 23, 50265  # large enough that eight threads are used
    logits, labels = torch.randn(M, V, dtype=dtype) * 5, torch.randint(V, (M,))
    launch = _C.masked_token_loss_cpu_float64 if dtype == torch.float64 else _C.masked_token_loss_cpu_float32
    results = []
    for num_threads in (1, 2, 3, 7):
        grad, loss, is_correct = logits.clone(), logits.new_empty(M), labels.new_empty(M, dtype=torch.bool)
        launch(
            logits=grad.data_ptr(), labels=labels.data_ptr(), num_tokens=M, vocab_size=V, needs_grad=True,
            num_threads=num_threads, loss=loss.data_ptr(), is_correct=is_correct.data_ptr(),
        )  # fmt: skip
        results.append((grad, loss, is_correct))
    for others in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], others, strict=True))
    torch.testing.assert_close(results[0][0], logits.softmax(1) - F.one_hot(labels, V), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(results[0][1], F.cross_entropy(logits, labels, reduction="none"))


@each_device
def test_same_bits_in_every_run(device):
    inputs = CASES["official"].inputs(device=device)
    want = loss_and_grads(masked_token_loss, *inputs)
    for _ in range(3):
        got = loss_and_grads(masked_token_loss, *inputs)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.usefixtures("small_chunks")
def test_the_logits_of_all_tokens_are_never_there_together():
    inputs = Case(256, 8, 10007).inputs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        launch_masked_token_loss_cpu(*inputs, True, True, True)
    assert 0 < max(event.cpu_memory_usage for event in profiler.events()) <= 1 << 20


@each_device
def test_no_tokens_cost_nothing(device):
    loss, num_correct, *grads = loss_and_grads(masked_token_loss, *CASES["no_tokens"].inputs(device=device))
    assert loss == 0 and num_correct == 0
    assert [grad.shape for grad in grads] == [(0, 8), (50, 8), (50,)] and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_device
def test_tokens_without_a_label_are_passed_over(dtype, device):
    """They change no other token's figures, whatever they hold."""
    *inputs, labels = PRIME.inputs(dtype, device)
    is_labelled = torch.arange(len(labels), device=device) % 3 != 1
    few = loss_and_grads(masked_token_loss, inputs[0][is_labelled], *inputs[1:], labels[is_labelled])
    inputs[0][~is_labelled] = torch.nan if dtype == torch.float32 else 7.0
    all_of_them = loss_and_grads(masked_token_loss, *inputs, labels.where(is_labelled, -100))
    assert torch.allclose(few[0], all_of_them[0], rtol=1e-6) and few[1] == all_of_them[1] > 0
    assert torch.allclose(few[2], all_of_them[2][is_labelled], atol=1e-7)
    assert not all_of_them[2][~is_labelled].any()
    if dtype == torch.bfloat16:
        for want, got in zip(few[3:], all_of_them[3:], strict=True):
            assert torch.allclose(want, got, rtol=1e-2, atol=1e-6)


@each_device
def test_no_label_at_all(device):
    loss, num_correct, *grads = loss_and_grads(
        masked_token_loss, *ODD.inputs(device=device)[:3], torch.full((7,), -100, device=device)
    )
    assert loss == 0 and num_correct == 0 and not any(grad.any() for grad in grads)


@each_device
def test_ties_go_to_the_first(device):
    tokens, weight, bias, _ = (x.zero_() for x in ODD.inputs(device=device))
    labels = torch.tensor([0, 1, 2, 31, 32, 0, 5], device=device)
    assert masked_token_loss(tokens, weight, bias, labels)[1] == 2
    bias[4] = bias[5] = bias[32] = 1.0
    assert masked_token_loss(tokens, weight, bias, labels)[1] == 0
    bias[5] = 1.5
    assert masked_token_loss(tokens, weight, bias, labels)[1] == 1


@each_device
def test_nan_shows(device):
    tokens, weight, bias, labels = PRIME.inputs(device=device)
    tokens[3, 1] = torch.nan
    loss, num_correct, grad_tokens, grad_weight, grad_bias = loss_and_grads(
        masked_token_loss, tokens, weight, bias, labels
    )
    assert loss.isnan() and grad_weight.isnan().all() and grad_bias.isnan().all()
    assert grad_tokens.isnan().any(1).nonzero().tolist() == [[3]]
    keep = torch.arange(61, device=device) != 3
    assert num_correct == masked_token_loss(tokens[keep], weight, bias, labels[keep])[1] > 0
    tokens[3, 1], bias[10006] = 0.0, torch.nan
    loss, num_correct = masked_token_loss(tokens, weight, bias, labels)
    assert loss.isnan() and num_correct == 0


@each_device
def test_infinite_logits(device):
    tokens, weight, bias, labels = PRIME.inputs(device=device)
    labels = labels.clamp(max=10000)
    want = loss_and_grads(masked_token_loss, tokens, weight[:10001], bias[:10001], labels)
    bias[10001:] = -torch.inf  # words that cannot be
    got = loss_and_grads(masked_token_loss, tokens, weight, bias, labels)
    assert not got[3][10001:].any() and not got[4][10001:].any()
    for x, y in zip((*got[:3], got[3][:10001], got[4][:10001]), want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
    bias[0] = torch.inf
    assert masked_token_loss(tokens, weight, bias, labels)[0].isnan()


@each_device
def test_large_logits_do_not_overflow(device):
    tokens, weight, bias, labels = PRIME.inputs(device=device)
    inputs = (1e4 * tokens, weight, bias, labels)
    want = loss_and_grads(masked_token_loss_reference, *inputs)
    for got, expected in zip(loss_and_grads(masked_token_loss, *inputs), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@each_device
def test_float16_gradients_survive_under_a_loss_scale(device):
    inputs, scale = PRIME.inputs(torch.float16, device), 2.0**14
    leaves = [x.requires_grad_() for x in inputs[:3]]
    scaled = torch.autograd.grad(scale * masked_token_loss(*leaves, inputs[3])[0], leaves)
    _, _, *exact = loss_and_grads(masked_token_loss_reference, *(x.detach().double() for x in leaves), inputs[3])
    for got, want in zip(scaled, exact, strict=True):
        assert (got / scale - want).abs().max() <= 2**-9 * want.abs().max()
    # A word that nobody says gets the probabilities of 61 tokens, each far below the smallest float16.
    torch.testing.assert_close(scaled[2].double() / scale, exact[2], rtol=2**-8, atol=1e-9)


@each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_tokens_and_parameters_but_not_their_gradients(dtype, device):
    tokens, weight, bias, labels = PRIME.inputs(device=device)
    want = loss_and_grads(masked_token_loss, *(x.to(dtype) for x in (tokens, weight, bias)), labels)
    with torch.autocast(device, dtype):
        got = loss_and_grads(masked_token_loss, tokens, weight, bias, labels)
    assert got[0] == want[0] and got[1] == want[1]
    for x, y in zip(got[2:], want[2:], strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y.float(), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_only_once_differentiable():
    *inputs, labels = ODD.inputs()
    loss = masked_token_loss(*(x.requires_grad_() for x in inputs), labels)[0].square()
    grads = torch.autograd.grad(loss, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[0].sum().backward()
    with torch.no_grad():
        assert not masked_token_loss(*inputs, labels)[0].requires_grad


@each_device
def test_backward_twice_through_a_kept_graph(device):
    *inputs, labels = ODD.inputs(device=device)
    loss, _ = masked_token_loss(*(x.requires_grad_() for x in inputs), labels)
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    twice = torch.autograd.grad(2 * loss, inputs)
    for first, second in zip(once, twice, strict=True):
        assert torch.equal(2 * first, second)


@pytest.mark.parametrize("label", [-101, -1, 33, 2**40])
def test_label_outside_the_vocabulary_is_refused(label):
    *inputs, labels = ODD.inputs()
    labels[4] = label
    with pytest.raises(IndexError, match=f"labels must be from 0 to 32, got {label}"):
        masked_token_loss(*inputs, labels)


@pytest.mark.gpu
@pytest.mark.parametrize("label", [-101, -1, 33, 63, 2**40])
def test_label_outside_the_vocabulary_is_nan_on_a_gpu(label):
    *inputs, labels = ODD.inputs(device="cuda")
    labels[4] = label
    loss, _, grad_tokens, *_ = loss_and_grads(masked_token_loss, *inputs, labels)
    assert loss.isnan() and grad_tokens.isnan().any(1).nonzero().tolist() == [[4]]
    with torch.autograd.set_detect_anomaly(True), pytest.raises(IndexError, match=f"from 0 to 32, got {label}"):
        masked_token_loss(*inputs, labels)


def test_without_the_cuda_build_a_gpus_tensors_are_refused(monkeypatch):
    monkeypatch.setattr(_C, "cuda_architectures", ())
    with pytest.raises(RuntimeError, match="masked_token_loss of CUDA tensors needs fastm3ae's CUDA kernels"):
        launch_masked_token_loss_cuda(*ODD.inputs(), True, True, True)


TOKENS, WEIGHT, BIAS, LABELS = ODD.inputs()
MISTAKES = {
    "tokens_of_texts": (TOKENS[None], WEIGHT, BIAS, LABELS, r"tokens must be \(M, D\) .* got \(1, 7, 5\) float32"),
    "integer_tokens": (TOKENS.int(), WEIGHT, BIAS, LABELS, "tokens must be .* float32 or bfloat16 .* int32"),
    "other_width": (TOKENS, WEIGHT[:, :4], BIAS, LABELS, r"weight must be \(V, D\) = \(V, 5\) .* got \(33, 4\)"),
    "transposed_weight": (TOKENS, WEIGHT.T, BIAS, LABELS, r"weight must be .* got \(5, 33\) float32"),
    "low_precision_weight": (TOKENS, WEIGHT.half(), BIAS, LABELS, "weight must be .* float32 for .* got .* float16"),
    "double_weight": (
        TOKENS.half(),
        WEIGHT.double(),
        BIAS,
        LABELS,
        "weight must be .* float16 or float32 for .* float64",
    ),
    "bias_of_other_vocabulary": (TOKENS, WEIGHT, BIAS[:32], LABELS, r"bias must be \(V,\) = \(33,\) .* got \(32,\)"),
    "double_bias": (TOKENS, WEIGHT, BIAS.double(), LABELS, "bias must be .* float32 for .* got .* float64"),
    "labels_of_other_length": (TOKENS, WEIGHT, BIAS, LABELS[:6], r"labels must be \(M,\) = \(7,\) int64, got \(6,\)"),
    "int32_labels": (TOKENS, WEIGHT, BIAS, LABELS.int(), "labels must be .* int64, got .* int32"),
    "other_device": (TOKENS, WEIGHT.to("meta"), BIAS, LABELS, "must be on one device, got cpu, meta, cpu and cpu"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(mistake):
    *inputs, message = mistake
    with pytest.raises(ValueError, match=message):
        masked_token_loss(*inputs)
