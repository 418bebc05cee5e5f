from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from test_gather_patches import assert_all_equal
from test_packed_attention import DEVICES, DTYPES, assert_at_most_twice_the_error
from torch import Tensor

from fastm3ae.kernels import topk_attention, topk_attention_cpu
from fastm3ae.kernels.topk_attention import topk_attention_reference

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    num_kept: int
    grad: Tensor

    def map(self, function):
        """The same with the floats changed."""
        return self._replace(**{name: function(getattr(self, name)) for name in (*LEAVES, "grad")})


LEAVES = ("q", "k", "v")


@dataclass(frozen=True)
class Case:
    """Queries and keys are multiples of 1 / ``steps``: their products are exact in every dtype, and so is the choice.

    With 64 steps equal scores are rare, with one they are frequent, and without any all scores are equal.
    """

    num_queries: int
    num_keys: int
    num_kept: int
    num_heads: int = 2
    head_dim: int = 32
    steps: int = 64

    def inputs(self, dtype=torch.float32, device="cpu") -> Inputs:
        torch.manual_seed(0)
        S, M, H, d = self.num_queries, self.num_keys, self.num_heads, self.head_dim
        q, k, v, grad = (torch.randn(rows, H, d, dtype=torch.float64) for rows in (S, M, M, S))
        # bfloat16 has 8 bits for the integers.
        q, k = ((x * self.steps).round().clamp(-255, 255) / max(1, self.steps) for x in (q, k))
        q, k, v, grad = (x.to(device, dtype) for x in (q, k, v, grad))
        return Inputs(q, k, v, self.num_kept, grad)


CASES = {
    "one": Case(1, 1, 1, 1),
    "two_of_many": Case(5, 40, 2),
    "odd": Case(5, 7, 3, 3),
    "prime": Case(67, 131, 17, head_dim=64),
    "all": Case(9, 37, 37),
    "all_of_a_block": Case(3, 64, 64),
    "all_but_one": Case(9, 65, 64),
    "more_than_a_block": Case(6, 150, 90),
    "ties": Case(40, 100, 11, steps=1),
    "ties_of_many": Case(5, 150, 90, steps=1),
    "equal": Case(4, 100, 33, steps=0),
    "no_queries": Case(0, 9, 4),
    "no_heads": Case(3, 9, 4, 0),
    "official": Case(113, 2048, 32, 12, 64),
    "official_ties": Case(113, 2048, 32, 2, 64, steps=1),
    "official_large": Case(3, 4099, 40, 1, 64),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_device = pytest.mark.parametrize("device", DEVICES)
ODD = CASES["odd"]


def attend(inputs: Inputs, function=topk_attention):
    return function(inputs.q, inputs.k, inputs.v, inputs.num_kept)


def out_and_grads(inputs: Inputs, function=topk_attention):
    """The result and the gradients of queries, keys and values."""
    inputs = inputs._replace(**{name: getattr(inputs, name).detach().requires_grad_() for name in LEAVES})
    out = attend(inputs, function)
    return out.detach(), *torch.autograd.grad(out, [getattr(inputs, name) for name in LEAVES], inputs.grad)


def chosen(q, k, v, num_kept) -> Tensor:
    """(H, S, M) bool: the scores above the last that is kept, and the first of those that equal it."""
    s = torch.einsum("shd,mhd->hsm", q.double(), k.double())
    last = s.sort(dim=-1, descending=True).values[..., num_kept - 1 : num_kept]
    num_equal = num_kept - (s > last).sum(dim=-1, keepdim=True)
    return (s > last) | ((s == last) & ((s == last).cumsum(dim=-1) <= num_equal))


def is_kept(kept: Tensor, num_keys: int) -> Tensor:
    """(H, S, M) bool of what the op stores for its backward pass."""
    if kept.is_cuda:
        bits = kept[..., None] >> torch.arange(32, device=kept.device) & 1
        assert not bits.flatten(-2)[..., num_keys:].any()
        return bits.flatten(-2)[..., :num_keys].bool()
    assert ((kept >= 0) & (kept < num_keys)).all()
    return torch.zeros(*kept.shape[:2], num_keys, dtype=torch.bool).scatter(-1, kept.long(), True)


def eager(q, k, v, num_kept):
    """As one writes it, in q's dtype, but that a rounded score does not decide which keys are kept."""
    s = torch.einsum("shd,mhd->hsm", q, k) / q.shape[-1] ** 0.5
    weights = s.masked_fill(~chosen(q, k, v, num_kept), -torch.inf).softmax(dim=-1)
    return torch.einsum("hsm,mhd->shd", weights, v)


@each_case
@each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_eager(case, dtype, device):
    inputs = case.inputs(dtype, device)
    exact = out_and_grads(inputs.map(torch.Tensor.double), topk_attention_reference)
    assert_at_most_twice_the_error(out_and_grads(inputs), out_and_grads(inputs, eager), exact)


@each_case
@each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_are_kept_and_of_equal_ones_the_first(case, dtype, device):
    q, k, v, num_kept, _ = case.inputs(dtype, device)
    kept = is_kept(torch.ops.fastm3ae.topk_attention(q, k, v, num_kept)[1], case.num_keys)
    assert torch.equal(kept, chosen(q, k, v, num_kept)) and (kept.sum(dim=-1) == num_kept).all()


@each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["prime", "more_than_a_block", "official"])
def test_of_rounded_products_as_many_are_kept_and_none_is_much_smaller(name, dtype, device):
    q, k, v, num_kept, _ = CASES[name].inputs(torch.float32, device).map(lambda x: (x * 3**0.5).to(dtype))
    kept = is_kept(torch.ops.fastm3ae.topk_attention(q, k, v, num_kept)[1], len(k))
    assert (kept.sum(dim=-1) == num_kept).all()
    s = torch.einsum("shd,mhd->hsm", q.double(), k.double())
    smallest, dropped = (s.where(mask, fill) for mask, fill in ((kept, torch.inf), (~kept, -torch.inf)))
    assert (smallest.amin(dim=-1) >= dropped.amax(dim=-1) - 1e-5 * s.abs().max()).all()


@each_case
def test_float64_agrees_with_the_reference_and_with_eager(case):
    inputs = case.inputs(torch.float64)
    got = out_and_grads(inputs)
    for function in (topk_attention_reference, eager):
        for one, want in zip(got, out_and_grads(inputs, function), strict=True):
            torch.testing.assert_close(one, want, rtol=1e-11, atol=1e-12)


def test_all_kept_is_plain_attention():
    q, k, v, num_kept, _ = CASES["all"].inputs(torch.float64)
    want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)))
    torch.testing.assert_close(topk_attention(q, k, v, num_kept), want[0].transpose(0, 1), rtol=1e-11, atol=1e-12)


@each_device
def test_one_kept_is_the_value_of_the_best_key(device):
    q, k, v, _, _ = CASES["prime"].inputs(device=device)
    best_HS = torch.einsum("shd,mhd->hsm", q, k).argmax(dim=-1)
    want_HSd = v.transpose(0, 1).take_along_dim(best_HS[..., None], dim=1)
    assert torch.equal(topk_attention(q, k, v, 1), want_HSd.transpose(0, 1))


def test_gradcheck():
    q, k, v, num_kept, _ = Case(4, 6, 3, 2, 3).inputs(torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for function in (topk_attention, topk_attention_reference):
        assert torch.autograd.gradcheck(lambda *leaves: function(*leaves, num_kept), leaves)  # noqa: B023


@pytest.mark.parametrize("size", [1, 60, 1 << 20])
def test_any_pieces_on_the_cpu_give_the_same(size, monkeypatch):
    monkeypatch.setattr(topk_attention_cpu, "_PIECE_SCORES", size)
    monkeypatch.setattr(topk_attention_cpu, "_PIECE_PAIRS", size)
    for name in ("odd", "ties", "no_queries"):
        inputs = CASES[name].inputs(torch.float64)
        for got, want in zip(out_and_grads(inputs), out_and_grads(inputs, topk_attention_reference), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@each_device
def test_opcheck(device):
    q, k, v, num_kept, grad = ODD.inputs(torch.bfloat16, device)
    saved = torch.ops.fastm3ae.topk_attention(q, k, v, num_kept)
    torch.library.opcheck(torch.ops.fastm3ae.topk_attention.default, (q, k, v, num_kept))
    torch.library.opcheck(torch.ops.fastm3ae.topk_attention_backward.default, (grad, q, k, v, *saved))


@each_device
def test_compiles_into_one_graph(device):
    inputs = ODD.inputs(device=device)
    compiled = torch.compile(topk_attention, fullgraph=True)
    assert_all_equal(out_and_grads(inputs, compiled), out_and_grads(inputs))


@each_device
def test_a_compiled_function_takes_other_sizes(device):
    compiled = torch.compile(topk_attention, fullgraph=True, dynamic=True)
    for case in (ODD, Case(13, 40, 5, 3), ODD):
        inputs = case.inputs(device=device)
        assert_all_equal(out_and_grads(inputs, compiled), out_and_grads(inputs))


@pytest.mark.parametrize("name", ["odd", "prime", "official"])
@each_device
def test_strided_inputs(name, device):
    inputs = CASES[name].inputs(device=device)
    want = out_and_grads(inputs)
    fused = torch.stack([inputs.k, torch.randn_like(inputs.k), inputs.v], dim=1)  # as one product gives it
    views = {"q": torch.stack([torch.randn_like(inputs.q), inputs.q], dim=2)[:, :, 1], "k": fused[:, 0]}
    views["v"] = fused[:, 2]
    turned = {name: getattr(inputs, name).mT.contiguous().mT for name in (*LEAVES, "grad")}
    for strided in (views, turned):
        assert not any(x.is_contiguous() for x in strided.values())
        assert_all_equal(out_and_grads(inputs._replace(**strided)), want)
    expanded = inputs.grad[:, :1].expand_as(inputs.grad)
    got = out_and_grads(inputs._replace(grad=expanded))
    assert_all_equal(got, out_and_grads(inputs._replace(grad=expanded.contiguous())))


@each_device
def test_the_same_keys_and_values(device):
    inputs = ODD.inputs(torch.float32, device)
    _, grad_q, grad_k, grad_v = out_and_grads(inputs._replace(v=inputs.k))
    q, k = (x.detach().requires_grad_() for x in (inputs.q, inputs.k))
    got = torch.autograd.grad(torch.compile(topk_attention, fullgraph=True)(q, k, k, 3), (q, k), inputs.grad)
    assert_all_equal(got, (grad_q, grad_k + grad_v))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv"])
@each_device
def test_partial_requires_grad(wanted, device):
    inputs = ODD.inputs(device=device)
    _, *every = out_and_grads(inputs)
    inputs = inputs._replace(**{name: getattr(inputs, name).requires_grad_(name in wanted) for name in LEAVES})
    attend(inputs).backward(inputs.grad)
    for name, want in zip(LEAVES, every, strict=True):
        got = getattr(inputs, name).grad
        assert torch.equal(got, want) if name in wanted else got is None


@each_device
def test_without_gradients(device):
    inputs = ODD.inputs(device=device)
    assert not attend(inputs).requires_grad
    with torch.no_grad():
        assert not attend(inputs._replace(q=inputs.q.requires_grad_())).requires_grad


def test_differentiable_only_once():
    inputs = ODD.inputs()
    q = inputs.q.requires_grad_()
    (grad,) = torch.autograd.grad(attend(inputs).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@each_device
def test_same_bits_every_time(device):
    inputs = CASES["official"].inputs(torch.bfloat16, device)
    assert_all_equal(*(out_and_grads(inputs) for _ in range(2)))


@each_device
@pytest.mark.parametrize("name", ["q", "k"])
def test_nan_gives_nan(name, device):
    inputs = CASES["prime"].inputs(device=device)
    getattr(inputs, name)[20, 1, 3] = torch.nan
    out = attend(inputs)
    reached = out[20:21] if name == "q" else out
    assert reached[:, 1].isnan().all() and out.isnan().sum() == reached[:, 1].numel()


@each_device
def test_large_scores_do_not_overflow(device):
    inputs = ODD.inputs(device=device).map(lambda x: x * 32)
    exact = out_and_grads(inputs.map(torch.Tensor.double), topk_attention_reference)
    assert_at_most_twice_the_error(out_and_grads(inputs), out_and_grads(inputs, eager), exact)


@each_device
def test_what_is_saved_is_a_32th_of_the_scores(device):
    q, k, v, num_kept, _ = CASES["official"].inputs(torch.float32, device)
    num_scores = q.shape[0] * q.shape[1] * len(k)
    assert all(x.numel() <= num_scores / 32 for x in torch.ops.fastm3ae.topk_attention(q, k, v, num_kept))


Q, K, V, NUM_KEPT, _ = ODD.inputs()
MISTAKES = {
    "flat_q": ({"q_SHd": Q[0]}, r"q must be \(S, H, d\) .* got \(3, 32\) float32"),
    "no_width": ({"q_SHd": Q[..., :0]}, r"q must be .* d > 0, got \(5, 3, 0\) float32"),
    "integer_q": ({"q_SHd": Q.int()}, "q must be .* floating-point dtype.* got .* int32"),
    "flat_k": ({"k_MHd": K[0]}, r"k must be \(M, 3, 32\) .* got \(3, 32\)"),
    "other_heads": ({"k_MHd": K[:, :2]}, r"k must be \(M, 3, 32\) .* got \(7, 2, 32\)"),
    "other_width_of_v": ({"v_MHd": V[..., :16]}, r"v must be \(M, 3, 32\) .* got \(7, 3, 16\)"),
    "fewer_values": ({"v_MHd": V[1:]}, r"v must be .* as many as k, got \(6, 3, 32\)"),
    "other_dtype_of_k": ({"k_MHd": K.half()}, "k must be .* in q's dtype.* got .* float16"),
    "other_dtype_of_v": ({"v_MHd": V.half()}, "v must be .* in q's dtype.* got .* float16"),
    "none_kept": ({"num_kept": 0}, "num_kept must be from 1 to the number of keys, 7, got 0"),
    "more_than_all": ({"num_kept": 8}, "num_kept must be from 1 to the number of keys, 7, got 8"),
    "no_keys": ({"k_MHd": K[:0], "v_MHd": V[:0]}, "num_kept must be from 1 to the number of keys, 0, got 3"),
    "other_device": ({"k_MHd": K.to("meta")}, "q, k and v must be on one device, got cpu, meta and cpu"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(mistake):
    changes, message = mistake
    with pytest.raises(ValueError, match=message):
        topk_attention(**{"q_SHd": Q, "k_MHd": K, "v_MHd": V, "num_kept": NUM_KEPT} | changes)


@pytest.mark.gpu
@pytest.mark.parametrize("change", [lambda x: x.double(), lambda x: x[..., :16]], ids=["float64", "width_16"])
def test_what_the_gpu_kernels_do_not_take_is_named(change):
    with pytest.raises(ValueError, match="q must have d = 32 or 64 and no float64 on CUDA, got"):
        attend(ODD.inputs(device="cuda").map(change))
