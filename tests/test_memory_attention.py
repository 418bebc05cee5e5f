from dataclasses import dataclass

import pytest
import torch

from fastm3ae.kernels import memory_attention
from fastm3ae.kernels.memory_attention import memory_attention_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


@dataclass(frozen=True)
class Case:
    batch_size: int
    num_queries: int
    num_keys: int
    num_slots: int
    num_heads: int = 2
    head_dim: int = 32

    def inputs(self, dtype=torch.float32, device="cpu"):
        """q, k, v and the slots' keys and values, which want gradients."""
        torch.manual_seed(0)
        B, Q, S, M = self.batch_size, self.num_queries, self.num_keys, self.num_slots
        shapes = ((B, Q), (B, S), (B, S), (M,), (M,))
        made = (torch.randn(*shape, self.num_heads, self.head_dim, dtype=torch.float64) for shape in shapes)
        return [x.to(device, dtype).requires_grad_() for x in made]


CASES = {
    "one": Case(1, 1, 1, 1, 1),
    "no_samples": Case(0, 3, 5, 2),
    "no_slots": Case(2, 3, 5, 0),
    "no_keys_of_its_own": Case(2, 3, 0, 4),
    "odd": Case(3, 7, 5, 9, 3),
    "prime": Case(5, 31, 37, 13, 1, 64),
    "of_the_model": Case(2, 64, 49, 64, 12, 64),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_device = pytest.mark.parametrize("device", DEVICES)


def out_and_grads(function, inputs):
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out.square().sum(), inputs)


@each_case
@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_the_reference_in_float64(case, dtype, device):
    inputs = case.inputs(dtype, device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = out_and_grads(memory_attention_reference, exact)
    eager = out_and_grads(memory_attention_reference, inputs)
    for got, approximate, want in zip(out_and_grads(memory_attention, inputs), eager, truth, strict=True):
        assert got.shape == want.shape and got.dtype == dtype
        if got.numel():
            rounding = 4 * torch.finfo(dtype).eps * want.abs().max()
            assert (got - want).abs().max() <= 2 * (approximate - want).abs().max() + rounding


def test_gradcheck():
    assert torch.autograd.gradcheck(memory_attention, Case(2, 2, 3, 2, 2, 3).inputs(torch.float64))


@each_device
def test_compiles_into_one_graph(device):
    inputs = CASES["odd"].inputs(device=device)
    compiled = torch.compile(memory_attention, fullgraph=True)
    assert torch.equal(compiled(*inputs), memory_attention(*inputs))


def test_dropout_drops_and_repeats():
    q, k, _, memory_k, _ = CASES["odd"].inputs()
    seed, ones = torch.tensor(5), (torch.ones_like(k), torch.ones_like(memory_k))
    once, again, other, none = (
        memory_attention(q, k, ones[0], memory_k, ones[1], dropout_frac=frac, seed=value)
        for frac, value in ((0.5, seed), (0.5, seed), (0.5, seed + 1), (0.0, None))
    )
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert (none - 1).abs().max() < 1e-5 and (once - 1).abs().max() > 0.1 and abs(once.mean() - 1) < 0.2


Q, K, V, MEMORY_K, MEMORY_V = CASES["odd"].inputs()
MISTAKES = {
    "flat_q": ((Q[0], K, V, MEMORY_K, MEMORY_V), r"q must be \(B, ., H, d\), B as q's, got \(7, 3, 32\) float32"),
    "k_of_other_batch": ((Q, K[:2], V, MEMORY_K, MEMORY_V), r"k must be .* got \(2, 5, 3, 32\)"),
    "fewer_v": ((Q, K, V[:, :2], MEMORY_K, MEMORY_V), r"v must be \(S, 3, 32\) in q's dtype, as many as k"),
    "half_memory": ((Q, K, V, MEMORY_K.half(), MEMORY_V), "memory's keys must be .* got .* float16"),
    "other_device": ((Q, K, V, MEMORY_K.to("meta"), MEMORY_V), "must be on one device"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(mistake):
    arguments, message = mistake
    with pytest.raises(ValueError, match=message):
        memory_attention(*arguments)


def test_dropout_needs_a_seed():
    with pytest.raises(ValueError, match="seed must be"):
        memory_attention(Q, K, V, MEMORY_K, MEMORY_V, dropout_frac=0.1)
