"""NIfTI volumes (.nii, .nii.gz): a slice -> grey levels. Needs the extra ``nifti``."""

import gzip
import importlib.util
import io
import math
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
from PIL import Image

from fastm3ae.data.decode import check_size, grey_levels
from fastm3ae.data.dicom import Window
from fastm3ae.errors import UserError, first_line

if TYPE_CHECKING:
    from nibabel import Nifti1Header

__all__ = ["Axis", "decode_nifti", "is_nifti"]

Axis = Literal["sagittal", "coronal", "axial"]
"""What a slice shows; its number counts from the patient's left, back or feet."""

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
GZIP, HEADER_BYTES = b"\x1f\x8b", 540
MOST_BYTES = 2**31
"""Of a volume, unpacked: a small packed file may claim any size."""


def is_nifti(name: str) -> bool:
    """Returns whether a file's name is that of a volume."""
    return name.lower().endswith((".nii", ".nii.gz"))


def decode_nifti(
    data: bytes,
    *,
    axis: Axis = "axial",
    index: int | Literal["middle"] = "middle",
    volume: int | None = None,
    window: Window = "tag",
    percentiles: tuple[float, float] = (0.5, 99.5),
) -> Image.Image:
    """Returns a slice as a radiologist sees it: the patient's right at the left, the front or the head at the top.

    The volume's axes are brought to the patient's by the file's orientation; a sagittal slice has the front at the
    left. Where voxels are not square in the slice, the coarser side is resized (bilinearly). Values that are not finite
    become black. Only the slice is kept in memory, of sagittal ones for some time the volume.

    Args:
        data: A NIfTI-1 or NIfTI-2 file of one part, packed by gzip or not.
        axis: Across which axis of the patient.
        index: Number of the slice, from the patient's left, back or feet; they start at 0.
        volume: Which volume of several, from 0. None: there must be one.
        window: Which values become black and white; tag: the header's cal_min and cal_max. Where these say nothing, it
            is the percentiles.
        percentiles: Percentiles of the slice's values that become black and white.

    Returns:
        ``L`` if the values are integers of 8 bits, else ``I;16``.

    Raises:
        UserError: nibabel is not installed.
        ValueError: The bytes are no such file, a damaged one, one of colours, one without an orientation, one that
            claims more than ``MOST_BYTES`` or ``PIL.Image.MAX_IMAGE_PIXELS``, or has no such slice or volume. The
            message is a part of a sentence.
    """
    if importlib.util.find_spec("nibabel") is None:
        raise UserError("NIfTI files are read with nibabel, which is missing: pip install 'fastm3ae[nifti]'.")
    stream = gzip.GzipFile(fileobj=io.BytesIO(data)) if data.startswith(GZIP) else io.BytesIO(data)
    try:
        header = _header(stream.read(HEADER_BYTES))
        values, sizes_mm = _slice(stream, header, AXES[axis], index, volume)
        levels = _levels(values, header, window, percentiles)
        return _square_voxels(Image.fromarray(levels), sizes_mm)
    except Exception as error:  # nibabel raises what it likes: HeaderDataError, struct.error, zlib.error, ...
        raise ValueError(f"the NIfTI file cannot be decoded: {first_line(error).removesuffix('.')}") from error


def _header(data: bytes) -> "Nifti1Header":
    """Returns the header that a file begins with, without its extensions, which may claim any size."""
    from nibabel import Nifti1Header, Nifti2Header

    kind = Nifti2Header if data[4:7] == b"n+2" else Nifti1Header
    header = kind(data[: kind.sizeof_hdr], check=False)
    if data[344:347] != b"n+1" and kind is Nifti1Header:
        raise ValueError("it is no NIfTI file of one part")
    return header


def _slice(
    stream: BinaryIO, header: "Nifti1Header", axis: int, index: int | Literal["middle"], volume: int | None
) -> tuple[np.ndarray, list[float]]:
    """Returns the values of a slice, its rows from the top, and the size of a voxel to the right and down."""
    from nibabel import apply_orientation, io_orientation
    from nibabel.arrayproxy import ArrayProxy

    shape, voxel = header.get_data_shape(), header.get_data_dtype()
    offset, num_bytes = int(header["vox_offset"]), math.prod(map(int, shape)) * voxel.itemsize
    if min(shape, default=0) < 1 or offset < header.sizeof_hdr or offset + num_bytes > MOST_BYTES:
        size = " x ".join(map(str, shape))
        raise ValueError(f"it claims {size} voxels from byte {offset}, expected at least one and {MOST_BYTES} bytes")
    if voxel.kind not in "biuf":
        raise ValueError("its voxels are no plain numbers, but colours or complex numbers")
    space, num_volumes = (*shape, 1, 1)[:3], math.prod(map(int, shape[3:]))
    if volume is None and num_volumes > 1:
        raise ValueError(f"it holds {num_volumes} volumes; --volume N takes one of them, counted from 0")
    if not 0 <= (volume or 0) < num_volumes:
        raise ValueError(f"it has no volume {volume}: it has {num_volumes}, counted from 0")
    orientation = io_orientation(header.get_best_affine())
    if np.isnan(orientation).any():
        raise ValueError("its orientation does not say which axis is which")
    stored_axis = int(np.flatnonzero(orientation[:, 0] == axis)[0])
    num_slices = space[stored_axis]
    number = num_slices // 2 if index == "middle" else index
    if not 0 <= number < num_slices:
        raise ValueError(f"it has no slice {number} of that axis: it has {num_slices}, counted from 0")
    check_size(*(size for i, size in enumerate(space) if i != stored_axis))
    if orientation[stored_axis, 1] < 0:
        number = num_slices - 1 - number
    place: list[slice | int] = [slice(None)] * len(shape)
    if stored_axis < len(shape):
        place[stored_axis] = slice(number, number + 1)
    place[3:] = np.unravel_index(volume or 0, shape[3:], order="F") if len(shape) > 3 else ()
    proxy = ArrayProxy(stream, (shape, voxel, offset, *header.get_slope_inter()))
    thick = np.asarray(proxy[tuple(place)]).reshape([1 if i == stored_axis else size for i, size in enumerate(space)])
    # From left, back and feet to right, front and head, as nibabel counts; a picture begins at the other ends.
    flat = np.squeeze(apply_orientation(thick, orientation), axis)
    zooms = (*map(float, header.get_zooms()), 1.0, 1.0)[:3]
    sizes_mm = [zooms[i] for i in np.argsort(orientation[:, 0]) if i != stored_axis]
    return flat[::-1, ::-1].T, sizes_mm


def _levels(values: np.ndarray, header: "Nifti1Header", window: Window, percentiles: tuple[float, float]) -> np.ndarray:
    """Returns the grey levels of a slice."""
    is_finite = np.isfinite(values)
    finite = values[is_finite]
    low, high = float(header["cal_min"]), float(header["cal_max"])
    if not finite.size:
        raise ValueError("the slice has no finite value")
    if window == "none":
        low, high = float(finite.min()), float(finite.max())
    elif window != "tag":
        center, width = window
        low, high = center - width / 2, center + width / 2
    elif not low < high:
        low, high = map(float, np.percentile(finite, percentiles))
    is_byte = header.get_data_dtype().itemsize == 1
    return grey_levels(np.where(is_finite, values, low), low, high, np.uint8 if is_byte else np.uint16)


def _square_voxels(image: Image.Image, sizes_mm: list[float]) -> Image.Image:
    """Returns the image with its coarser side resized to the finer one's voxels."""
    if not all(0 < size < math.inf for size in sizes_mm) or sizes_mm[0] == sizes_mm[1]:
        return image
    width, height = (round(pixels * size / min(sizes_mm)) for pixels, size in zip(image.size, sizes_mm, strict=True))
    check_size(width, height)
    if image.mode == "L":
        return image.resize((width, height), Image.Resampling.BILINEAR)
    levels = Image.fromarray(np.asarray(image, dtype=np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return Image.fromarray(np.rint(np.asarray(levels)).astype(np.uint16))
