"""Images: the original's pixels exactly, grey levels kept in every format, and a reason for every image that fails."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms

from fastm3ae.data.arrow import ArrowTable
from fastm3ae.data.decode import FORMATS, decode_image
from fastm3ae.data.images import TRANSFORMS, make_transform, normalization, normalize
from fastm3ae.errors import UserError

GOLDEN = Path(__file__).parent / "data" / "golden" / "data"


def encoded(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def random_image(mode, size=(67, 51), seed=0):
    bands = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, bands), dtype=np.uint8)
    images = [Image.fromarray(coarse[..., i]).resize(size, Image.Resampling.BICUBIC) for i in range(bands)]
    return images[0] if bands == 1 else Image.merge(mode, images)


def model_input(data, name="clip", size=32, alpha="composite"):
    image_CHW = make_transform(name, size)(decode_image(data, alpha))
    return normalize(image_CHW[None], *normalization(name))[0]


def original_input(data, size):
    """The original's way: open as RGBA, resize, crop, drop alpha, ToTensor, Normalize."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    steps = [
        transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        lambda image: image.convert("RGB"),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ]
    return transforms.Compose(steps)(Image.open(io.BytesIO(data)).convert("RGBA"))


def test_golden_transforms():
    golden = load_file(GOLDEN / "data_pipeline.safetensors")
    jpeg, png = (GOLDEN / "rgb_a.jpg").read_bytes(), (GOLDEN / "rgba_c.png").read_bytes()
    assert torch.equal(model_input(jpeg), golden["transform/rgb_jpg_a/clip"])
    assert torch.equal(model_input(png, alpha="official"), golden["transform/rgba_png_c/clip"])


def test_golden_collate_images():
    golden = load_file(GOLDEN / "data_pipeline.safetensors")
    table = ArrowTable([GOLDEN / "roco_train.arrow"])
    rows = [model_input(table.image_bytes(row), alpha="official") for row in (0, 1, 2)]
    assert torch.equal(torch.stack(rows), golden["collate/roco_train/image"])
    palette = ArrowTable([GOLDEN / "roco_val.arrow"]).image_bytes(0)
    assert torch.equal(model_input(palette), golden["collate/roco_val_false_texts/image"][0])


SOLID = Image.new("L", (67, 51), 255)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # EXIF orientation: rotate by 90 degrees to view
OPAQUE = {
    "grey.jpg": encoded(random_image("L"), "JPEG"),
    "colour.jpg": encoded(random_image("RGB"), "JPEG"),
    "cmyk.jpg": encoded(random_image("CMYK"), "JPEG"),
    "grey.png": encoded(random_image("L"), "PNG"),
    "colour.png": encoded(random_image("RGB"), "PNG"),
    "grey_in_colour.jpg": encoded(random_image("L").convert("RGB"), "JPEG"),
    "grey_in_colour.png": encoded(random_image("L").convert("RGB"), "PNG"),
    "opaque_alpha.png": encoded(Image.merge("RGBA", [*random_image("RGB").split(), SOLID]), "PNG"),
    "palette.png": encoded(random_image("RGB").quantize(60), "PNG"),
    "bilevel.png": encoded(random_image("L").convert("1"), "PNG"),
    "bilevel.tif": encoded(random_image("L").convert("1"), "TIFF", compression="group4"),
    "colour.gif": encoded(random_image("RGB"), "GIF"),
    "colour.bmp": encoded(random_image("RGB"), "BMP"),
    "colour.tif": encoded(random_image("RGB"), "TIFF", compression="tiff_lzw"),
    "turned.jpg": encoded(random_image("RGB"), "JPEG", exif=TURNED),
}


@pytest.mark.parametrize("size", [16, 32, 90])
@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_images_are_the_originals_to_the_bit(name, size):
    for alpha in ("composite", "official"):
        assert torch.equal(model_input(OPAQUE[name], size=size, alpha=alpha), original_input(OPAQUE[name], size))


def test_exif_sample_is_really_turned():
    assert Image.open(io.BytesIO(OPAQUE["turned.jpg"])).getexif()[0x0112] == 6


TRANSPARENT_PALETTE = random_image("RGB").quantize(60)
TRANSPARENT = {
    "alpha.png": encoded(random_image("RGBA"), "PNG"),
    "grey_alpha.png": encoded(random_image("LA"), "PNG"),
    "alpha.webp": encoded(random_image("RGBA"), "WEBP", lossless=True),
    "palette.png": encoded(TRANSPARENT_PALETTE, "PNG", transparency=7),
    "colour_key.png": encoded(random_image("L"), "PNG", transparency=random_image("L").getpixel((5, 5))),
}


@pytest.mark.parametrize("size", [16, 51, 90])
@pytest.mark.parametrize("name", TRANSPARENT)
def test_official_alpha_is_the_originals_to_the_bit(name, size):
    assert torch.equal(
        model_input(TRANSPARENT[name], size=size, alpha="official"), original_input(TRANSPARENT[name], size)
    )


@pytest.mark.parametrize("name", TRANSPARENT)
def test_alpha_is_laid_over_black(name):
    image = decode_image(TRANSPARENT[name])
    pixels = np.asarray(Image.open(io.BytesIO(TRANSPARENT[name])).convert("RGBA")).astype(float)
    assert image.mode in ("L", "RGB") and pixels[..., 3].min() < 255
    expected = pixels[..., :3] * pixels[..., 3:] / 255
    assert np.abs(np.asarray(image.convert("RGB")) - expected).max() <= 0.51


def test_grey_of_8_bits_is_untouched():
    image = random_image("L")
    assert decode_image(encoded(image, "PNG")).mode == "L"
    assert np.array_equal(decode_image(encoded(image, "PNG")), image)


GREY_STORED_IN_COLOUR = {
    "jpeg": encoded(random_image("L").convert("RGB"), "JPEG"),
    "png": encoded(random_image("L").convert("RGB"), "PNG"),
    "palette": encoded(random_image("L").convert("P"), "PNG"),
    "opaque alpha": encoded(random_image("L").convert("RGBA"), "PNG"),
    "transparent": encoded(random_image("LA"), "PNG"),
}


@pytest.mark.parametrize("name", GREY_STORED_IN_COLOUR)
def test_grey_stored_in_colour_is_grey(name):
    image = decode_image(GREY_STORED_IN_COLOUR[name])
    assert image.mode == "L" and len(np.unique(image)) > 10


@pytest.mark.parametrize("channel", [0, 1, 2])
@pytest.mark.parametrize("place", [(0, 0), (33, 20), (66, 50)])
def test_a_single_pixel_off_grey_is_colour(place, channel):
    image = random_image("L").convert("RGB")
    levels = list(image.getpixel(place))
    levels[channel] ^= 1
    image.putpixel(place, tuple(levels))
    assert np.array_equal(decode_image(encoded(image, "PNG")), image)


DEEP = {
    "16bit.png": (np.uint16, "PNG", 0, 65535),
    "12bit_in_16.png": (np.uint16, "PNG", 17, 4095),
    "16bit.tif": (np.uint16, "TIFF", 100, 60000),
    "32bit.tif": (np.int32, "TIFF", -1024, 3071),
    "float.tif": (np.float32, "TIFF", -0.5, 2.5),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_grey_keeps_its_levels(name):
    dtype, format, low, high = DEEP[name]
    ramp = np.linspace(low, high, 60 * 40).astype(dtype).reshape(40, 60)
    image = decode_image(encoded(Image.fromarray(ramp), format))
    pixels = np.asarray(image)
    assert image.mode == "L" and pixels.dtype == np.uint8
    exact = (ramp.astype(float) - ramp.min()) / (float(ramp.max()) - ramp.min()) * 255
    assert np.abs(pixels - exact).max() <= 0.5 + 1e-9
    assert len(np.unique(pixels)) == 256


def test_big_endian_16_bit_tiff():
    ramp = np.arange(0, 64000, 100, dtype=np.uint16).reshape(20, 32)
    header = b"MM\x00\x2a" + (8 + ramp.nbytes).to_bytes(4, "big")
    tags = [(256, 32), (257, 20), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 20), (279, ramp.nbytes)]
    entries = b"".join(
        tag.to_bytes(2, "big") + b"\x00\x04\x00\x00\x00\x01" + value.to_bytes(4, "big") for tag, value in tags
    )
    data = header + ramp.astype(">u2").tobytes() + len(tags).to_bytes(2, "big") + entries + bytes(4)
    assert Image.open(io.BytesIO(data)).mode == "I;16B"
    assert np.array_equal(decode_image(data), np.rint(ramp / ramp.max() * 255))


def test_constant_deep_grey_is_black():
    image = decode_image(encoded(Image.fromarray(np.full((4, 5), 900, np.uint16)), "PNG"))
    assert image.getextrema() == (0, 0) and image.size == (5, 4)


def test_grey_augments_as_its_rgb_copy():
    """Grey stays one channel until the end; no operation of RandAugment may tell the difference."""
    grey = random_image("L")
    transform = make_transform("clip_randaug", 40)
    seen = set()
    for seed in range(150):
        torch.manual_seed(seed)
        a = transform(grey)
        torch.manual_seed(seed)
        b = transform(grey.convert("RGB"))
        assert torch.equal(a, b)
        seen.add(tuple(a.flatten().tolist()))
    assert len(seen) > 50


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("size", [(300, 200), (31, 77), (1, 1)])
def test_transforms_make_squares_of_bytes(name, size):
    image_CHW = make_transform(name, 48)(random_image("RGB", size))
    assert image_CHW.shape == (3, 48, 48) and image_CHW.dtype == torch.uint8


@pytest.mark.parametrize("name", ["clip_resizedcrop", "clip_randaug"])
def test_random_transforms_follow_torchs_generator(name):
    transform, image = make_transform(name, 48), random_image("RGB")
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(transform(image))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_resized_crop_keeps_most_of_the_image():
    """The crop is 90 to 100 % of the area: a ramp's mean level hardly moves, and neither end is lost by far."""
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 400).astype(np.uint8), (300, 1)))
    for seed in range(30):
        torch.manual_seed(seed)
        row = make_transform("clip_resizedcrop", 64)(ramp)[0, 32]
        assert row[0] < 255 * 0.35 and row[-1] > 255 * 0.65


@pytest.mark.parametrize("name", TRANSFORMS)
def test_normalize_is_to_tensor_and_normalize(name):
    values = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(3, 16, 16)
    mean, std = normalization(name)
    expected = transforms.Normalize(mean.flatten().tolist(), std.flatten().tolist())(values.float().div(255))
    assert torch.equal(normalize(values[None], mean, std)[0], expected)
    assert values.dtype == torch.uint8 and values.max() == 255  # the input is left alone


def test_unknown_transform_names_the_nearest():
    with pytest.raises(UserError, match=r"got 'clip_randaugment'\. Did you mean 'clip_randaug'\?"):
        make_transform("clip_randaugment", 32)
    with pytest.raises(UserError, match="Did you mean 'imagenet'"):
        normalization("imagnet")


def broken(data, position, value):
    return data[:position] + value + data[position + len(value) :]


JPEG, PNG, TIFF = (encoded(random_image("RGB"), format) for format in ("JPEG", "PNG", "TIFF"))
BAD = {
    "nothing": (b"", "no known format"),
    "text": (b"<html>404</html>", "no known format"),
    "cut jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "cut png": (PNG[: len(PNG) // 2], "cannot be decoded"),
    "cut tiff": (TIFF[: len(TIFF) // 2], "cannot be decoded"),
    "jpeg header alone": (JPEG[:20], "cannot be decoded"),
    "png checksum": (broken(PNG, PNG.index(b"IHDR") + 14, b"\xff\xff"), "cannot be decoded"),
    "not a number": (encoded(Image.fromarray(np.full((3, 3), np.nan, np.float32)), "TIFF"), "not finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bytes_say_why(name):
    data, reason = BAD[name]
    with pytest.raises(ValueError, match=reason) as caught:
        decode_image(memoryview(data))
    assert "0x" not in str(caught.value)  # no address of an object: the message is the same in every run


def test_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for size in ((40, 40), (400, 400)):  # over the limit Pillow warns; over its double it raises
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with pytest.raises(ValueError, match="pixels"):
                decode_image(encoded(Image.new("L", size), "PNG"))
    assert decode_image(encoded(Image.new("L", (20, 20)), "PNG")).size == (20, 20)


def test_damaged_bytes_never_raise_anything_else():
    """Any flipped byte either still decodes, or is a ValueError with a reason."""
    rng = np.random.default_rng(0)
    outcomes = set()
    for data in (JPEG, PNG, TIFF, TRANSPARENT["palette.png"], OPAQUE["colour.gif"]):
        for _ in range(60):
            damaged = bytearray(data)
            for position in rng.integers(0, len(damaged), 4):
                damaged[position] = rng.integers(256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    make_transform("clip", 16)(decode_image(bytes(damaged)))
                    outcomes.add("decoded")
                except ValueError as error:
                    assert str(error)
                    outcomes.add("refused")
    assert outcomes == {"decoded", "refused"}


@pytest.mark.parametrize("format", ["EPS", "PDF", "ICO", "TGA", "DDS"])
def test_other_formats_are_refused(format, monkeypatch):
    """Of EPS because Pillow runs Ghostscript; of the others because nobody needs them."""
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(ValueError, match="of no known format, expected BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP"):
        decode_image(encoded(random_image("RGB"), format))


@pytest.mark.parametrize("format", FORMATS)
def test_each_known_format_is_read(format):
    assert decode_image(encoded(random_image("RGB"), format)).size == (67, 51)


def test_a_palette_that_is_missing_is_a_reason():
    """Pillow asserts that there is one, but only where it is asked whether the image is transparent."""
    data = encoded(random_image("RGB").quantize(60), "PNG")
    start = data.index(b"PLTE") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    with pytest.raises(ValueError, match="the image cannot be decoded: AssertionError"):
        decode_image(data[:start] + data[end:])
