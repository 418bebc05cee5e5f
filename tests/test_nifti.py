"""NIfTI slices: which way round, which slice, which grey levels; and what claims more than it may is refused."""

import gzip
import struct
import sys

import nibabel
import numpy as np
import pytest
from volumes import volume_bytes

from fastm3ae.data import nifti
from fastm3ae.data.decode import decode_image, encode_png
from fastm3ae.data.nifti import decode_nifti, is_nifti
from fastm3ae.errors import UserError


def body():
    """Right of the patient is bright, the front a little, the head most: 4 x 5 x 6 voxels."""
    values = np.zeros((4, 5, 6), np.int16)
    values[3, :, :], values[:, 4, :], values[:, :, 5] = 100, 200, 300
    return values


def levels(data, **options):
    options = {"window": (200, 400)} | options
    return np.rint(np.asarray(decode_nifti(data, **options)) / 65535 * 400)


@pytest.mark.parametrize("axes", ["RAS", "LPI", "PSR", "IRA"])
@pytest.mark.parametrize("packed", [False, True])
def test_pictures_are_as_a_radiologist_sees_them(axes, packed):
    data = volume_bytes(body(), axes=axes, packed=packed)
    axial = levels(data, axis="axial", index=2)
    assert axial.shape == (5, 4) and (axial[0] == 200).all()  # the front is at the top
    assert (axial[1:, 0] == 100).all() and not axial[1:, 1:].any()  # the patient's right at the left
    coronal = levels(data, axis="coronal", index=0)
    assert coronal.shape == (6, 4) and (coronal[0] == 300).all() and (coronal[1:, 0] == 100).all()
    sagittal = levels(data, axis="sagittal", index=0)
    assert sagittal.shape == (6, 5) and (sagittal[0] == 300).all() and (sagittal[1:, 0] == 200).all()
    assert (levels(data, index=5) == 300).all()  # the last of axial slices is the head's
    assert (levels(data) == levels(data, index=3)).all()
    assert (levels(data, axis="sagittal", index=3)[1:, 1:] == 100).all()


def test_voxels_become_square():
    data = volume_bytes(np.arange(24, dtype=np.float32).reshape(2, 3, 4), zooms=(1, 1, 2.5))
    assert decode_nifti(data, axis="axial").size == (2, 3)
    assert decode_nifti(data, axis="coronal").size == (2, 10) and decode_nifti(data, axis="sagittal").size == (3, 10)
    bytes_ = decode_nifti(volume_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), zooms=(3, 1, 1)))
    assert bytes_.mode == "L" and bytes_.size == (6, 3)


@pytest.mark.parametrize(
    ("header", "options", "expected"),
    [
        ({}, {"window": "none"}, [0, 0.1, 0.5, 1]),
        ({}, {"window": (500, 500)}, [0, 0, 0.5, 1]),
        ({"cal_min": 0, "cal_max": 500}, {"window": "tag"}, [0, 0.2, 1, 1]),
        ({"cal_min": 0, "cal_max": 500}, {"window": "none"}, [0, 0.1, 0.5, 1]),
        ({}, {"window": "tag", "percentiles": (0, 50)}, [0, 1 / 3, 1, 1]),
    ],
)
def test_windows(header, options, expected):
    data = volume_bytes(np.array([0, 100, 500, 1000], np.int16).reshape(1, 4, 1), **header)
    image = decode_nifti(data, **options)
    assert image.mode == "I;16"
    assert np.asarray(image)[::-1, 0] / 65535 == pytest.approx(expected, abs=1e-4)
    seen = np.asarray(decode_image(encode_png(image)))[::-1, 0]
    assert seen / 255 == pytest.approx(expected, abs=0.003)


def test_values_are_scaled_and_what_is_not_finite_is_black():
    values = np.array([np.nan, np.inf, 1, 3], np.float32).reshape(1, 4, 1)
    assert np.asarray(decode_nifti(volume_bytes(values), window="none"))[::-1, 0].tolist() == [0, 0, 0, 65535]
    scaled = nibabel.Nifti1Image(np.array([0, 1, 2], np.int16).reshape(1, 3, 1), np.eye(4))
    scaled.header.set_slope_inter(10, -5)
    data = bytearray(scaled.to_bytes())
    data[112:120] = struct.pack("<ff", 10, -5)  # nibabel sets them to 1 and 0 when it writes
    assert np.asarray(decode_nifti(bytes(data), window=(5, 20)))[::-1, 0].tolist() == [0, 32768, 65535]
    with pytest.raises(ValueError, match="the slice has no finite value"):
        decode_nifti(volume_bytes(values * np.nan))


def test_several_volumes_flat_ones_and_nifti_2():
    values = np.arange(2 * 3 * 4 * 2, dtype=np.int16).reshape(2, 3, 4, 2)
    data = volume_bytes(values)
    first, second = (np.asarray(decode_nifti(data, volume=n, window=(24, 48)), float) for n in (0, 1))
    assert (second - first == pytest.approx(65535 / 48, abs=1.01)) and first.shape == (3, 2)
    with pytest.raises(ValueError, match="it holds 2 volumes; --volume N takes one of them, counted from 0"):
        decode_nifti(data)
    with pytest.raises(ValueError, match="it has no volume 2: it has 2"):
        decode_nifti(data, volume=2)
    assert decode_nifti(nibabel.Nifti1Image(np.eye(3, 5, dtype=np.int16), np.eye(4)).to_bytes()).size == (3, 5)
    assert decode_nifti(nibabel.Nifti2Image(values[..., 0], np.eye(4)).to_bytes()).size == (2, 3)


def changed(at, kind, *values, data=None):
    data = bytearray(data or volume_bytes(body()))
    struct.pack_into(kind, data, at, *values)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the NIfTI file cannot be decoded: "),
        (b"no volume" * 100, "it is no NIfTI file of one part"),
        (gzip.compress(b"no volume" * 100, mtime=0), "it is no NIfTI file of one part"),
        (b"\x1f\x8bnot packed", "the NIfTI file cannot be decoded: "),
        (volume_bytes(body())[:-200], "the NIfTI file cannot be decoded: "),
        (volume_bytes(body(), packed=True)[:-30], "the NIfTI file cannot be decoded: "),
        (changed(42, "<3h", 32767, 32767, 32767), "it claims 32767 x 32767 x 32767 voxels from byte 352"),
        (changed(42, "<3h", 30000, 30000, 1), "30000 x 30000 pixels are more than the limit of 89478485"),
        (changed(42, "<3h", -4, 5, 6), "it claims -4 x 5 x 6 voxels"),
        (changed(108, "<f", 1e30), "it claims 4 x 5 x 6 voxels from byte 1"),
        (changed(108, "<f", float("nan")), "the NIfTI file cannot be decoded: "),
        (changed(70, "<2h", 128, 24), "colours or complex numbers"),
        (changed(70, "<2h", 32, 64), "colours or complex numbers"),
        (changed(280, "<12f", *[0] * 12), "the NIfTI file cannot be decoded: "),
        (volume_bytes(body(), zooms=(1, 1e9, 1)), "4 x 5000000000 pixels are more than the limit"),
    ],
)
def test_what_is_no_such_file_says_why(data, message):
    with pytest.raises(ValueError, match=message):
        decode_nifti(data)


def test_a_packed_bomb_is_not_unpacked(monkeypatch):
    """It claims a volume that is allowed, and the stream goes on for long behind it; or it claims too much at once."""
    header = volume_bytes(np.zeros((2, 2, 2), np.int16))[:352]
    bomb = gzip.compress(header + bytes(50_000_000), mtime=0)
    assert len(bomb) < 60_000
    read = []
    whole = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: read.append(size) or whole(self, size))
    assert decode_nifti(bomb).size == (2, 2)
    assert all(0 <= size < 10_000 for size in read)
    monkeypatch.setattr(nifti, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="it claims 30 x 30 x 30 voxels from byte 352, expected at least one and 1000"):
        decode_nifti(volume_bytes(np.zeros((30, 30, 30), np.int16), packed=True))


def test_indices_names_and_a_missing_package(monkeypatch):
    with pytest.raises(ValueError, match="it has no slice 4 of that axis: it has 4, counted from 0"):
        decode_nifti(volume_bytes(body()), axis="sagittal", index=4)
    assert [is_nifti(name) for name in ("a.nii", "a.NII.gz", "a.gz", "nii", "a.nii.png")] == [True, True] + [False] * 3
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"nibabel, which is missing: pip install 'fastm3ae\[nifti\]'\."):
        decode_nifti(volume_bytes(body()))
    assert "nibabel" in sys.modules
