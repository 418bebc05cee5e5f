"""DICOM files as a viewer shows them: rescaling, windows, tables, padding, frames, colours; and headers as texts."""

import io
import os
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import JPEG2000Lossless
from radiographs import dicom_bytes

from fastm3ae.data.decode import decode_image, encode_png
from fastm3ae.data.dicom import decode_dicom, open_dicom
from fastm3ae.data.dicom_header import check_tag, check_text_tags, header_text, identifying_fields
from fastm3ae.errors import UserError

KINDS = {"LUTDescriptor": "US", "LUTData": "US", "PixelPaddingValue": "SS", "PixelPaddingRangeLimit": "SS"}
KINDS |= {f"{colour}PaletteColorLookupTableDescriptor": "US" for colour in ("Red", "Green", "Blue")}


def assign(dataset, name, value):
    if name in KINDS:  # pydicom does not choose among two
        dataset.add_new(name, KINDS[name], value)
    else:
        setattr(dataset, name, value)


def with_fields(data, **fields):
    """The file with other fields; None removes one."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    for name, value in fields.items():
        if value is None:
            delattr(dataset, name)
        else:
            assign(dataset, name, value)
    stream = io.BytesIO()
    dataset.save_as(stream)
    return stream.getvalue()


def shown(data, window="tag", frame="middle"):
    return np.asarray(decode_dicom(data, window, frame))


def item(**fields):
    dataset = pydicom.Dataset()
    for name, value in fields.items():
        assign(dataset, name, value)
    return dataset


CT = dicom_bytes(np.array([[0, 1000, 1024, 1064, 1124, 3000]], np.int16))
RESCALED = with_fields(CT, RescaleSlope=1, RescaleIntercept=-1024)  # -1024, -24, 0, 40, 100, 1976


@pytest.mark.parametrize(
    ("fields", "window", "expected"),
    [
        ({}, "tag", [0, 0.333333, 0.341333, 0.354667, 0.374667, 1]),  # no window: the whole range
        ({}, (40, 400), [0, 0.34, 0.4, 0.5, 0.65, 1]),
        ({"WindowCenter": 40, "WindowWidth": 400}, "none", [0, 0.333333, 0.341333, 0.354667, 0.374667, 1]),
        ({"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "LINEAR_EXACT"}, "tag",
         [0, 0.34, 0.4, 0.5, 0.65, 1]),
        # PS3.3 C.11.2.1.2.1: ((x - (c - 0.5)) / (w - 1) + 0.5)
        ({"WindowCenter": 40, "WindowWidth": 400}, "tag", [0, 0.340852, 0.401003, 0.501253, 0.651629, 1]),
        ({"WindowCenter": [40, 9], "WindowWidth": [400, 9]}, "tag", [0, 0.340852, 0.401003, 0.501253, 0.651629, 1]),
        ({"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "SIGMOID"}, "tag",
         [0.000024, 0.345247, 0.401312, 0.5, 0.645656, 1]),
        ({"WindowCenter": 40, "WindowWidth": None}, "tag", [0, 0.333333, 0.341333, 0.354667, 0.374667, 1]),
        ({"RescaleSlope": -1, "RescaleIntercept": 0, "WindowCenter": -1000, "WindowWidth": 2000,
          "VOILUTFunction": "LINEAR_EXACT"}, "tag", [1, 0.5, 0.488, 0.468, 0.438, 0]),
    ],
)  # fmt: skip
def test_windows(fields, window, expected):
    fields = {name: "" if value is None else value for name, value in fields.items()}
    levels = shown(with_fields(RESCALED, **fields), window)
    assert levels.dtype == np.uint16
    assert levels[0] / 65535 == pytest.approx(expected, abs=2e-5)
    inverted = shown(with_fields(RESCALED, **fields, PhotometricInterpretation="MONOCHROME1"), window)
    assert (inverted == 65535 - levels).all()


def test_no_grey_level_is_lost_on_the_way_to_training():
    """4,096 levels of 12 bits stay apart in the PNG, and training sees the window, not the image's own range."""
    pixels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    image = decode_dicom(dicom_bytes(pixels, bits_stored=12), "none")
    png = encode_png(image)
    stored = np.asarray(Image.open(io.BytesIO(png)))
    assert len(np.unique(stored)) == 4096 and (np.diff(stored.ravel().astype(int)) > 0).all()
    half = dicom_bytes(pixels // 4 + 1024, bits_stored=12)  # 1024 to 2047
    seen = np.asarray(decode_image(encode_png(decode_dicom(half, (2048, 4096)))))
    assert (seen.min(), seen.max()) == (64, 127)
    eight = decode_dicom(dicom_bytes(np.array([[9, 99, 199]], np.uint8)), "none")
    assert eight.mode == "L" and np.asarray(eight).tolist() == [[0, 121, 255]]


def test_lookup_tables():
    """A table of 1,024 entries of 8 bits, which is longer than its entries could count."""
    table = item(LUTDescriptor=[1024, 100, 8], LUTData=[255 - i // 4 for i in range(1024)])
    data = with_fields(dicom_bytes(np.array([[0, 100, 612, 1123, 4000]], np.uint16)), VOILUTSequence=[table])
    assert shown(data)[0] / 65535 == pytest.approx([1, 1, 127 / 255, 0, 0], abs=1e-4)
    squares = item(LUTDescriptor=[4, 0, 16], LUTData=[0, 1, 4, 9], ModalityLUTType="US")
    data = with_fields(dicom_bytes(np.array([[0, 1, 2, 3]], np.uint8)), ModalityLUTSequence=[squares])
    assert (shown(data)[0] / 255).tolist() == pytest.approx([0, 1 / 9, 4 / 9, 1], abs=0.003)


def test_padding_is_black_and_sets_no_range():
    pixels = np.array([[-2000, 0, 50, 100]], np.int16)
    for meaning, expected in (("MONOCHROME2", [0, 0, 0.5, 1]), ("MONOCHROME1", [0, 1, 0.5, 0])):
        data = with_fields(dicom_bytes(pixels, meaning), PixelPaddingValue=-2000)
        assert shown(data)[0] / 65535 == pytest.approx(expected, abs=1e-4)
    data = with_fields(dicom_bytes(pixels), PixelPaddingValue=-2000, PixelPaddingRangeLimit=0)
    assert shown(data)[0] / 65535 == pytest.approx([0, 0, 0, 1], abs=1e-4)
    assert not shown(with_fields(dicom_bytes(pixels * 0), PixelPaddingValue=0)).any()


def frames(num, **fields):
    pixels = np.arange(num * 6, dtype=np.uint16).reshape(num * 2, 3)
    return with_fields(dicom_bytes(pixels), NumberOfFrames=num, Rows=2, **fields)


def test_frames():
    data = frames(3)
    assert (shown(data) == shown(data, frame=1)).all() and shown(data, frame=0).shape == (2, 3)
    assert shown(data, window=(8.5, 17), frame=2)[0] == pytest.approx(np.array([12, 13, 14]) / 17 * 65535, abs=1)
    for frame in (3, -1):
        with pytest.raises(ValueError, match=rf"has no frame {frame}: it has 3, counted from 0$"):
            shown(data, frame=frame)
    shared = item(PixelValueTransformationSequence=[item(RescaleSlope=2, RescaleIntercept=0)])
    windows = [item(FrameVOILUTSequence=[item(WindowCenter=c, WindowWidth=20, VOILUTFunction="LINEAR_EXACT")])
               for c in (10, 20, 30)]  # fmt: skip
    data = frames(3, SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=windows)
    for frame, center in enumerate((10, 20, 30)):
        values = np.arange(frame * 6, frame * 6 + 6).reshape(2, 3) * 2
        expected = np.clip((values - center) / 20 + 0.5, 0, 1) * 65535
        assert shown(data, frame=frame) == pytest.approx(expected, abs=1)


def test_colours():
    rgb = np.array([[[255, 0, 0], [0, 128, 0], [10, 20, 30]]], np.uint8)
    image = decode_dicom(dicom_bytes(rgb, "RGB"), "tag")
    assert image.mode == "RGB" and np.asarray(image).tolist() == rgb.tolist()
    ybr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    assert np.abs(shown(dicom_bytes(ybr, "YBR_FULL")).astype(int) - rgb).max() <= 2
    deep = dicom_bytes((rgb.astype(np.uint16) * 16), "RGB", bits_stored=12)
    assert np.abs(shown(deep).astype(int) - rgb).max() <= 1
    palette = {f"{c}PaletteColorLookupTableDescriptor": [4, 0, 16] for c in ("Red", "Green", "Blue")}
    levels = {"Red": [0, 65535, 0, 0], "Green": [0, 0, 65535, 0], "Blue": [0, 0, 0, 32768]}
    palette |= {f"{c}PaletteColorLookupTableData": np.array(levels[c], np.uint16).tobytes() for c in levels}
    indexed = with_fields(dicom_bytes(np.array([[0, 1, 2, 3]], np.uint8), "PALETTE COLOR"), **palette)
    assert shown(indexed).tolist() == [[[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 128]]]
    with pytest.raises(ValueError, match="the DICOM file's values are HSV, expected one of MONOCHROME1, "):
        shown(dicom_bytes(rgb, "HSV"))
    with pytest.raises(ValueError, match="its 1 x 3 values are no colours, although it says RGB"):
        shown(with_fields(dicom_bytes(np.ones((1, 3), np.uint8)), PhotometricInterpretation="RGB"))


def test_compressed_frames():
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG2000", no_jp2=True)
    data = dicom_bytes(pixels, syntax=JPEG2000Lossless, encoded=stream.getvalue())
    assert (shown(data, (32, 64)) == shown(dicom_bytes(pixels), (32, 64))).all()


def test_floats_that_are_no_numbers_are_refused():
    data = dicom_bytes(np.ones((1, 2), np.uint16))
    floats = np.array([1, np.nan], np.float32).tobytes()
    data = with_fields(data, PixelData=None, FloatPixelData=floats, BitsAllocated=32, BitsStored=None, HighBit=None)
    with pytest.raises(ValueError, match="pixels that are not finite numbers"):
        shown(data)


def test_headers():
    data = with_fields(
        CT, PatientName="Doe^Jane", PatientID="1", PatientBirthDate="", StudyDescription="CT thorax",
        ImageType=["ORIGINAL", "PRIMARY"], OperatorsName="X^Y", BurnedInAnnotation="YES",
    )  # fmt: skip
    dataset = open_dicom(data, header_only=True)
    assert "PixelData" not in dataset
    assert identifying_fields(dataset) == ["OperatorsName", "PatientName", "PatientID", "BurnedInAnnotation"]
    assert header_text(dataset, "StudyDescription") == "CT thorax" and header_text(dataset, "Modality") == ""
    assert header_text(dataset, "ImageType") == "ORIGINAL, PRIMARY" and header_text(dataset, "Rows") == "1"
    check_text_tags(["StudyDescription", "BodyPartExamined", "PatientAge", "SliceThickness"])
    for tag, message in (
        ("PatientName", "a person's name that may say who the patient is"),
        ("ReferringPhysicianName", "a person's name"),
        ("PatientID", "a name, a number or a place that may say who"),
        ("StudyDate", "a date"),
        ("StudyInstanceUID", "an identifier"),
        ("PixelData", "PixelData is a field of OB or OW, expected one of text or numbers"),
        ("BodyPart", r"'BodyPart' is no keyword of a DICOM field, .* Did you mean 'BodyPart"),
    ):
        with pytest.raises(UserError, match=message):
            check_text_tags([tag])
    check_tag("PatientID")  # which may group images, because it is not stored


@pytest.mark.skipif("FASTM3AE_SHARED" not in os.environ, reason="FASTM3AE_SHARED names no folder")
def test_real_files():
    """Neither black, nor white, nor flat; air is dark and bone is bright, of MONOCHROME1, too."""
    folder = Path(os.environ["FASTM3AE_SHARED"]) / "data/dicom"
    seen = {
        path.name: decode_image(encode_png(decode_dicom(path.read_bytes(), "tag"))) for path in folder.glob("*.dcm")
    }
    assert len(seen) == 9
    for name, image in seen.items():
        levels = np.asarray(image.convert("L"))
        assert 25 < levels.mean() < 190 and levels.std() > 20, name
    assert seen["examples_rgb_color.dcm"].mode == "RGB" and seen["eCT_Supplemental.dcm"].size == (512, 512)
    leg = np.asarray(seen["RG3_UNCR.dcm"])
    assert leg[800:900, 500:600].mean() < 40 < leg[800:900, 800:850].mean()
