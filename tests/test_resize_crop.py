import numpy as np
import pytest
import torch
from PIL import Image

from fastm3ae.kernels import resize_crop
from fastm3ae.kernels.resize_crop import resize_crop_reference

# height, width, channels, size_px
CASES = {
    "one_pixel": (1, 1, 1, 1),
    "one_pixel_enlarged": (1, 1, 3, 48),
    "one_row": (1, 37, 1, 5),
    "one_column": (41, 1, 3, 5),
    "as_it_is": (32, 32, 3, 32),
    "only_cut": (32, 45, 3, 32),
    "odd_middle": (33, 48, 3, 33),
    "prime": (67, 53, 3, 31),
    "tall": (226, 94, 3, 90),
    "very_tall": (900, 20, 1, 16),
    "wide": (94, 226, 1, 90),
    "very_wide": (20, 900, 3, 16),
    "enlarged": (40, 29, 3, 101),
    "reduced_much": (1024, 820, 1, 16),
    "four_channels": (60, 70, 4, 37),
    "figure": (470, 700, 3, 288),
    "radiograph": (1024, 820, 1, 288),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


def noise(height, width, channels, seed=0, levels=256):
    """Without any smoothness, so that sums overshoot both ends of the range; 2 levels: black and white."""
    values = np.random.default_rng(seed).integers(0, levels, (height, width, channels)) * (255 // (levels - 1))
    return torch.from_numpy(values.astype(np.uint8))


def pillow(image_HWC, size_px):
    """Pillow in two calls, of which each resizes one axis, and the cut that torchvision's CenterCrop makes."""
    H, W, C = image_HWC.shape
    width, height = (int(size_px * side / min(H, W)) for side in (W, H))
    left, top = (int(round((side - size_px) / 2.0)) for side in (width, height))
    squares = []
    for c in range(C):
        image = Image.fromarray(image_HWC[..., c].numpy())
        for size in ((width, H), (width, height)):
            image = image.resize(size, Image.Resampling.BICUBIC)
        squares.append(np.asarray(image.crop((left, top, left + size_px, top + size_px))))
    return torch.from_numpy(np.stack(squares))


@each_case
@pytest.mark.parametrize("levels", [2, 256])
def test_every_byte_is_pillows(case, levels):
    *shape, size_px = case
    image = noise(*shape, levels=levels)
    want = pillow(image, size_px)
    assert torch.equal(resize_crop(image, size_px=size_px), want)
    assert torch.equal(resize_crop_reference(image, size_px), want)


def test_every_byte_is_pillows_in_any_shape():
    rng = np.random.default_rng(0)
    for seed in range(100):
        height, width, size_px = (int(side) for side in rng.integers(1, 150, 3))
        image = noise(height, width, 1, seed)
        assert torch.equal(resize_crop(image, size_px=size_px), pillow(image, size_px)), (height, width, size_px)


def test_a_strip_costs_only_its_middle():
    """Resized as a whole it would have 288 x 28,800,000 pixels."""
    image = noise(1, 100_000, 1)
    assert torch.equal(resize_crop(image, size_px=288), resize_crop_reference(image, 288))


def test_input_may_be_a_view():
    image = noise(50, 64, 3)
    assert torch.equal(resize_crop(image.transpose(0, 1), size_px=20), pillow(image.transpose(0, 1).contiguous(), 20))
    assert torch.equal(resize_crop(image[3:40, 5:], size_px=20), pillow(image[3:40, 5:].contiguous(), 20))


@each_case
def test_opcheck(case):
    *shape, size_px = case
    torch.library.opcheck(torch.ops.fastm3ae.resize_crop, (noise(*shape), size_px))


def test_compiles_as_one_graph():
    image = noise(40, 50, 3)
    compiled = torch.compile(lambda x: resize_crop(x, size_px=16).float() / 255, fullgraph=True)
    assert torch.equal(compiled(image), resize_crop(image, size_px=16).float() / 255)


BAD = {
    "two dimensions": (torch.zeros(4, 4, dtype=torch.uint8), 2, r"\(H, W, C\) uint8 on the CPU, got \(4, 4\) uint8"),
    "float": (torch.zeros(4, 4, 3), 2, r"got \(4, 4, 3\) float32 on cpu"),
    "other device": (torch.zeros(4, 4, 3, dtype=torch.uint8, device="meta"), 2, "on meta"),
    "no rows": (torch.zeros(0, 4, 3, dtype=torch.uint8), 2, r"must have pixels, got \(0, 4, 3\)"),
    "no channels": (torch.zeros(4, 4, 0, dtype=torch.uint8), 2, "must have pixels"),
    "no square": (torch.zeros(4, 4, 3, dtype=torch.uint8), 0, "size_px=0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    image, size_px, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        resize_crop(image, size_px=size_px)
