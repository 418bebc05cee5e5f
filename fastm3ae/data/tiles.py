"""Whether an image's tiles fit it: decoders take memory for what a header says of them, however few the pixels are."""

import struct

from PIL import Image

__all__ = ["check_tiles"]

TIFF_TILE_SIDES = 322, 323  # the tags TileWidth and TileLength
LARGEST_SIDE_PX = 1024
"""Of a TIFF's tile that is larger than its image; libtiff takes memory for whole tiles."""
JPEG2000_HEADER = b"\xff\x4f\xff\x51"
"""A code stream begins so, then its segment SIZ says the sizes of image and tiles (ISO/IEC 15444-1, A.5)."""
FREE_TILES, LEAST_TILE_AREA_PX = 64, 1024
"""So many tiles of JPEG 2000 may be small; for each, OpenJPEG takes some 12 kB."""


def check_tiles(image: Image.Image, data: bytes | memoryview) -> None:
    """Raises a ValueError if an image's tiles are far larger than it, or far more than it has use for.

    Args:
        image: As Pillow opened it; only its header has been read.
        data: The file.
    """
    if image.format == "TIFF":
        width, height = (image.tag_v2.get(t, s) for t, s in zip(TIFF_TILE_SIDES, image.size, strict=True))
        if width > max(image.width, LARGEST_SIDE_PX) or height > max(image.height, LARGEST_SIDE_PX):
            raise ValueError(f"its tiles of {width} x {height} pixels are larger than its {_size(image)}")
    if image.format == "JPEG2000":
        start = bytes(data).find(JPEG2000_HEADER)
        _, _, right, bottom, _, _, width, height, left, top = struct.unpack_from(">HH8I", data, start + 4)
        num_tiles = -(-(right - left) // max(width, 1)) * -(-(bottom - top) // max(height, 1))
        if num_tiles > FREE_TILES + image.width * image.height // LEAST_TILE_AREA_PX:
            raise ValueError(f"its {num_tiles} tiles are too many for its {_size(image)}")


def _size(image: Image.Image) -> str:
    return f"{image.width} x {image.height} pixels"
