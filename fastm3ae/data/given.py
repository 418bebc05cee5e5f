"""Images and texts that were given by hand, in the place of a data set."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from PIL import Image

from fastm3ae.data.decode import decode_image
from fastm3ae.data.dicom import decode_dicom, is_dicom
from fastm3ae.errors import UserError

__all__ = ["GivenPairs", "ImageSource"]

ImageSource = Image.Image | bytes | str | os.PathLike[str]
"""An image: of Pillow, its encoded bytes (DICOM, too), or the path of its file."""


class GivenPairs:
    """What ``TextBatches`` and, without false images, ``PretrainBatches`` make batches of.

    Args:
        pairs: Images with their texts.
        alpha: What happens to transparent images (``DataConfig.alpha``).
    """

    def __init__(self, pairs: Sequence[tuple[ImageSource, str]], alpha: Literal["composite", "official"]) -> None:
        self.pairs, self.alpha = pairs, alpha

    def __len__(self) -> int:
        return len(self.pairs)

    def text(self, index: int) -> str:
        """Returns a pair's text."""
        return self.pairs[index][1]

    def image_id(self, index: int) -> str:
        """Returns the path of an image's file, or its number."""
        source = self.pairs[index][0]
        return str(source) if isinstance(source, (str, os.PathLike)) else f"number {index + 1}"

    def image(self, index: int) -> Image.Image:
        """Returns an image, decoded.

        Raises:
            UserError: It cannot be read, or is none.
        """
        source = self.pairs[index][0]
        try:
            if isinstance(source, (str, os.PathLike)):
                source = Path(source).expanduser().read_bytes()
            if isinstance(source, bytes) and is_dicom(source):
                source = decode_dicom(source, "tag")
            return decode_image(source, self.alpha)
        except OSError as error:
            raise UserError(f"The image {self.image_id(index)} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise UserError(f"The image {self.image_id(index)} cannot be used: {error}.") from error

    def same_dataset(self, index: int) -> range:
        """Returns all pairs."""
        return range(len(self))
