from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastm3ae.kernels import masked_pixel_loss
from fastm3ae.kernels.masked_pixel_loss import masked_pixel_loss_backward_reference, masked_pixel_loss_reference

GOLDEN = Path(__file__).parent / "data" / "masked_pixel_loss_golden.safetensors"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

pytestmark = [
    pytest.mark.usefixtures("nan_filled_empty"),
    # The reference takes the variance over no patches at all.
    pytest.mark.filterwarnings("ignore:var_mean.*degrees of freedom"),
]


@dataclass(frozen=True)
class Case:
    batch_size: int
    height_px: int
    width_px: int
    patch_size_px: int
    normalize_target: bool = True

    def inputs(self, dtype=torch.float32, device="cpu", hidden_frac=0.75):
        """pred, image and is_hidden; an image of patches with unlike means and contrasts, as radiographs have."""
        torch.manual_seed(0)
        B, p = self.batch_size, self.patch_size_px
        rows, columns = self.height_px // p, self.width_px // p
        image_dtype = torch.promote_types(dtype, torch.float32)
        image = torch.randn(B, 3, rows, p, columns, p, dtype=image_dtype)
        image = image * torch.rand(B, 3, rows, 1, columns, 1) + torch.randn(B, 3, rows, 1, columns, 1)
        pred = torch.randn(B, rows * columns, p * p * 3, dtype=image_dtype).to(dtype)
        is_hidden = torch.rand(B, rows * columns) < hidden_frac
        image = image.reshape(B, 3, self.height_px, self.width_px)
        return pred.to(device), image.to(device), is_hidden.to(device)

    @property
    def options(self):
        return {"patch_size_px": self.patch_size_px, "normalize_target": self.normalize_target}


CASES = {
    "one_patch_of_one_pixel": Case(1, 1, 1, 1),
    "one_patch": Case(1, 4, 4, 4),
    "odd": Case(3, 9, 15, 3),
    "prime": Case(7, 55, 33, 11),
    "wide": Case(2, 16, 96, 8),
    "no_samples": Case(0, 8, 8, 4),
    "patch_32": Case(2, 96, 96, 32),
    "official": Case(4, 288, 288, 16),
    "official_raw_pixels": Case(4, 288, 288, 16, normalize_target=False),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
ODD = CASES["odd"]


def loss_and_grad(loss_function, pred, *inputs, **options):
    pred = pred.detach().requires_grad_()
    loss = loss_function(pred, *inputs, **options)
    (grad,) = torch.autograd.grad(loss, pred)
    return loss.detach(), grad


@each_case
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_eager(case, dtype, device):
    pred, image, is_hidden = case.inputs(dtype, device)
    exact = loss_and_grad(masked_pixel_loss_reference, pred.double(), image.double(), is_hidden, **case.options)
    eager = loss_and_grad(masked_pixel_loss_reference, pred, image, is_hidden, **case.options)
    ours = loss_and_grad(masked_pixel_loss, pred, image, is_hidden, **case.options)
    for got, approximate, true in zip(ours, eager, exact, strict=True):
        assert got.dtype == approximate.dtype and got.shape == approximate.shape
        if got.numel():
            rounding = torch.finfo(got.dtype).eps * true.abs().max()
            assert (got - true).abs().max() <= 2 * (approximate - true).abs().max() + rounding


@each_case
@pytest.mark.parametrize("device", DEVICES)
def test_float64_agrees_with_the_reference(case, device):
    inputs = case.inputs(torch.float64, device)
    want = loss_and_grad(masked_pixel_loss_reference, *inputs, **case.options)
    for got, expected in zip(loss_and_grad(masked_pixel_loss, *inputs, **case.options), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@each_case
def test_reference_gradient_is_the_reference_losss_gradient(case):
    inputs = case.inputs(torch.float64)
    _, grad = loss_and_grad(masked_pixel_loss_reference, *inputs, **case.options)
    torch.testing.assert_close(masked_pixel_loss_backward_reference(*inputs, **case.options), grad)


@pytest.mark.parametrize("normalize_target", [True, False])
def test_gradcheck(normalize_target):
    pred, image, is_hidden = Case(2, 6, 4, 2).inputs(torch.float64)
    assert is_hidden.any() and not is_hidden.all()
    options = {"patch_size_px": 2, "normalize_target": normalize_target}
    assert torch.autograd.gradcheck(lambda x: masked_pixel_loss(x, image, is_hidden, **options), pred.requires_grad_())


@pytest.mark.parametrize("device", DEVICES)
def test_official_numbers(device):
    golden = {name: tensor.to(device) for name, tensor in load_file(GOLDEN).items()}
    inputs = golden["pred"], golden["image"].float(), golden["is_hidden"]
    loss, grad = loss_and_grad(masked_pixel_loss, *inputs, patch_size_px=16, normalize_target=True)
    torch.testing.assert_close(loss, golden["loss"], rtol=1e-6, atol=0)
    # The original recorded the gradient of the bias that is added to every prediction.
    torch.testing.assert_close(grad.sum(dim=(0, 1)), golden["grad_pred_sum"], rtol=1e-4, atol=1e-7)
    loss = masked_pixel_loss(*inputs, patch_size_px=16, normalize_target=False)
    torch.testing.assert_close(loss, golden["loss_raw_pixels"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(dtype, needs_grad):
    pred, image, is_hidden = ODD.inputs(dtype)
    arguments = (pred, image, is_hidden, 3, True, needs_grad)
    torch.library.opcheck(torch.ops.fastm3ae.masked_pixel_loss.default, arguments)


def test_compiles_into_one_graph():
    inputs = ODD.inputs()
    compiled = torch.compile(masked_pixel_loss, fullgraph=True)
    ours = loss_and_grad(masked_pixel_loss, *inputs, **ODD.options)
    for got, want in zip(loss_and_grad(compiled, *inputs, **ODD.options), ours, strict=True):
        assert torch.equal(got, want)


def test_non_contiguous_inputs():
    pred, image, is_hidden = ODD.inputs()
    want = loss_and_grad(masked_pixel_loss, pred, image, is_hidden, **ODD.options)
    # As a decoder gives its patches: without the CLS row; channels last; a mask that was made transposed.
    pred_slice = torch.cat([pred.new_full((3, 1, 27), torch.nan), pred], dim=1)[:, 1:]
    image_channels_last = image.to(memory_format=torch.channels_last)
    is_hidden_transposed = is_hidden.T.contiguous().T
    strided = (pred_slice, image_channels_last, is_hidden_transposed)
    assert not any(x.is_contiguous() for x in strided)
    for got, expected in zip(loss_and_grad(masked_pixel_loss, *strided, **ODD.options), want, strict=True):
        assert torch.equal(got, expected)


def test_same_bits_for_every_number_of_threads():
    case = Case(8, 288, 288, 16)  # large enough that seven threads are used
    inputs = case.inputs()
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = loss_and_grad(masked_pixel_loss, *inputs, **case.options)
        for n in (2, 3, 7):
            torch.set_num_threads(n)
            for got, expected in zip(loss_and_grad(masked_pixel_loss, *inputs, **case.options), want, strict=True):
                assert torch.equal(got, expected)
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_hidden_is_zero_and_all_hidden_is_the_plain_mean(device):
    pred, image, is_hidden = ODD.inputs(device=device)
    loss, grad = loss_and_grad(masked_pixel_loss, pred, image, torch.zeros_like(is_hidden), **ODD.options)
    assert loss == 0 and not grad.any()
    loss, grad = loss_and_grad(masked_pixel_loss, pred, image, torch.ones_like(is_hidden), **ODD.options)
    assert grad.ne(0).all()
    zeros, _ = loss_and_grad(masked_pixel_loss, 0 * pred, image, torch.ones_like(is_hidden), **ODD.options)
    # A normalised patch has unbiased variance 1, so predicting its mean costs (P - 1) / P.
    torch.testing.assert_close(zeros, torch.tensor(26 / 27, device=device), rtol=1e-4, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_constant_patch_is_finite(device):
    pred, image, is_hidden = ODD.inputs(device=device, hidden_frac=1.0)
    image = torch.full_like(image, 0.7)
    loss, grad = loss_and_grad(masked_pixel_loss, pred, image, is_hidden, **ODD.options)
    torch.testing.assert_close(loss, pred.square().mean(), rtol=1e-3, atol=0)
    assert grad.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_nan_at_a_hidden_patch_shows_and_visible_patches_are_not_read(device):
    pred, image, is_hidden = ODD.inputs(device=device)
    sample, patch = is_hidden.nonzero()[0]
    for poisoned in (pred, image):
        before = poisoned.clone()
        if poisoned is pred:
            pred[sample, patch, 5] = torch.nan
        else:
            image[sample, 0, patch // 5 * 3, patch % 5 * 3] = torch.nan
        loss, grad = loss_and_grad(masked_pixel_loss, pred, image, is_hidden, **ODD.options)
        assert loss.isnan() and grad[sample, patch].isnan().any() and grad.isnan().any(-1).sum() == 1
        poisoned.copy_(before)
    pred[~is_hidden] = torch.nan
    loss, grad = loss_and_grad(masked_pixel_loss, pred, image, is_hidden, **ODD.options)
    assert loss.isfinite() and not grad[~is_hidden].any()


@pytest.mark.parametrize("device", DEVICES)
def test_float16_gradient_survives_a_small_loss(device):
    case = Case(1, 96, 96, 16)
    pred, image, is_hidden = case.inputs(torch.float16, device)
    scale = 2.0**16
    scaled = loss_and_grad(
        lambda *x, **options: scale * masked_pixel_loss(*x, **options), pred, image, is_hidden, **case.options
    )[1].float()
    exact = loss_and_grad(masked_pixel_loss, pred.float(), image, is_hidden, **case.options)[1]
    torch.testing.assert_close(scaled / scale, exact, rtol=2**-10, atol=0)


def test_only_pred_gets_a_gradient_and_only_once():
    pred, image, is_hidden = ODD.inputs()
    loss = masked_pixel_loss(pred, image.requires_grad_(), is_hidden, **ODD.options)
    assert not loss.requires_grad
    loss = masked_pixel_loss(pred.requires_grad_(), image, is_hidden, **ODD.options).square()
    grad_pred, grad_image = torch.autograd.grad(loss, (pred, image), allow_unused=True, create_graph=True)
    assert grad_image is None
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_pred.sum().backward()
    with torch.no_grad():
        assert not masked_pixel_loss(pred, image, is_hidden, **ODD.options).requires_grad


def test_backward_twice_through_a_kept_graph():
    pred, image, is_hidden = ODD.inputs()
    loss = masked_pixel_loss(pred.requires_grad_(), image, is_hidden, **ODD.options)
    (once,) = torch.autograd.grad(loss, pred, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, pred)
    assert torch.equal(2 * once, twice)


PRED, IMAGE, IS_HIDDEN = ODD.inputs()
MISTAKES = {
    "image_without_batch": (PRED, IMAGE[0], IS_HIDDEN, 3, r"image must be \(B, 3, H, W\) .* got \(3, 9, 15\) float32"),
    "grey_image": (PRED, IMAGE[:, :1], IS_HIDDEN, 3, r"image must be .* got \(3, 1, 9, 15\) float32"),
    "uint8_image": (PRED, IMAGE.byte(), IS_HIDDEN, 3, r"image must be .* float32 or float64, got .* uint8"),
    "patch_does_not_divide": (PRED, IMAGE, IS_HIDDEN, 4, "patch_size_px must divide the image's 9 x 15 pixels, got 4"),
    "patch_of_no_pixels": (PRED, IMAGE, IS_HIDDEN, 0, "patch_size_px must divide .* got 0"),
    "other_patch_size": (PRED, IMAGE[:, :, :, :9], IS_HIDDEN, 3, r"pred must be \(B, N, P\) = \(3, 9, 27\) .* got"),
    "mixed_precision": (PRED, IMAGE.double(), IS_HIDDEN, 3, "pred must be .* float64 for this image, got .* float32"),
    "integer_pred": (PRED.int(), IMAGE, IS_HIDDEN, 3, "pred must be .* float32 or float16 or bfloat16 .* int32"),
    "float_mask": (PRED, IMAGE, IS_HIDDEN.float(), 3, r"is_hidden must be \(B, N\) = \(3, 15\) bool, got .* float32"),
    "mask_of_other_shape": (PRED, IMAGE, IS_HIDDEN[:1], 3, r"is_hidden must be .* got \(1, 15\) bool"),
    "other_device": (PRED.to("meta"), IMAGE, IS_HIDDEN, 3, "must be on one device, got meta, cpu and cpu"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(mistake):
    pred, image, is_hidden, patch_size_px, message = mistake
    with pytest.raises(ValueError, match=message):
        masked_pixel_loss(pred, image, is_hidden, patch_size_px=patch_size_px, normalize_target=True)
