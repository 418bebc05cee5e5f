from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from test_gather_patches import assert_all_equal
from torch import Tensor

from fastm3ae.kernels import packed_attention, packed_attention_cpu
from fastm3ae.kernels.packed_attention import packed_attention_reference, philox_is_kept

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    memory_k: Tensor
    memory_v: Tensor
    q_offsets: Tensor
    k_offsets: Tensor
    lens: dict[str, int]
    grad: Tensor

    def map(self, function):
        """The same with the floats changed."""
        floats = {name: function(x) for name, x in self._asdict().items() if name in (*LEAVES, "grad")}
        return self._replace(**floats)


LEAVES = ("q", "k", "v", "memory_k", "memory_v")


@dataclass(frozen=True)
class Case:
    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    num_heads: int = 2
    head_dim: int = 32
    num_slots: int = 0

    def inputs(self, dtype=torch.float32, device="cpu") -> Inputs:
        torch.manual_seed(0)
        Q, S, M = sum(self.q_lens), sum(self.k_lens), self.num_slots
        shapes = (Q, S, S, M, M, Q)
        floats = [torch.randn(rows, self.num_heads, self.head_dim, dtype=torch.float64) for rows in shapes]
        *leaves, grad = (x.to(device, dtype) for x in floats)
        return Inputs(*leaves, *self.offsets(device), self.max_lens, grad)

    def offsets(self, device="cpu"):
        lens = (self.q_lens, self.k_lens)
        return [torch.tensor([0, *ones], device=device).cumsum(0).int() for ones in lens]

    @property
    def max_lens(self):
        return {"max_q_len": max(self.q_lens, default=0), "max_k_len": max(self.k_lens, default=0)}


CASES = {
    "one": Case((1,), (1,), 1),
    "no_sequences": Case((), (), num_slots=3),
    "single": Case((13,), (13,)),
    "odd": Case((3, 5, 1), (7, 2, 9), 3, num_slots=5),
    "prime": Case((13, 31, 67), (71, 5, 3), head_dim=64, num_slots=67),
    "without_queries": Case((0, 0), (3, 2), num_slots=2),
    "without_keys": Case((4, 1), (0, 0)),
    "slots_alone": Case((4, 1), (0, 0), num_slots=3),
    "some_empty": Case((0, 4, 2, 0, 3), (3, 0, 5, 0, 4)),
    "some_empty_with_slots": Case((0, 4, 2, 0, 3), (3, 0, 5, 0, 4), num_slots=1),
    "equal": Case((9,) * 5, (9,) * 5),
    "similar": Case((17, 16, 18, 20, 3, 17), (33, 35, 31, 36, 33, 32)),
    "official_self": Case((325, 325, 82), (325, 325, 82), 12, 64),
    "official_cross": Case((40, 25, 64), (325, 325, 82), 12, 64, num_slots=64),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_device = pytest.mark.parametrize("device", DEVICES)
ODD = CASES["odd"]
DROPOUT = {"dropout_frac": 0.3}
NUM_DROPPED = round(0.3 * 2**16)


def attend(inputs: Inputs, function=packed_attention, **options):
    q, k, v, memory_k, memory_v, q_offsets, k_offsets, lens, _ = inputs
    memory = (memory_k, memory_v) if len(memory_k) else None
    return function(q, k, v, q_offsets, k_offsets, **lens, memory=memory, **options)


def out_and_grads(inputs: Inputs, function=packed_attention, **options):
    """The result and the gradients of all five inputs, zeros of a memory without slots."""
    inputs = inputs._replace(**{name: getattr(inputs, name).detach().requires_grad_() for name in LEAVES})
    out = attend(inputs, function, **options)
    leaves = [getattr(inputs, name) for name in LEAVES]
    grads = torch.autograd.grad(out, leaves, inputs.grad, allow_unused=True, materialize_grads=True)
    return out.detach(), *grads


def reference(q, k, v, q_offsets, k_offsets, *, max_q_len, max_k_len, **options):
    return packed_attention_reference(q, k, v, q_offsets, k_offsets, **options)


def eager(q, k, v, q_offsets, k_offsets, *, max_q_len, max_k_len, memory=None, is_kept=None):
    """As one writes it for a sequence, in q's dtype."""
    out = []
    packed = (q, q_offsets), (k, k_offsets), (v, k_offsets)
    sequences = zip(*(x.split(offsets.diff().tolist()) for x, offsets in packed), strict=True)
    for i, (queries, keys, values) in enumerate(sequences):
        if memory is not None:
            keys, values = torch.cat([memory[0], keys]), torch.cat([memory[1], values])
        weights = (torch.einsum("qhd,khd->hqk", queries, keys) / q.shape[-1] ** 0.5).softmax(dim=-1)
        if is_kept is not None:
            weights = weights * is_kept[i] / (1 - NUM_DROPPED / 2**16)
        out.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat([*out, q[:0]])


def assert_at_most_twice_the_error(got, approximate, exact):
    """Each result errs at most twice as much as eager PyTorch does, plus one rounding of the largest of them.

    The gradients of queries and keys are differences of numbers as large as the others; with one key they are 0.
    """
    largest = max((true.abs().max() for true in exact if true.numel()), default=0)
    for one, eagers, true in zip(got, approximate, exact, strict=True):
        assert one.dtype == eagers.dtype and one.shape == eagers.shape
        if one.numel():
            error, allowed = (one - true).abs().max(), 2 * (eagers - true).abs().max()
            assert error <= allowed + torch.finfo(one.dtype).eps * largest


def weights_of(case: Case, device="cpu", dtype=torch.float64, **options) -> list[Tensor]:
    """Each sequence's weights (H, q_len, M + k_len), read off from values that are unit vectors."""
    inputs = case.inputs(dtype, device)
    unit = torch.eye(case.head_dim, dtype=dtype, device=device)[:, None].expand(-1, case.num_heads, -1)
    places = [case.num_slots + torch.arange(k_len, device=device) for k_len in case.k_lens]
    inputs = inputs._replace(v=unit[torch.cat(places)], memory_v=unit[: case.num_slots])
    out = attend(inputs, **options).split(case.q_lens)
    return [x.transpose(0, 1)[..., : case.num_slots + k_len] for x, k_len in zip(out, case.k_lens, strict=True)]


@each_case
@each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_eager(case, dtype, device):
    inputs = case.inputs(dtype, device)
    exact = out_and_grads(inputs.map(torch.Tensor.double), reference)
    assert_at_most_twice_the_error(out_and_grads(inputs), out_and_grads(inputs, eager), exact)


@each_case
def test_float64_agrees_with_the_reference_and_with_eager(case):
    inputs = case.inputs(torch.float64)
    got = out_and_grads(inputs)
    for function in (reference, eager):
        for one, want in zip(got, out_and_grads(inputs, function), strict=True):
            torch.testing.assert_close(one, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["", "dropout"])
def test_gradcheck(options):
    case = Case((2, 3, 0), (4, 1, 2), 2, 3, num_slots=2)
    inputs, seed = case.inputs(torch.float64), torch.tensor(7)
    leaves = [getattr(inputs, name).requires_grad_() for name in LEAVES]

    def function(*leaves):
        return attend(inputs._replace(**dict(zip(LEAVES, leaves, strict=True))), seed=seed, **options)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("piece", [1, 50, 1 << 19])
@pytest.mark.parametrize("group", [-1, 0, 60, 1 << 30])
def test_any_grouping_on_the_cpu_gives_the_same(piece, group, monkeypatch):
    monkeypatch.setattr(packed_attention_cpu, "_PIECE_SCORES", piece)
    monkeypatch.setattr(packed_attention_cpu, "_GROUP_SCORES", group)
    for name in ("odd", "some_empty", "some_empty_with_slots", "equal", "similar"):
        inputs = CASES[name].inputs(torch.float64)
        for got, want in zip(out_and_grads(inputs), out_and_grads(inputs, reference), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


# The unit vectors of 32 dimensions tell so many slots and keys apart.
DROPPED_CASES = {
    "odd": ODD,
    "equal": Case((19,) * 4, (19,) * 4),
    "similar": Case((17, 16, 18), (23, 21, 22), num_slots=9),
}
each_dropped_case = pytest.mark.parametrize("case", DROPPED_CASES.values(), ids=DROPPED_CASES.keys())


@each_dropped_case
@each_device
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1])
def test_dropout_is_the_references_with_the_weights_it_keeps(case, seed, device):
    dtype = torch.float64 if device == "cpu" else torch.float32
    seed = torch.tensor(seed, device=device)
    is_kept = [weights != 0 for weights in weights_of(case, device, dtype, seed=seed, **DROPOUT)]
    inputs = case.inputs(dtype, device)
    got = out_and_grads(inputs, seed=seed, **DROPOUT)
    kept = {"is_kept": is_kept, "kept_frac": 1 - NUM_DROPPED / 2**16}
    want = out_and_grads(inputs.map(torch.Tensor.double), reference, **kept)
    if device == "cpu":
        for one, expected in zip(got, want, strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-11, atol=1e-12)
    else:
        assert_at_most_twice_the_error(got, out_and_grads(inputs, eager, is_kept=is_kept), want)
        expected = philox_is_kept(seed, NUM_DROPPED, *case.offsets(device), case.num_heads, case.num_slots)
        assert_all_equal(is_kept, expected)


@each_device
def test_dropout_keeps_what_it_should(device):
    case = Case((31,) * 30, (31,) * 30, 4)
    for seed in range(3):
        dropped = weights_of(case, device, torch.float32, seed=torch.tensor(seed, device=device), **DROPOUT)
        is_kept = torch.stack([weights != 0 for weights in dropped])
        deviation = 5 * (0.3 * 0.7 / is_kept[0].numel()) ** 0.5
        # In every sequence: the ones after the first draw numbers of their own.
        assert ((is_kept.float().mean(dim=(1, 2, 3)) - 0.7).abs() < deviation).all()
        flat = is_kept.flatten(1).float() - 0.7
        correlation = flat @ flat.T / flat.shape[1] / 0.21
        assert correlation.fill_diagonal_(0).abs().max() < 5.5 / flat.shape[1] ** 0.5
        over_keys = is_kept.float().mean(dim=(0, 1, 2))
        assert ((over_keys - 0.7).abs() < 5 * (0.21 / (is_kept.numel() / 31)) ** 0.5).all()


@each_device
def test_dropout_changes_nothing_in_the_mean(device):
    case = Case((3, 4), (5, 2), 2, num_slots=3)
    inputs = case.inputs(torch.float32, device)
    runs = [out_and_grads(inputs, seed=torch.tensor(seed, device=device), dropout_frac=0.4) for seed in range(400)]
    # The gradients of queries and keys contain the product of a weight's dropout with itself, whose mean is not 1.
    for i, want in enumerate(out_and_grads(inputs)):
        if i in (0, 3, 5):
            values = torch.stack([run[i] for run in runs])
            error = (values.mean(dim=0) - want) / (values.std(dim=0) / 20 + 1e-6)
            assert error.abs().max() < 5 and error.square().mean() < 1.5


@each_device
def test_seed_decides(device):
    inputs = ODD.inputs(device=device)
    one, again, other = (
        out_and_grads(inputs, seed=torch.tensor(seed, device=device), **DROPOUT) for seed in (3, 3, 3 + 2**32)
    )
    assert_all_equal(one, again)
    assert not torch.equal(one[0], other[0])


@each_device
def test_extreme_dropout(device):
    inputs, seed = ODD.inputs(device=device), torch.tensor(1, device=device)
    assert_all_equal(out_and_grads(inputs, seed=seed, dropout_frac=1e-9), out_and_grads(inputs))
    assert all(x.isfinite().all() for x in out_and_grads(inputs, seed=seed, dropout_frac=1 - 1e-9))


def test_philox_has_the_known_answers():
    """Of philox4x32 with 7 rounds, key and counter 0, in the kat_vectors of the authors' Random123."""
    words = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    draws = [draw for word in words for draw in (word & 0xFFFF, word >> 16)]
    offsets = torch.tensor([0, 1]).int(), torch.tensor([0, 8]).int()
    for j, draw in enumerate(draws):
        for num_dropped in (draw, draw + 1):
            (is_kept,) = philox_is_kept(torch.tensor(0), num_dropped, *offsets, 1, 0)
            assert is_kept[0, 0, j] == (draw >= num_dropped)


@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["", "dropout"])
@each_device
def test_opcheck(options, device):
    q, k, v, *memory, q_offsets, k_offsets, lens, grad = ODD.inputs(torch.bfloat16, device)
    seed = torch.tensor(5, device=device)
    places = (q_offsets, k_offsets, *memory, seed, *lens.values(), NUM_DROPPED if options else 0)
    out, lse = torch.ops.fastm3ae.packed_attention(q, k, v, *places)
    torch.library.opcheck(torch.ops.fastm3ae.packed_attention.default, (q, k, v, *places))
    arguments = (grad, q, k, v, out, lse, *places)
    torch.library.opcheck(torch.ops.fastm3ae.packed_attention_backward.default, arguments)


@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["", "dropout"])
@each_device
def test_compiles_into_one_graph(options, device):
    inputs, options = ODD.inputs(device=device), {"seed": torch.tensor(5, device=device), **options}
    compiled = torch.compile(packed_attention, fullgraph=True)
    assert_all_equal(out_and_grads(inputs, compiled, **options), out_and_grads(inputs, **options))


@each_device
def test_a_compiled_function_takes_other_lengths_and_seeds(device):
    compiled = torch.compile(packed_attention, fullgraph=True, dynamic=True)
    for case, seed in ((ODD, 1), (CASES["similar"], 2), (ODD, 3)):
        inputs, options = case.inputs(device=device), {"seed": torch.tensor(seed, device=device), **DROPOUT}
        assert_all_equal(out_and_grads(inputs, compiled, **options), out_and_grads(inputs, **options))


@pytest.mark.parametrize("name", ["odd", "similar", "official_self"])
@each_device
def test_strided_inputs(name, device):
    inputs = CASES[name].inputs(device=device)
    want = out_and_grads(inputs)
    others = torch.randn_like(inputs.k), torch.randn_like(inputs.q)
    fused = torch.stack([inputs.k, others[0], inputs.v], dim=1)  # as one product gives it
    views = {"q": torch.stack([others[1], inputs.q], dim=2)[:, :, 1], "k": fused[:, 0], "v": fused[:, 2]}
    turned = {name: getattr(inputs, name).mT.contiguous().mT for name in (*LEAVES, "grad")}
    expanded = inputs.grad[:, :1].expand_as(inputs.grad)
    for strided in (views, turned):
        assert not any(x.is_contiguous() for x in strided.values() if len(x))
        assert_all_equal(out_and_grads(inputs._replace(**strided)), want)
    got = out_and_grads(inputs._replace(grad=expanded))
    assert_all_equal(got, out_and_grads(inputs._replace(grad=expanded.contiguous())))


@pytest.mark.parametrize(
    "wanted", [{"q"}, {"k"}, {"v"}, {"memory_k"}, {"k", "memory_v"}], ids=lambda names: "+".join(sorted(names))
)
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
    inputs, seed = CASES["official_cross"].inputs(torch.bfloat16, device), torch.tensor(9, device=device)
    assert_all_equal(*(out_and_grads(inputs, seed=seed, **DROPOUT) for _ in range(2)))


@each_device
def test_nan_stays_in_its_sequence(device):
    inputs = CASES["similar"].inputs(device=device)
    for name in ("q", "k", "v"):
        getattr(inputs, name)[20, 1, 3] = torch.nan
    out, grad_q, grad_k, grad_v, _, _ = out_and_grads(inputs)
    # Row 20 is the fourth query of the second sequence, and a key of the first.
    for x, last in ((out, 33), (grad_q, 33), (grad_k, 68), (grad_v, 68)):
        assert x[:last, 1].isnan().any() and x[:, 0].isfinite().all() and x[last:].isfinite().all()


@each_device
def test_large_scores_do_not_overflow(device):
    inputs = ODD.inputs(device=device).map(lambda x: x * 30)
    exact = out_and_grads(inputs.map(torch.Tensor.double), reference)
    assert_at_most_twice_the_error(out_and_grads(inputs), out_and_grads(inputs, eager), exact)
