"""DICOM files become 8-bit grey levels by x * 255 / max; what is no single grey image is refused with its reason."""

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
)
from radiographs import dicom_bytes

from fastm3ae.data.dicom import decode_dicom
from fastm3ae.errors import UserError


def levels(data):
    image = decode_dicom(data)
    assert image.mode == "L"
    return np.asarray(image).tolist()


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([[0, 100, 200], [50, 25, 1]], np.uint8), [[0, 128, 255], [64, 32, 1]]),  # of 127.5, 63.75, 31.9, 1.3
        (np.array([[0, 1000, 4000]], np.uint16), [[0, 64, 255]]),
        (np.array([[-2000, 0, 500, 1000]], np.int16), [[0, 0, 128, 255]]),
        (np.array([[10, 10]], np.uint8), [[255, 255]]),
        (np.array([[0, 0]], np.uint8), [[0, 0]]),
        (np.array([[-5, -7]], np.int16), [[0, 0]]),
    ],
)
def test_levels_are_shares_of_the_largest_value(pixels, expected):
    assert levels(dicom_bytes(pixels)) == expected
    inverted = [[255 - level for level in row] for row in expected]
    assert levels(dicom_bytes(pixels, "MONOCHROME1")) == inverted


def test_jpeg_is_decoded_by_pillow_whatever_else_is_installed():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=60)
    decoded = np.asarray(Image.open(stream)).astype(np.float64)
    data = dicom_bytes(pixels, syntax=JPEGBaseline8Bit, encoded=stream.getvalue())
    assert levels(data) == np.rint(decoded * (255 / decoded.max())).tolist()


def test_damaged_lossless_jpeg_with_or_without_its_decoder():
    data = dicom_bytes(np.zeros((4, 4), np.uint16), syntax=JPEGLosslessSV1, encoded=b"\xff\xd8\xff\xd9")
    with pytest.raises(ValueError, match="^the DICOM file cannot be decoded: Unable to dec"):
        decode_dicom(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the DICOM file cannot be decoded: "),
        (b"no DICOM" * 100, "the DICOM file cannot be decoded: File is missing DICOM File Meta Information"),
        (dicom_bytes(np.ones((8, 8), np.uint8))[:-10], "the DICOM file cannot be decoded: .* less than expected"),
        (
            dicom_bytes(np.ones((8, 8, 3), np.uint8), "RGB"),
            "not one grey image: it holds 8 x 8 x 3 values that are RGB",
        ),
        (dicom_bytes(np.ones((2, 2), np.uint8), "PALETTE COLOR"), "it holds 2 x 2 values that are PALETTE COLOR"),
    ],
)
def test_what_is_no_grey_image_says_why(data, message):
    with pytest.raises(ValueError, match=message):
        decode_dicom(data)


def test_without_pydicom(monkeypatch):
    data = dicom_bytes(np.ones((2, 2), np.uint8))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"pydicom, which is missing: pip install 'fastm3ae\[dicom\]'\."):
        decode_dicom(data)


@pytest.mark.skipif("FASTM3AE_SHARED" not in os.environ, reason="FASTM3AE_SHARED names no folder")
def test_real_files():
    """The same radiograph twice, with either meaning of its values; air is black where the file says so truly."""
    folder = Path(os.environ["FASTM3AE_SHARED"]) / "data/dicom"
    chest = np.asarray(decode_dicom(next(folder.glob("1.2.276*.dcm")).read_bytes()))
    flipped = np.asarray(decode_dicom((folder / "Fake_MONOHR1.dcm").read_bytes()))
    assert chest.shape == (1024, 1024) and (flipped == 255 - chest).all()
    assert chest[300:600, 400:480].mean() < chest[700:1000, 500:600].mean()  # a lung is darker than the spine
    leg = np.asarray(decode_dicom((folder / "RG3_UNCR.dcm").read_bytes()))
    assert leg[800:900, 500:600].mean() < 20 < leg[800:900, 800:850].mean()  # MONOCHROME1: air, then bone
    assert np.asarray(decode_dicom((folder / "MR2_J2KR.dcm").read_bytes())).max() == 255  # JPEG 2000 of 12 bits
    for name, size in (("eCT_Supplemental", "2 x 512 x 512"), ("examples_rgb_color", "240 x 320 x 3")):
        with pytest.raises(ValueError, match=f"not one grey image: it holds {size} values"):
            decode_dicom((folder / f"{name}.dcm").read_bytes())


def jp2(pixels, no_jp2):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG2000", no_jp2=no_jp2)
    return dicom_bytes(pixels, syntax=JPEG2000Lossless, encoded=stream.getvalue())


def test_what_may_grow_or_never_end_is_refused(monkeypatch):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    with pytest.raises(ValueError, match="deflated files are not read$"):
        decode_dicom(dicom_bytes(pixels, syntax=DeflatedExplicitVRLittleEndian))
    assert levels(jp2(pixels, no_jp2=True)) == levels(dicom_bytes(pixels))
    with pytest.raises(ValueError, match="stands in a JP2 file, which DICOM does not allow$"):
        decode_dicom(jp2(pixels, no_jp2=False))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63)
    with pytest.raises(ValueError, match="8 x 8 pixels are more than the limit of 63"):
        decode_dicom(dicom_bytes(pixels))


def test_more_frames_than_the_header_says():
    with pytest.raises(ValueError, match="not one grey image: it holds 2 x 1 x 9 values"):
        data = dicom_bytes(np.ones((2, 9), np.uint8))
        rows = b"\x28\0\x10\0US\x02\0"
        decode_dicom(data.replace(rows + b"\x02", rows + b"\x01"))
