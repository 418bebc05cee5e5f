from dataclasses import dataclass

import pytest
import torch
from test_gather_patches import assert_all_equal, assert_at_most_twice_the_error, each_device, each_dtype

from fastm3ae.kernels import restore_patches
from fastm3ae.kernels.restore_patches import restore_patches_backward_reference, restore_patches_reference

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


@dataclass(frozen=True)
class Case:
    batch_size: int
    num_patches: int
    num_kept: int
    width: int

    def inputs(self, dtype=torch.float32, parameter_dtype=None, device="cpu"):
        """x, restore, mask token and positions."""
        torch.manual_seed(0)
        B, N, K, D = self.batch_size, self.num_patches, self.num_kept, self.width
        restore = torch.rand(B, N).argsort(1)
        floats = [torch.randn(shape, dtype=torch.float64) for shape in ((B, 1 + K, D), (D,), (1 + N, D))]
        x, mask_token, positions = (
            value.to(device, one) for value, one in zip(floats, (dtype, *[parameter_dtype or dtype] * 2), strict=True)
        )
        return x, restore.to(device), mask_token, positions

    def grad(self, dtype=torch.float32, device="cpu"):
        torch.manual_seed(1)
        return torch.randn(self.batch_size, 1 + self.num_patches, self.width, dtype=torch.float64).to(device, dtype)


CASES = {
    "one_kept": Case(1, 1, 1, 1),
    "one_hidden": Case(1, 1, 0, 1),
    "no_samples": Case(0, 5, 2, 3),
    "no_patches": Case(2, 0, 0, 3),
    "odd": Case(3, 15, 5, 9),
    "prime": Case(11, 37, 7, 131),
    "all_kept": Case(2, 9, 9, 16),
    "none_kept": Case(2, 9, 0, 16),
    "official": Case(4, 324, 81, 384),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
ODD = CASES["odd"]


def tokens_and_grads(function, x, restore, mask_token, positions, grad):
    """The result and the gradients of x and the mask token."""
    x, mask_token = x.detach().requires_grad_(), mask_token.detach().requires_grad_()
    tokens = function(x, restore, mask_token, positions)
    return tokens.detach(), *torch.autograd.grad(tokens, (x, mask_token), grad)


def eager(x, restore, mask_token, positions):
    """As MAE's and M3AE's code writes it, in x's dtype."""
    mask_tokens = mask_token.to(x.dtype).expand(len(x), 1 + restore.shape[1] - x.shape[1], -1)
    tokens = torch.cat([x[:, 1:], mask_tokens], dim=1).gather(1, restore[..., None].expand(-1, -1, x.shape[-1]))
    return torch.cat([x[:, :1], tokens], dim=1) + positions.to(x.dtype)


@each_case
@each_device
@each_dtype
def test_error_is_at_most_twice_that_of_eager(case, dtypes, device):
    x, restore, mask_token, positions = case.inputs(*dtypes, device)
    grad = case.grad(dtypes[0], device)
    exact = tokens_and_grads(eager, x.double(), restore, mask_token.double(), positions.double(), grad.double())
    inputs = (x, restore, mask_token, positions, grad)
    got, approximate = tokens_and_grads(restore_patches, *inputs), tokens_and_grads(eager, *inputs)
    assert_at_most_twice_the_error(got, approximate, exact)


@each_case
@each_device
def test_tokens_are_those_of_eager_and_of_a_loop(case, device):
    x, restore, mask_token, positions = case.inputs(device=device)
    tokens = restore_patches(x, restore, mask_token, positions)
    assert torch.equal(tokens, eager(x, restore, mask_token, positions))
    for b in range(case.batch_size):
        assert torch.equal(tokens[b, 0], x[b, 0] + positions[0])
        for n, rank in enumerate(restore[b].tolist()):
            token = x[b, 1 + rank] if rank < case.num_kept else mask_token
            assert torch.equal(tokens[b, 1 + n], token + positions[1 + n])


@each_case
@each_device
@each_dtype
def test_tokens_are_those_of_the_reference_bit_for_bit(case, dtypes, device):
    inputs = case.inputs(*dtypes, device)
    assert torch.equal(restore_patches(*inputs), restore_patches_reference(*inputs))


@each_case
@each_device
def test_float64_agrees_with_eager(case, device):
    inputs = (*case.inputs(torch.float64, device=device), case.grad(torch.float64, device))
    want = tokens_and_grads(eager, *inputs)
    for got, expected in zip(tokens_and_grads(restore_patches, *inputs), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@each_case
def test_reference_gradient_is_the_references_gradient(case):
    inputs, grad = case.inputs(torch.float64), case.grad(torch.float64)
    _, *want = tokens_and_grads(restore_patches_reference, *inputs, grad)
    got = restore_patches_backward_reference(grad, inputs[1], case.num_kept)
    torch.testing.assert_close(got, tuple(want))


def test_gradcheck():
    x, restore, mask_token, positions = Case(2, 5, 3, 2).inputs(torch.float64)
    leaves = [x.requires_grad_(), mask_token.requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, mask_token: restore_patches(x, restore, mask_token, positions), leaves)


@each_device
def test_opcheck(device):
    inputs = ODD.inputs(torch.bfloat16, torch.float32, device)
    torch.library.opcheck(torch.ops.fastm3ae.restore_patches.default, inputs)
    grad = ODD.grad(torch.bfloat16, device)
    torch.library.opcheck(torch.ops.fastm3ae.restore_patches_backward.default, (grad, inputs[1], ODD.num_kept))


@each_device
def test_compiles_into_one_graph(device):
    inputs = (*ODD.inputs(device=device), ODD.grad(device=device))
    compiled = torch.compile(restore_patches, fullgraph=True)
    assert_all_equal(tokens_and_grads(compiled, *inputs), tokens_and_grads(restore_patches, *inputs))


@each_device
def test_non_contiguous_inputs(device):
    inputs = (*ODD.inputs(device=device), ODD.grad(device=device))
    x, restore, mask_token, positions, grad = inputs
    strided = (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        restore.T.contiguous().T,
        mask_token.repeat_interleave(2)[::2],
        positions.T.contiguous().T,
        grad.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert not any(value.is_contiguous() for value in strided)
    assert_all_equal(tokens_and_grads(restore_patches, *strided), tokens_and_grads(restore_patches, *inputs))


@pytest.mark.parametrize("wanted", [{0}, {2}], ids=str)
@each_device
def test_partial_requires_grad(wanted, device):
    inputs, grad = ODD.inputs(device=device), ODD.grad(device=device)
    _, *every = tokens_and_grads(restore_patches, *inputs, grad)
    leaves = [value.requires_grad_(i in wanted) for i, value in enumerate(inputs)]
    restore_patches(*leaves).backward(grad)
    for i, want in zip((0, 2), every, strict=True):
        assert torch.equal(leaves[i].grad, want) if i in wanted else leaves[i].grad is None


@each_device
def test_without_gradients(device):
    inputs = ODD.inputs(device=device)
    assert not restore_patches(*inputs).requires_grad
    with torch.no_grad():
        assert not restore_patches(inputs[0].requires_grad_(), *inputs[1:]).requires_grad


def test_differentiable_only_once():
    inputs = ODD.inputs()
    loss = restore_patches(inputs[0].requires_grad_(), *inputs[1:]).square().sum()
    (grad,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@each_device
def test_same_bits_every_time(device):
    inputs = (*CASES["official"].inputs(torch.bfloat16, torch.float32, device),)
    grad = CASES["official"].grad(torch.bfloat16, device)
    once, again = (tokens_and_grads(restore_patches, *inputs, grad) for _ in range(2))
    assert_all_equal(once, again)


@each_device
def test_nan_stays_where_it_is(device):
    x, restore, mask_token, positions = ODD.inputs(device=device)
    x[1, 3, 4] = torch.nan
    patch = (restore[1] == 2).nonzero().item()
    assert restore_patches(x, restore, mask_token, positions).isnan().nonzero().tolist() == [[1, 1 + patch, 4]]
    grad = ODD.grad(device=device)
    grad[1, 1 + patch, 4] = torch.nan
    _, grad_x, grad_mask_token = tokens_and_grads(restore_patches, x, restore, mask_token, positions, grad)
    assert grad_x.isnan().nonzero().tolist() == [[1, 3, 4]] and grad_mask_token.isfinite().all()


@pytest.mark.parametrize("index", [-1, 15])
def test_an_index_out_of_range_is_an_error(index):
    x, restore, mask_token, positions = ODD.inputs()
    restore[2, 3] = index
    with pytest.raises(IndexError, match="restore must be indices from 0 to 14, got"):
        restore_patches(x, restore, mask_token, positions)


X, RESTORE, MASK_TOKEN, POSITIONS = ODD.inputs()
NAMES = ("x_BLD", "restore_BN", "mask_token_D", "positions_LD")
MISTAKES = {
    "flat_x": ({"x_BLD": X[0]}, r"x must be \(B, 1 \+ K, D\) .* got \(6, 9\) float32"),
    "x_without_cls": ({"x_BLD": X[:, :0]}, r"x must be \(B, 1 \+ K, D\) .* got \(3, 0, 9\) float32"),
    "integer_x": ({"x_BLD": X.int()}, "x must be .* floating-point dtype, got .* int32"),
    "more_tokens_than_patches": (
        {"restore_BN": RESTORE[:, :4]},
        r"x must have at most 1 \+ N = 5 tokens .* got \(3, 6, 9\)",
    ),
    "int32_restore": ({"restore_BN": RESTORE.int()}, r"restore must be \(B, N\) = \(3, N\) int64, got \(3, 15\) int32"),
    "restore_of_other_batch": ({"restore_BN": RESTORE[:2]}, r"restore must be .* got \(2, 15\) int64"),
    "wide_mask_token": ({"mask_token_D": MASK_TOKEN[:8]}, r"mask_token must be \(D,\) = \(9,\) .* got \(8,\) float32"),
    "integer_mask_token": ({"mask_token_D": MASK_TOKEN.int()}, "mask_token must be .* got .* int32"),
    "positions_without_cls": ({"positions_LD": POSITIONS[1:]}, r"positions must be \(1 \+ N, D\) = \(16, 9\) .* got"),
    "integer_positions": ({"positions_LD": POSITIONS.int()}, "positions must be .* got .* int32"),
    "learned_positions": (
        {"positions_LD": POSITIONS.clone().requires_grad_()},
        "positions must not require a gradient",
    ),
    "other_device": ({"x_BLD": X.to("meta")}, "must be on one device, got meta, cpu, cpu and cpu"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(mistake):
    changes, message = mistake
    with pytest.raises(ValueError, match=message):
        restore_patches(**dict(zip(NAMES, (X, RESTORE, MASK_TOKEN, POSITIONS), strict=True)) | changes)
