"""DICOM files: the stored values of a radiograph -> 8-bit grey levels. Needs the extra ``dicom``."""

import io

import numpy as np
from PIL import Image

from fastm3ae.errors import UserError

__all__ = ["decode_dicom"]


def decode_dicom(data: bytes) -> Image.Image:
    """Returns x * 255 / max(x) of a radiograph's stored values x, rounded, as an ``L`` image; 255 - that if inverted.

    Inverted are images whose lowest value means white (MONOCHROME1). Negative values become 0, as does an image
    without a positive value. Windows, rescaling and padding values of the file are not applied.

    Args:
        data: A DICOM file: its bytes, not its name.

    Raises:
        UserError: pydicom is not installed.
        ValueError: The bytes are no DICOM file, a damaged one, one that needs a decoder that is not installed, or no
            single grey image. The message is a part of a sentence.

    Source: MGCA's mgca/datasets/utils.py, ``read_from_dicom``.
    Deviation: There, negative values count by their magnitude; radiographs have none.
    """
    try:
        import pydicom
    except ImportError:
        raise UserError("DICOM files are read with pydicom, which is missing: pip install 'fastm3ae[dicom]'.") from None
    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
        if dataset.file_meta.TransferSyntaxUID == pydicom.uid.JPEGBaseline8Bit:
            # Decoders of lossy JPEG differ by a grey level, and pydicom takes the first that happens to be installed.
            dataset.pixel_array_options(decoding_plugin="pillow")
        stored, meaning = dataset.pixel_array, dataset.PhotometricInterpretation
    except Exception as error:  # pydicom and its decoders raise what they like: AttributeError, struct.error, ...
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the DICOM file cannot be decoded: {why.removesuffix('.')}") from error
    if meaning not in ("MONOCHROME1", "MONOCHROME2") or stored.ndim != 2:
        size = " x ".join(map(str, stored.shape))
        raise ValueError(f"the DICOM file is not one grey image: it holds {size} values that are {meaning}")
    values = np.maximum(stored, 0).astype(np.float64)
    levels = np.rint(values * 255 / max(values.max(), 1)).astype(np.uint8)
    return Image.fromarray(255 - levels if meaning == "MONOCHROME1" else levels)
