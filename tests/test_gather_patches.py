from dataclasses import dataclass

import pytest
import torch

from fastm3ae.kernels import gather_patches, scatter_patches_
from fastm3ae.kernels.gather_patches import (
    gather_patches_backward_reference,
    gather_patches_reference,
    scatter_patches_reference_,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# The tokens' and the parameters': as under autocast, where the parameters stay float32, and of the same dtype.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "autocast": (torch.bfloat16, torch.float32),
}

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


@dataclass(frozen=True)
class Case:
    batch_size: int
    num_patches: int
    num_kept: int
    width: int

    def inputs(self, dtype=torch.float32, positions_dtype=None, device="cpu"):
        """x, keep, positions and cls."""
        torch.manual_seed(0)
        B, N, K, D = self.batch_size, self.num_patches, self.num_kept, self.width
        keep = torch.rand(B, N).argsort(1)[:, :K]
        floats = [torch.randn(shape, dtype=torch.float64) for shape in ((B, N, D), (1 + N, D), (D,))]
        x, positions, cls = (
            value.to(device, one) for value, one in zip(floats, (dtype, *[positions_dtype or dtype] * 2), strict=True)
        )
        return x, keep.to(device), positions, cls

    def grad(self, dtype=torch.float32, device="cpu"):
        torch.manual_seed(1)
        return torch.randn(self.batch_size, 1 + self.num_kept, self.width, dtype=torch.float64).to(device, dtype)


CASES = {
    "one": Case(1, 1, 1, 1),
    "none_kept": Case(2, 5, 0, 3),
    "no_samples": Case(0, 5, 2, 3),
    "no_patches": Case(2, 0, 0, 3),
    "odd": Case(3, 15, 5, 9),
    "prime": Case(11, 13, 7, 257),
    "all_kept": Case(2, 9, 9, 16),
    "more_kept_than_a_block": Case(2, 140, 131, 5),
    "official": Case(4, 324, 81, 768),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_dtype = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
each_device = pytest.mark.parametrize("device", DEVICES)
ODD = CASES["odd"]


def tokens_and_grads(function, x, keep, positions, cls, grad):
    """The result and the gradients of x, positions and cls."""
    x, positions, cls = (value.detach().requires_grad_() for value in (x, positions, cls))
    tokens = function(x, keep, positions, cls)
    return tokens.detach(), *torch.autograd.grad(tokens, (x, positions, cls), grad.to(tokens.dtype))


def assert_all_equal(got, want):
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def assert_at_most_twice_the_error(got, approximate, exact):
    """Each result errs at most twice as much as eager PyTorch does, plus one rounding."""
    for one, eager, true in zip(got, approximate, exact, strict=True):
        assert one.dtype == eager.dtype and one.shape == eager.shape
        if one.numel():
            rounding = torch.finfo(one.dtype).eps * true.abs().max()
            assert (one - true).abs().max() <= 2 * (eager - true).abs().max() + rounding


@each_case
@each_device
@each_dtype
def test_error_is_at_most_twice_that_of_eager(case, dtypes, device):
    x, keep, positions, cls = case.inputs(*dtypes, device)
    grad = case.grad(torch.promote_types(*dtypes), device)
    exact = (x.double(), keep, positions.double(), cls.double(), grad.double())
    exact = tokens_and_grads(gather_patches_reference, *exact)
    eager = tokens_and_grads(gather_patches_reference, x, keep, positions, cls, grad)
    assert_at_most_twice_the_error(tokens_and_grads(gather_patches, x, keep, positions, cls, grad), eager, exact)


@each_case
@each_device
def test_tokens_are_those_of_the_reference_and_of_a_loop(case, device):
    x, keep, positions, cls = case.inputs(device=device)
    tokens = gather_patches(x, keep, positions, cls)
    assert torch.equal(tokens, gather_patches_reference(x, keep, positions, cls))
    for b in range(case.batch_size):
        assert torch.equal(tokens[b, 0], cls + positions[0])
        for k, patch in enumerate(keep[b].tolist()):
            assert torch.equal(tokens[b, 1 + k], x[b, patch] + positions[1 + patch])


@each_case
@each_device
@each_dtype
def test_tokens_are_those_of_the_reference_bit_for_bit(case, dtypes, device):
    inputs = case.inputs(*dtypes, device)
    assert torch.equal(gather_patches(*inputs), gather_patches_reference(*inputs))


@each_case
@each_device
def test_float64_agrees_with_the_reference(case, device):
    inputs = (*case.inputs(torch.float64, device=device), case.grad(torch.float64, device))
    want = tokens_and_grads(gather_patches_reference, *inputs)
    for got, expected in zip(tokens_and_grads(gather_patches, *inputs), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@each_case
def test_reference_gradient_is_the_references_gradient(case):
    x, keep, positions, cls = case.inputs(torch.float64)
    grad = case.grad(torch.float64)
    _, grad_x, grad_positions, grad_cls = tokens_and_grads(gather_patches_reference, x, keep, positions, cls, grad)
    got = gather_patches_backward_reference(grad, keep, case.num_patches, torch.float64, True)
    torch.testing.assert_close(got, (grad_x, grad_positions))
    torch.testing.assert_close(got[1][0], grad_cls)


def test_gradcheck():
    x, keep, positions, cls = Case(2, 5, 3, 2).inputs(torch.float64)
    leaves = [value.requires_grad_() for value in (x, positions, cls)]
    assert torch.autograd.gradcheck(lambda x, positions, cls: gather_patches(x, keep, positions, cls), leaves)


@each_case
@each_device
@each_dtype
def test_scatter_adds_to_the_kept_rows_alone(case, dtypes, device):
    x, keep, _, _ = case.inputs(dtypes[0], device=device)
    update = case.grad(dtypes[0], device)
    want = x.clone()
    for b in range(case.batch_size):
        for k, patch in enumerate(keep[b].tolist()):
            want[b, patch] += update[b, 1 + k]
    reference = x.clone()
    scatter_patches_reference_(reference, update, keep)
    scatter_patches_(x, update, keep)
    assert torch.equal(x, want) and torch.equal(reference, want)


@each_device
def test_opcheck(device):
    x, keep, positions, cls = ODD.inputs(torch.bfloat16, torch.float32, device)
    ops = torch.ops.fastm3ae
    torch.library.opcheck(ops.gather_patches.default, (x, keep, positions, cls))
    grad = ODD.grad(device=device)
    for needs_positions in (True, False):
        arguments = (grad, keep, ODD.num_patches, torch.bfloat16, needs_positions)
        torch.library.opcheck(ops.gather_patches_backward.default, arguments)
    torch.library.opcheck(ops.scatter_patches_.default, (x, grad.to(x.dtype), keep))


@each_device
def test_compiles_into_one_graph(device):
    inputs = (*ODD.inputs(device=device), ODD.grad(device=device))
    compiled = torch.compile(gather_patches, fullgraph=True)
    assert_all_equal(tokens_and_grads(compiled, *inputs), tokens_and_grads(gather_patches, *inputs))
    x, keep, update = inputs[0].clone(), inputs[1], inputs[-1]
    torch.compile(scatter_patches_, fullgraph=True)(x, update, keep)
    scatter_patches_(inputs[0], update, keep)
    assert torch.equal(x, inputs[0])


@each_device
def test_non_contiguous_inputs(device):
    inputs = (*ODD.inputs(device=device), ODD.grad(device=device))
    x, keep, positions, cls, grad = inputs
    # As a convolution gives its patches, channels before patches; every other element of a wider row.
    strided = (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        keep.T.contiguous().T,
        positions.T.contiguous().T,
        cls.repeat_interleave(2)[::2],
        grad.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert not any(value.is_contiguous() for value in strided)
    assert_all_equal(tokens_and_grads(gather_patches, *strided), tokens_and_grads(gather_patches, *inputs))
    want = x.clone()
    scatter_patches_(want, grad, keep)
    scatter_patches_(x, strided[-1], strided[1])
    assert torch.equal(x, want)


@pytest.mark.parametrize("wanted", [{0}, {2}, {3}, {0, 3}, {2, 3}], ids=str)
@each_device
def test_partial_requires_grad(wanted, device):
    inputs, grad = ODD.inputs(device=device), ODD.grad(device=device)
    _, *every = tokens_and_grads(gather_patches, *inputs, grad)
    leaves = [value.requires_grad_(i in wanted) for i, value in enumerate(inputs)]
    gather_patches(*leaves).backward(grad)
    for i, want in zip((0, 2, 3), every, strict=True):
        assert torch.equal(leaves[i].grad, want) if i in wanted else leaves[i].grad is None


@each_device
def test_without_gradients(device):
    x, keep, positions, cls = ODD.inputs(device=device)
    assert not gather_patches(x, keep, positions, cls).requires_grad
    with torch.no_grad():
        assert not gather_patches(x.requires_grad_(), keep, positions, cls).requires_grad


def test_differentiable_only_once():
    x, keep, positions, cls = ODD.inputs()
    loss = gather_patches(x.requires_grad_(), keep, positions, cls).square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@each_device
def test_same_bits_every_time(device):
    inputs = CASES["official"].inputs(torch.bfloat16, torch.float32, device)
    grad = CASES["official"].grad(device=device)
    once, again = (tokens_and_grads(gather_patches, *inputs, grad) for _ in range(2))
    assert_all_equal(once, again)


@each_device
def test_nan_stays_where_it_is_and_hidden_patches_are_not_read(device):
    x, keep, positions, cls = ODD.inputs(device=device)
    is_hidden = torch.ones(3, 15, dtype=torch.bool, device=device).scatter(1, keep, False)
    x[is_hidden] = torch.nan
    assert gather_patches(x, keep, positions, cls).isfinite().all()
    x[1, keep[1, 2], 4] = torch.nan
    assert gather_patches(x, keep, positions, cls).isnan().nonzero().tolist() == [[1, 3, 4]]


@pytest.mark.parametrize("index", [-1, 15])
def test_an_index_out_of_range_is_an_error(index):
    x, keep, positions, cls = ODD.inputs()
    keep[2, 3] = index
    with pytest.raises(IndexError, match="keep must be indices from 0 to 14, got"):
        gather_patches(x, keep, positions, cls)


X, KEEP, POSITIONS, CLS = ODD.inputs()
MISTAKES = {
    "flat_x": ((X[0], KEEP, POSITIONS, CLS), r"x must be \(B, N, D\) .* got \(15, 9\) float32"),
    "integer_x": ((X.int(), KEEP, POSITIONS, CLS), "x must be .* floating-point dtype, got .* int32"),
    "int32_keep": ((X, KEEP.int(), POSITIONS, CLS), r"keep must be \(B, K\) = \(3, K\) int64, got \(3, 5\) int32"),
    "keep_of_other_batch": ((X, KEEP[:2], POSITIONS, CLS), r"keep must be .* got \(2, 5\) int64"),
    "flat_keep": ((X, KEEP[0], POSITIONS, CLS), r"keep must be .* got \(5,\) int64"),
    "positions_without_cls": ((X, KEEP, POSITIONS[1:], CLS), r"positions must be \(1 \+ N, D\) = \(16, 9\) .* got"),
    "integer_positions": ((X, KEEP, POSITIONS.int(), CLS.int()), "positions must be .* got .* int32"),
    "wide_cls": ((X, KEEP, POSITIONS, CLS[:8]), r"cls must be \(D,\) = \(9,\) .* got \(8,\) float32"),
    "half_cls": ((X, KEEP, POSITIONS, CLS.half()), "cls must be .* in the positions' dtype, got .* float16"),
    "other_device": ((X.to("meta"), KEEP, POSITIONS, CLS), "must be on one device, got meta, cpu, cpu and cpu"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(mistake):
    arguments, message = mistake
    with pytest.raises(ValueError, match=message):
        gather_patches(*arguments)


UPDATE = ODD.grad()
SCATTER_MISTAKES = {
    "flat_x": ((X[0], UPDATE, KEEP), r"x must be \(B, N, D\) .* got \(15, 9\) float32"),
    "strided_x": ((X.transpose(1, 2), UPDATE, KEEP), "x must be .* contiguous"),
    "int32_keep": ((X, UPDATE, KEEP.int()), "keep must be .* got .* int32"),
    "update_without_cls": (
        (X, UPDATE[:, 1:], KEEP),
        r"update must be \(B, 1 \+ K, D\) = \(3, 6, 9\) .* got \(3, 5, 9\)",
    ),
    "half_update": ((X, UPDATE.half(), KEEP), "update must be .* in x's dtype, got .* float16"),
    "other_device": ((X, UPDATE.to("meta"), KEEP), "must be on one device, got cpu, meta and cpu"),
}


@pytest.mark.parametrize("mistake", SCATTER_MISTAKES.values(), ids=SCATTER_MISTAKES.keys())
def test_mistakes_of_scatter_are_named(mistake):
    arguments, message = mistake
    with pytest.raises(ValueError, match=message):
        scatter_patches_(*arguments)
