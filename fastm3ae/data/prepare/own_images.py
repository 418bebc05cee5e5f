"""Your own image files: those that Pillow reads as they are, DICOM files and NIfTI volumes as PNGs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastm3ae.data.decode import decode_image, encode_png
from fastm3ae.data.dicom import Window, decode_dicom, is_dicom, open_dicom
from fastm3ae.data.dicom_header import identifying_fields
from fastm3ae.data.nifti import Axis, decode_nifti, is_nifti
from fastm3ae.data.prepare.encode import Encoded, file_of, keep_bytes
from fastm3ae.errors import UserError

__all__ = ["DICOM_SUFFIXES", "IMAGE_SUFFIXES", "ImageOptions", "encode_own", "is_dicom_file"]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
DICOM_SUFFIXES = (".dcm", ".dicom")


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How DICOM files and NIfTI volumes become images; other images are stored as they are.

    Args:
        window: Which values become black and white: those that the file names (tag; where it names none, the lowest and
            highest of a DICOM file, the percentiles of a NIfTI slice), the lowest and highest (none), or those half the
            width below and above a centre.
        frame: Which frame of a DICOM file of several, from 0.
        axis: Across which of the patient's axes a NIfTI volume is cut.
        slice: Which slices of a NIfTI volume, from the patient's left, back or feet (the first is 0). Several become
            images of their own, with the same texts.
        volume: Which volume of a NIfTI file of several, from 0. None: there must be one.
        percentiles: Percentiles of a NIfTI slice's values that become black and white.
    """

    window: Window = "tag"
    frame: int | Literal["middle"] = "middle"
    axis: Axis = "axial"
    slice: Sequence[int | Literal["middle"]] = ("middle",)
    volume: int | None = None
    percentiles: tuple[float, float] = (0.5, 99.5)

    def __post_init__(self) -> None:
        if not isinstance(self.window, str) and not (all(map(math.isfinite, self.window)) and self.window[1] > 0):
            raise UserError(f"A window must be a centre and a width greater than 0, got {self.window}.")
        if not self.slice or len(set(self.slice)) < len(self.slice):
            raise UserError(f"slice must name one or more slices, each once, got {list(self.slice)}.")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise UserError(f"percentiles must be two of 0 to 100, the lower first, got {self.percentiles}.")

    def slices(self, image: str) -> Sequence[int | Literal["middle"] | None]:
        """Returns which slices of a file become images of their own; None is the whole of a file that has none."""
        return self.slice if is_nifti(image) else (None,)


def is_dicom_file(path: Path) -> bool:
    """Returns whether a file is named as a DICOM file, or begins as one; an index of such files is none."""
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    if path.suffix.lower() in IMAGE_SUFFIXES or is_nifti(path.name) or path.name == "DICOMDIR" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return is_dicom(file.read(132))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from None


def encode_own(options: ImageOptions, data: bytes, row: Mapping[str, Any]) -> Encoded:
    """Returns what is stored of a file.

    Args:
        options: How it becomes an image.
        data: The file.
        row: Names it, and the slice of a volume.

    Raises:
        UserError: A package that reads such files is missing.
        ValueError: The file cannot be decoded.
    """
    name = file_of(row)
    identifying: Sequence[str] = ()
    if is_nifti(name):
        image = decode_nifti(data, axis=options.axis, index=row["slice"], volume=options.volume,
                             window=options.window, percentiles=options.percentiles)  # fmt: skip
    elif is_dicom(data) or name.lower().endswith(DICOM_SUFFIXES):
        image = decode_dicom(data, options.window, options.frame)
        identifying = identifying_fields(open_dicom(data, header_only=True))
    else:
        return keep_bytes(data, row)
    png = encode_png(image)
    return Encoded({"image": png}, decode_image(png), identifying)
