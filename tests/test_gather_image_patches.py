from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from fastm3ae.data.images import normalize
from fastm3ae.kernels import gather_image_patches
from fastm3ae.kernels.gather_image_patches import gather_image_patches_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


@dataclass(frozen=True)
class Case:
    batch_size: int
    height_px: int
    width_px: int
    patch_size_px: int
    num_kept: int

    def inputs(self, image_dtype=torch.uint8, device="cpu"):
        """image, keep, mean and std; the latter two None for a floating-point image."""
        torch.manual_seed(0)
        shape = (self.batch_size, 3, self.height_px, self.width_px)
        num_patches = (self.height_px // self.patch_size_px) * (self.width_px // self.patch_size_px)
        keep = torch.rand(self.batch_size, num_patches).argsort(1)[:, : self.num_kept].to(device)
        if image_dtype != torch.uint8:
            return torch.randn(shape).to(device, image_dtype), keep, None, None
        image = torch.randint(256, shape, dtype=torch.uint8)
        mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
        return image.to(device), keep, mean.to(device), std.to(device)

    def arguments(self, *args):
        image, keep, mean, std = self.inputs(*args)
        return (image, keep), {"patch_size_px": self.patch_size_px, "mean_C": mean, "std_C": std}


CASES = {
    "one_pixel": Case(1, 1, 1, 1, 1),
    "none_kept": Case(2, 4, 4, 2, 0),
    "no_samples": Case(0, 4, 4, 2, 1),
    "odd": Case(3, 9, 15, 3, 5),
    "prime": Case(5, 55, 33, 11, 7),
    "all_kept": Case(2, 16, 96, 8, 24),
    "patch_32": Case(2, 96, 96, 32, 3),
    "official": Case(4, 288, 288, 16, 81),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_device = pytest.mark.parametrize("device", DEVICES)
ODD = CASES["odd"]


@each_case
@each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("image_dtype", [torch.uint8, *DTYPES, torch.float64], ids=str)
def test_agrees_with_the_reference_bit_for_bit(case, image_dtype, dtype, device):
    (image, keep), options = case.arguments(image_dtype, device)
    got = gather_image_patches(image, keep, **options, dtype=dtype)
    assert torch.equal(got, gather_image_patches_reference(image, keep, *options.values(), dtype))
    assert got.dtype == dtype and got.shape == (*keep.shape, 3 * case.patch_size_px**2)


@each_case
@each_device
def test_pixels_are_those_of_the_normalised_image(case, device):
    (image, keep), options = case.arguments(torch.uint8, device)
    got = gather_image_patches(image, keep, **options)
    normalised = normalize(image, options["mean_C"].view(3, 1, 1), options["std_C"].view(3, 1, 1))
    p, columns = case.patch_size_px, case.width_px // case.patch_size_px
    for b in range(case.batch_size):
        for k, patch in enumerate(keep[b].tolist()):
            row, column = patch // columns * p, patch % columns * p
            want = normalised[b, :, row : row + p, column : column + p]
            assert torch.equal(got[b, k], want.flatten())


@each_device
def test_a_product_is_the_convolution_of_the_visible_patches(device):
    (image, keep), options = ODD.arguments(torch.float64, device)
    weight, bias = torch.randn(7, 3, 3, 3, device=device).double(), torch.randn(7, device=device).double()
    everywhere = F.conv2d(image, weight, bias, stride=3).flatten(2).transpose(1, 2)
    pixels = gather_image_patches(image, keep, **options, dtype=torch.float64)
    want = everywhere.gather(1, keep[..., None].expand(-1, -1, 7))
    torch.testing.assert_close(F.linear(pixels, weight.flatten(1), bias), want)


@each_device
def test_opcheck(device):
    for image_dtype in (torch.uint8, torch.float32):
        image, keep, mean, std = ODD.inputs(image_dtype, device)
        op = torch.ops.fastm3ae.gather_image_patches.default
        torch.library.opcheck(op, (image, keep, 3, mean, std, torch.bfloat16))


@each_device
def test_compiles_into_one_graph(device):
    compiled = torch.compile(gather_image_patches, fullgraph=True)
    for image_dtype in (torch.uint8, torch.float32):
        inputs, options = ODD.arguments(image_dtype, device)
        assert torch.equal(compiled(*inputs, **options), gather_image_patches(*inputs, **options))


@each_device
def test_non_contiguous_inputs(device):
    (image, keep), options = ODD.arguments(torch.uint8, device)
    want = gather_image_patches(image, keep, **options)
    strided = image.to(memory_format=torch.channels_last), keep.T.contiguous().T
    options |= {name: options[name].repeat_interleave(2)[::2] for name in ("mean_C", "std_C")}
    assert not any(x.is_contiguous() for x in (*strided, options["mean_C"], options["std_C"]))
    assert torch.equal(gather_image_patches(*strided, **options), want)


@each_device
def test_hidden_patches_are_not_read_and_nothing_has_a_gradient(device):
    (image, keep), options = Case(1, 4, 4, 2, 2).arguments(torch.float32, device)
    visible = {(n // 2, n % 2) for n in keep[0].tolist()}
    for row, column in {(0, 0), (0, 1), (1, 0), (1, 1)} - visible:
        image[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = torch.nan
    pixels = gather_image_patches(image.requires_grad_(), keep, **options)
    assert pixels.isfinite().all() and not pixels.requires_grad


@each_device
def test_same_bits_every_time(device):
    inputs, options = CASES["official"].arguments(torch.uint8, device)
    assert torch.equal(gather_image_patches(*inputs, **options), gather_image_patches(*inputs, **options))


@pytest.mark.parametrize("index", [-1, 15])
def test_an_index_out_of_range_is_an_error(index):
    (image, keep), options = ODD.arguments()
    keep[2, 3] = index
    with pytest.raises(IndexError, match="keep must be indices from 0 to 14, got"):
        gather_image_patches(image, keep, **options)


IMAGE, KEEP, MEAN, STD = ODD.inputs()
MISTAKES = {
    "image_without_batch": ({"image_BCHW": IMAGE[0]}, r"image must be \(B, 3, H, W\) .* got \(3, 9, 15\) uint8"),
    "grey_image": ({"image_BCHW": IMAGE[:, :1]}, r"image must be .* got \(3, 1, 9, 15\) uint8"),
    "int32_image": ({"image_BCHW": IMAGE.int()}, "image must be .* uint8 or floating-point, got .* int32"),
    "patch_does_not_divide": ({"patch_size_px": 4}, "patch_size_px must divide the image's 9 x 15 pixels, got 4"),
    "patch_of_no_pixels": ({"patch_size_px": 0}, "patch_size_px must divide .* got 0"),
    "int32_keep": ({"keep_BK": KEEP.int()}, r"keep must be \(B, K\) = \(3, K\) int64, got \(3, 5\) int32"),
    "keep_of_other_batch": ({"keep_BK": KEEP[:2]}, r"keep must be .* got \(2, 5\) int64"),
    "no_mean": ({"mean_C": None}, r"mean must be \(3,\) float32 for a uint8 image, got None"),
    "grey_std": ({"std_C": STD[:1]}, r"std must be \(3,\) float32 for a uint8 image, got \(1,\) float32"),
    "half_std": ({"std_C": STD.half()}, r"std must be .* got \(3,\) float16"),
    "normalised_twice": ({"image_BCHW": IMAGE.float()}, "mean must be None for a floating-point image"),
    "integer_result": ({"dtype": torch.int32}, "dtype must be a floating-point dtype, got torch.int32"),
    "other_device": ({"keep_BK": KEEP.to("meta")}, "on one device, got cpu, meta, cpu and cpu"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(mistake):
    changes, message = mistake
    arguments = {"image_BCHW": IMAGE, "keep_BK": KEEP, "patch_size_px": 3, "mean_C": MEAN, "std_C": STD}
    with pytest.raises(ValueError, match=message):
        gather_image_patches(**arguments | changes)
