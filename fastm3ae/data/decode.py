"""Encoded bytes -> grey or RGB levels, and back. Needs no torch, so that processes that read images start at once."""

import io
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from fastm3ae.data.tiles import check_tiles
from fastm3ae.errors import first_line

__all__ = ["FORMATS", "check_size", "decode_image", "encode_png", "grey_levels", "open_image"]

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is read, of all that Pillow knows: it runs Ghostscript for EPS, and formats that no data set is of are but more
code that hostile bytes reach."""

LEVELS, WHOLE_RANGE = "Levels", "0 is black, 65535 is white"
"""A PNG's text by which ``decode_image`` knows that black and white have been chosen."""

COMPRESS_LEVEL = 1
"""Radiographs take a fifth of the time of Pillow's default, and an eighth more bytes."""


def decode_image(
    source: bytes | memoryview | Image.Image, alpha: Literal["composite", "official"] = "composite"
) -> Image.Image:
    """Returns the image with 8 bits per level, grey as ``L`` and colour as ``RGB``.

    Most radiographs are stored in colour although every pixel is grey; they count as grey, which gives the same squares
    in less time.

    Grey images of more than 8 bits are scaled linearly, their darkest pixel to 0 and their brightest to 255, but of
    those that ``encode_png`` wrote 65535 becomes 255. The first frame of an animation or a stack counts. EXIF
    orientation is ignored, as by the original.

    Args:
        source: An encoded image in one of ``FORMATS``, or one that Pillow has opened.
        alpha: What becomes of a transparent image. composite: it is laid over black. official: it is returned as
            ``RGBA``, and the transform weights colours by alpha when it resizes, then drops alpha. Opaque images do not
            depend on this choice.

    Raises:
        ValueError: The bytes are no image, a truncated or damaged one, or one with more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``. The message is a part of a sentence.

    Source: m3ae/datasets/base_dataset.py, ``get_raw_image``.
    Deviation: The original opens every image as ``RGBA``, which for opaque images gives the same pixels in more time,
        keeps the colours of transparent pixels, and clips grey levels over 255 to white.
    """
    try:
        image = source if isinstance(source, Image.Image) else open_image(source)
        check_size(image.width, image.height)
        image.load()
        has_transparency = image.has_transparency_data
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise ValueError(
            f"the image cannot be decoded: its {len(source)} bytes are of no known format, expected {known}"
        ) from None
    except Exception as error:  # Pillow's decoders raise what they like: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"the image cannot be decoded: {first_line(error).removesuffix('.')}") from error
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scale_levels(image)
    if has_transparency:
        image = _resolve_alpha(image.convert("RGBA"), alpha)
    if image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return _without_needless_colour(image) if image.mode == "RGB" else image


def open_image(data: bytes | memoryview) -> Image.Image:
    """Returns an image of one of ``FORMATS`` of which no more than the header is read.

    Raises:
        OSError: The bytes are of none of them, or a damaged header; decoders raise other errors, too.
        ValueError: Decoding would take far more memory than the pixels.
    """
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    check_tiles(image, data)
    return image


def check_size(width: int, height: int) -> None:
    """Raises a ValueError for an image of more than ``PIL.Image.MAX_IMAGE_PIXELS`` pixels."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"{width} x {height} pixels are more than the limit of {limit}")


def encode_png(image: Image.Image) -> bytes:
    """Returns the PNG of an image from which ``decode_image`` makes the same levels, of 16 bits the nearest of 8.

    Args:
        image: An ``L``, ``RGB`` or ``I;16`` image; of the last, 0 is black and 65535 white, whatever its pixels are.
    """
    about = PngInfo()
    if image.mode == "I;16":
        about.add_text(LEVELS, WHOLE_RANGE)
    stream = io.BytesIO()
    image.save(stream, "PNG", pnginfo=about, compress_level=COMPRESS_LEVEL)
    return stream.getvalue()


def grey_levels(
    values: np.ndarray, low: float, high: float, depth: type[np.uint8] | type[np.uint16] = np.uint8
) -> np.ndarray:
    """Returns (x - low) / (high - low), cut to [0, 1], times the largest level, rounded; 0 if high is not above low.

    Args:
        values: Finite numbers.
        low: What becomes 0.
        high: What becomes the largest level.
        depth: Type of the levels.
    """
    levels = np.array(values, dtype=np.float64)
    levels -= low  # in place: of a large image these are the largest arrays
    levels *= np.iinfo(depth).max
    levels /= high - low if high > low else np.inf
    return np.rint(np.clip(levels, 0, np.iinfo(depth).max, out=levels), out=levels).astype(depth)


def _scale_levels(image: Image.Image) -> Image.Image:
    """Returns (x - min) / (max - min) * 255 as 8-bit grey; a constant image becomes black."""
    levels = np.asarray(image)
    if image.info.get(LEVELS) == WHOLE_RANGE:
        return Image.fromarray(grey_levels(levels, 0, 2**16 - 1))
    low, high = float(levels.min()), float(levels.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("the image has pixels that are not finite numbers")
    return Image.fromarray(grey_levels(levels, low, high))


def _without_needless_colour(image: Image.Image) -> Image.Image:
    """Returns an ``RGB`` image as ``L`` if its three levels are equal in every pixel."""
    red, green, blue = image.split()
    return red if red.tobytes() == green.tobytes() == blue.tobytes() else image


def _resolve_alpha(image: Image.Image, alpha: Literal["composite", "official"]) -> Image.Image:
    least_alpha, _ = image.getextrema()[3]
    if least_alpha == 255:
        return image.convert("RGB")
    if alpha == "official":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
