from pathlib import Path

import pytest
import torch
from pixel_loss_cases import CASES, DEVICES, MEAN, ODD, STD, Case, loss_and_grad
from safetensors.torch import load_file

from fastm3ae.data.images import normalize
from fastm3ae.kernels import masked_pixel_loss
from fastm3ae.kernels.masked_pixel_loss import (
    launch_masked_pixel_loss_cpu,
    launch_masked_pixel_loss_cuda,
    masked_pixel_loss_backward_reference,
    masked_pixel_loss_reference,
)

GOLDEN = Path(__file__).parent / "data" / "masked_pixel_loss_golden.safetensors"

pytestmark = [
    pytest.mark.usefixtures("nan_filled_empty"),
    # The reference takes the variance over no patches at all.
    pytest.mark.filterwarnings("ignore:var_mean.*degrees of freedom"),
]


each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


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
    index = is_hidden.int().argsort(dim=1, descending=True)[:, :5]
    levels, statistics = ODD.levels()
    op = torch.ops.fastm3ae.masked_pixel_loss.default
    torch.library.opcheck(op, (pred, image, is_hidden, 3, True, None, None, needs_grad))
    torch.library.opcheck(op, (pred[:, :5].contiguous(), image, index, 3, True, None, None, needs_grad))
    if dtype != torch.float64:
        torch.library.opcheck(op, (pred, levels, is_hidden, 3, True, *statistics.values(), needs_grad))


def assert_same_bits(got, want):
    for x, expected in zip(got, want, strict=True):
        assert torch.equal(x, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph(device):
    pred, image, is_hidden = ODD.inputs(device=device)
    levels, statistics = ODD.levels(device)
    compiled = torch.compile(masked_pixel_loss, fullgraph=True)
    for image_, options in ((image, ODD.options), (levels, ODD.options | statistics)):
        want = loss_and_grad(masked_pixel_loss, pred, image_, is_hidden, **options)
        assert_same_bits(loss_and_grad(compiled, pred, image_, is_hidden, **options), want)


# The exact division by products is the same code on every device; here it meets each level with numbers of all sizes.
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("device", DEVICES)
def test_levels_are_normalised_to_the_bits_of_normalize(device, seed):
    torch.manual_seed(seed)
    mean, std = (MEAN, STD) if seed == 0 else (torch.rand(3, 1, 1), 2 * torch.rand(3, 1, 1) + 1e-3)
    levels = torch.stack([torch.randperm(256) for _ in range(3)]).to(torch.uint8).view(1, 3, 16, 16)
    target = normalize(levels, mean, std).permute(0, 2, 3, 1).reshape(1, 1, 768)
    launch = {"cpu": launch_masked_pixel_loss_cpu, "cuda": launch_masked_pixel_loss_cuda}[device]
    tensors = (torch.zeros(1, 1, 768), levels, torch.ones(1, 1, dtype=torch.bool), mean, std)
    pred, levels, is_hidden, mean, std = (tensor.to(device) for tensor in tensors)
    _, difference, _ = launch(pred, levels, is_hidden, 16, False, mean, std, True)
    assert torch.equal(-difference.cpu(), target)


@each_case
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_levels_give_the_bits_of_the_normalised_image(case, dtype, device):
    pred, _, is_hidden = case.inputs(dtype, device)
    levels, statistics = case.levels(device)
    image = normalize(levels.cpu(), MEAN, STD).to(device)
    want = loss_and_grad(masked_pixel_loss, pred, image, is_hidden, **case.options)
    assert_same_bits(loss_and_grad(masked_pixel_loss, pred, levels, is_hidden, **case.options, **statistics), want)
    reference = masked_pixel_loss_reference(pred, levels, is_hidden, **case.options, **statistics)
    torch.testing.assert_close(want[0], reference)


@each_case
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_predictions_of_the_hidden_patches_alone(case, dtype, device):
    pred, image, is_hidden = case.inputs(dtype, device)
    num_patches = is_hidden.shape[1]
    index = torch.rand(is_hidden.shape, device=device).argsort(dim=1)[:, : -(-num_patches * 3 // 4)]
    is_hidden = torch.zeros_like(is_hidden).scatter(1, index, True)
    at = index[..., None].expand(-1, -1, pred.shape[-1])
    loss, grad = loss_and_grad(masked_pixel_loss, pred, image, is_hidden, **case.options)
    few = loss_and_grad(masked_pixel_loss, pred.gather(1, at), image, index, **case.options)
    torch.testing.assert_close(few[0], loss, rtol=1e-6, atol=0)  # its sum is in another order
    assert torch.equal(few[1], grad.gather(1, at))
    reference = masked_pixel_loss_reference(pred.gather(1, at), image, index, **case.options)
    torch.testing.assert_close(few[0], reference)
    reference = masked_pixel_loss_backward_reference(pred.gather(1, at), image, index, **case.options)
    torch.testing.assert_close(few[1], reference.to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [ODD, CASES["official"], CASES["patch_32"]])
def test_same_bits_again_on_another_stream_and_in_a_graph(case):
    pred, image, is_hidden = case.inputs(torch.bfloat16, "cuda")
    want = loss_and_grad(masked_pixel_loss, pred, image, is_hidden, **case.options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(10):
            again = loss_and_grad(masked_pixel_loss, pred, image, is_hidden, **case.options)
    torch.cuda.synchronize()
    assert_same_bits(again, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_grad(masked_pixel_loss, pred, image, is_hidden, **case.options)
    graph.replay()
    assert_same_bits(captured, want)


@pytest.mark.gpu
def test_tensors_that_begin_at_odd_places():
    case = CASES["official"]
    inputs = case.inputs(torch.bfloat16, "cuda")
    want = loss_and_grad(masked_pixel_loss, *inputs, **case.options)
    moved = [torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view_as(x).copy_(x) for x in inputs]
    loss, grad = loss_and_grad(masked_pixel_loss, *moved, **case.options)
    torch.testing.assert_close(loss, want[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, want[1], rtol=2**-7, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("patch_size_px", [16, 48])
def test_more_than_two_to_the_31_elements(patch_size_px):
    batch_size = 2**31 // (3 * 288 * 288) + 2
    num_patches, num_values = (288 // patch_size_px) ** 2, patch_size_px**2 * 3
    case = Case(1, 288, 288, patch_size_px)
    last_pred, _, last_is_hidden = case.inputs(torch.bfloat16, "cuda")
    last_levels, statistics = case.levels("cuda")
    pred = torch.zeros(batch_size, num_patches, num_values, dtype=torch.bfloat16, device="cuda")
    levels = torch.zeros(batch_size, 3, 288, 288, dtype=torch.uint8, device="cuda")
    is_hidden = torch.zeros(batch_size, num_patches, dtype=torch.bool, device="cuda")
    pred[-1:], levels[-1:], is_hidden[-1:] = last_pred, last_levels, last_is_hidden
    want = loss_and_grad(masked_pixel_loss, last_pred, last_levels, last_is_hidden, **case.options, **statistics)
    loss, grad = loss_and_grad(masked_pixel_loss, pred, levels, is_hidden, **case.options, **statistics)
    torch.testing.assert_close(loss, want[0], rtol=1e-6, atol=0)
    assert torch.equal(grad[-1:], want[1]) and not grad[:-1].any()


@pytest.mark.gpu
def test_our_kernel_runs():
    inputs = CASES["official"].inputs(torch.bfloat16, "cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        masked_pixel_loss(*inputs, **CASES["official"].options)
        torch.cuda.synchronize()
    assert any("masked_pixel_loss_kernel" in event.key for event in profile.key_averages())


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
