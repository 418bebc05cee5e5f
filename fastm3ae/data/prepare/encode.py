"""An image's file -> what an arrow file holds of it, in whatever process that happens."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from fastm3ae.data.decode import decode_image
from fastm3ae.data.prepare.duplicates import perceptual_hash

__all__ = ["Encode", "Encoded", "Seen", "file_of", "keep_bytes", "read_image"]


class Encoded(NamedTuple):
    """What becomes of an image's file.

    Args:
        values: A row's image, and what else is made from it.
        picture: The image as training will see it before it makes a square of it.
        identifying: What in the file may say who the patient is, by the names of its fields.
    """

    values: Mapping[str, Any]
    picture: Image.Image
    identifying: Sequence[str] = ()


Encode = Callable[[bytes, Mapping[str, Any]], Encoded]
"""Makes it from the bytes of the file and the row; can be pickled.

Raises a ValueError, whose message is a part of a sentence, if the image is bad.
"""


class Seen(NamedTuple):
    """What is to know of an image beside its row: width and height, perceptual hash (or b""), identifying fields."""

    size_px: tuple[int, int]
    look: bytes
    identifying: Sequence[str]


def keep_bytes(data: bytes, row: Mapping[str, Any]) -> Encoded:
    """Returns the bytes of an image's file as its image.

    Raises:
        ValueError: They cannot be decoded.
    """
    return Encoded({"image": data}, decode_image(data))


def file_of(row: Mapping[str, Any]) -> str:
    """Returns the path of a row's image, which is its id unless the row says something else."""
    return row.get("file", row["image_id"])


def read_image(
    root: Path, encode: Encode, has_hash: bool, row: Mapping[str, Any]
) -> tuple[Mapping[str, Any], str, Seen | None]:
    """Returns what a row's image file is encoded as, what is wrong with it ("" if nothing is), and what was seen."""
    try:
        values, picture, identifying = encode((root / file_of(row)).read_bytes(), row)
    except FileNotFoundError:
        return {}, "the image file is missing", None
    except OSError as error:
        return {}, f"the image file cannot be read: {error}", None
    except ValueError as error:
        return {}, str(error), None
    return values, "", Seen(picture.size, perceptual_hash(picture) if has_hash else b"", identifying)
