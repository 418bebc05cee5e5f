"""DICOM files: the stored values of an image -> grey levels or colours. Needs the extra ``dicom``."""

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from fastm3ae.data.decode import check_size, grey_levels
from fastm3ae.errors import UserError

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["Window", "decode_dicom", "is_dicom", "open_dicom", "reasons"]

Window = Literal["tag", "none"] | tuple[float, float]
"""Which values become black and white: those that the file names (tag), its lowest and highest (none), or those half
the width below and above a centre (centre, width)."""

GREY, COLOURS = ("MONOCHROME1", "MONOCHROME2"), ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
PALETTE = "PALETTE COLOR"
JP2_SIGNATURE = b"\0\0\0\x0cjP  "


def is_dicom(beginning: bytes) -> bool:
    """Returns whether the first 132 bytes of a file say that it is a DICOM file."""
    return beginning[128:132] == b"DICM"


def decode_dicom(
    data: bytes, window: Window | Literal["max"] = "max", frame: int | Literal["middle"] = "middle"
) -> Image.Image:
    """Returns an image as a viewer shows it: grey as ``L`` or, if it has more than 8 bits, as ``I;16``; else ``RGB``.

    Grey values are rescaled (modality LUT), then the window or the lookup table of the file (VOI LUT) or the one asked
    for makes black and white of its ends and, of what is between, 65,536 levels (of 8-bit values 256), so that none is
    lost. Inverted are images whose lowest value means white (MONOCHROME1). Padding becomes black.

    Args:
        data: A DICOM file: its bytes, not its name.
        window: Which values become black and white. tag: as none where the file has neither a window nor a table.
            max: levels are x * 255 / max(x) of the stored values x, 8-bit, of a single grey image alone: neither
            rescaled nor windowed, negative values as 0.
        frame: Which frame of several, from 0.

    Raises:
        UserError: pydicom is not installed.
        ValueError: The bytes are no DICOM file, a damaged one, one that needs a decoder that is not installed, has no
            such frame, has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``, or is deflated, so that it does not say how
            large it becomes. The message is a part of a sentence.

    Source: DICOM PS3.3, C.11.1 and C.11.2; of max MGCA's mgca/datasets/utils.py, ``read_from_dicom``.
    Deviation: In MGCA negative values count by their magnitude; radiographs have none.
    """
    dataset = open_dicom(data)
    with reasons():
        meaning = dataset.PhotometricInterpretation
        num_frames, num_samples = int(dataset.get("NumberOfFrames") or 1), dataset.SamplesPerPixel
        sizes = [num_frames] * (num_frames != 1) + [dataset.Rows, dataset.Columns] + [num_samples] * (num_samples != 1)
    if window == "max":
        return _share_of_largest(dataset, meaning, sizes)
    index = num_frames // 2 if frame == "middle" else frame
    if not 0 <= index < num_frames:
        raise ValueError(f"the DICOM file has no frame {index}: it has {num_frames}, counted from 0")
    known = (*GREY, *COLOURS, PALETTE)
    if meaning not in known:
        raise ValueError(f"the DICOM file's values are {meaning}, expected one of {', '.join(known)}")
    with reasons():
        stored = _stored_values(dataset, index)
        if meaning in GREY and stored.ndim == 2:
            return Image.fromarray(_grey(stored, dataset, index, window))
        return Image.fromarray(_colours(stored, dataset))


def open_dicom(data: bytes, *, header_only: bool = False) -> "Dataset":
    """Returns the fields of a DICOM file.

    Args:
        data: The file.
        header_only: Do not read the pixels.

    Raises:
        UserError: pydicom is not installed.
        ValueError: The bytes are no DICOM file, or a damaged or deflated one.
    """
    try:
        import pydicom
    except ImportError:
        raise UserError("DICOM files are read with pydicom, which is missing: pip install 'fastm3ae[dicom]'.") from None
    with reasons():
        _check_not_deflated(data)
        return pydicom.dcmread(io.BytesIO(data), stop_before_pixels=header_only)


@contextlib.contextmanager
def reasons() -> Iterator[None]:
    """Raises a ValueError for whatever pydicom and its decoders raise: AttributeError, struct.error, ..."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the DICOM file cannot be decoded: {why.removesuffix('.')}") from error


def _check_not_deflated(data: bytes) -> None:
    """Raises a ValueError for a file that pydicom would unpack, however large, before it says anything of it."""
    from pydicom.filereader import read_dataset, read_preamble
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    file = io.BytesIO(data)
    read_preamble(file, force=False)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        raise ValueError("deflated files are not read")


def _stored_values(dataset: "Dataset", index: int | None) -> np.ndarray:
    """Returns the pixels of a frame, or of all: grey ones (height, width), colours (height, width, 3) as RGB."""
    from pydicom.encaps import get_frame
    from pydicom.pixels import pixel_array
    from pydicom.uid import JPEG2000TransferSyntaxes, JPEGBaseline8Bit

    syntax = dataset.file_meta.TransferSyntaxUID
    check_size(dataset.Columns, dataset.Rows)
    # pydicom walks through the boxes of such a file, which may have no end.
    if syntax in JPEG2000TransferSyntaxes:
        num_frames = int(dataset.get("NumberOfFrames") or 1)
        if get_frame(dataset.PixelData, index or 0, number_of_frames=num_frames).startswith(JP2_SIGNATURE):
            raise ValueError("its JPEG 2000 image stands in a JP2 file, which DICOM does not allow")
    # pydicom takes the first decoder that happens to be installed. Those of lossy JPEG differ by a grey level, and of
    # damaged JPEG 2000 GDCM ends the process.
    is_pillows = syntax in (JPEGBaseline8Bit, *JPEG2000TransferSyntaxes)
    return pixel_array(dataset, index=index, decoding_plugin="pillow" if is_pillows else "")


def _share_of_largest(dataset: "Dataset", meaning: str, sizes: list[int]) -> Image.Image:
    """Returns x * 255 / max(x) of the stored values x of a single grey image."""
    if meaning in GREY and len(sizes) == 2:
        with reasons():
            stored = _stored_values(dataset, None)
        sizes = list(stored.shape)  # there may be more frames than the header says
    if meaning not in GREY or len(sizes) != 2:
        size = " x ".join(map(str, sizes))
        raise ValueError(f"the DICOM file is not one grey image: it holds {size} values that are {meaning}")
    highest = max(int(stored.max()), 1)
    levels = grey_levels(stored, 0, highest)
    return Image.fromarray(255 - levels if meaning == "MONOCHROME1" else levels)


def _grey(stored: np.ndarray, dataset: "Dataset", index: int, window: Window) -> np.ndarray:
    """Returns the grey levels of a frame's stored values: uint8 of values of up to 8 bits, else uint16."""
    from pydicom.pixels import apply_modality_lut

    settings = _settings(dataset, index)
    values, is_padding = apply_modality_lut(stored, settings), _is_padding(stored, dataset)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are not finite numbers")
    inside = values[~is_padding]
    low, high = (inside.min(), inside.max()) if inside.size else (0, 0)
    if window == "tag":
        values, low, high = _apply_voi(values, settings, low, high)
    elif window != "none":
        center, width = window
        low, high = center - width / 2, center + width / 2
    depth = np.uint8 if stored.dtype.kind in "bui" and dataset.BitsStored <= 8 else np.uint16
    levels = grey_levels(values, low, high, depth)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        levels = np.iinfo(depth).max - levels
    levels[is_padding] = 0
    return levels


def _settings(dataset: "Dataset", index: int) -> "Dataset":
    """Returns the rescaling, the window and the table of a frame; files of several frames hold them in groups."""
    import pydicom

    settings = pydicom.Dataset()
    settings.file_meta = dataset.file_meta  # which says in what order a table's bytes stand
    groups = [*dataset.get("SharedFunctionalGroupsSequence", [])[:1]]
    groups += dataset.get("PerFrameFunctionalGroupsSequence", [])[index : index + 1]
    sequences = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
    for fields in (dataset, *(item for group in groups for name in sequences for item in group.get(name, [])[:1])):
        for name in ("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence", "WindowCenter",
                     "WindowWidth", "VOILUTFunction"):  # fmt: skip
            if fields.get(name) not in (None, "", []):
                settings[name] = fields[name]
    return settings


def _is_padding(stored: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """Returns where pixels are none, but fill the image's rectangle."""
    padding, limit = dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")
    if not isinstance(padding, int):
        return np.zeros(stored.shape, dtype=bool)
    low, high = sorted((padding, limit if isinstance(limit, int) else padding))
    return (low <= stored) & (stored <= high)


def _apply_voi(values: np.ndarray, settings: "Dataset", low: float, high: float) -> tuple[np.ndarray, float, float]:
    """Returns what the file's table or its first window makes of values, and what is black and white among that.

    Args:
        values: Rescaled values.
        settings: The table or window, or neither: then the values are returned as they are.
        low: Black where there is neither.
        high: White where there is neither.
    """
    from pydicom.pixels import apply_voi, apply_windowing

    if settings.get("VOILUTSequence"):
        num_entries, first, _ = descriptor = settings.VOILUTSequence[0].LUTDescriptor
        # pydicom counts the entries in as many bits as each has, so that long tables of 8-bit entries come out wrong.
        descriptor[2] = 16
        entries = np.arange(num_entries or 2**16) + first
        table = apply_voi(entries, settings)
        inside = np.clip(np.rint(values).astype(np.int64), entries[0], entries[-1])
        return table[inside - first], table.min(), table.max()
    if "WindowCenter" in settings and "WindowWidth" in settings:
        # Where black and white are is pydicom's to say: without these it would count them in stored values.
        shown = {"PhotometricInterpretation": "MONOCHROME2", "PixelRepresentation": 0, "BitsStored": 16}
        for name, value in shown.items():
            setattr(settings, name, value)
        for name in ("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"):
            settings.pop(name, None)
        with np.errstate(over="ignore"):  # exp of a sigmoid's far end
            return apply_windowing(values, settings), 0, 2**16 - 1
    return values, low, high


def _colours(stored: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """Returns the colours of a frame, uint8 (height, width, 3)."""
    from pydicom.pixels import apply_color_lut

    if dataset.PhotometricInterpretation == PALETTE:
        stored = apply_color_lut(stored, dataset)
        highest = np.iinfo(stored.dtype).max
    else:
        highest = 2**dataset.BitsStored - 1
    if stored.ndim != 3 or stored.shape[2] != 3:
        size = " x ".join(map(str, stored.shape))
        raise ValueError(f"its {size} values are no colours, although it says {dataset.PhotometricInterpretation}")
    return grey_levels(stored, 0, highest)
