"""Encoded images, DICOM files and NIfTI volumes, to the modules of ``fastm3ae.data`` that read them."""

import gzip
import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastm3ae.data.decode import decode_image, encode_png
from fastm3ae.data.images import make_transform
from fuzz.mutate import EXTREMES, mutate

__all__ = ["DicomTarget", "ImageTarget", "NiftiTarget"]

# Bombs are told by what they cost for each pixel that is allowed, so that few may be: the campaign stays cheap.
MAX_PIXELS = 1_000_000
DIMENSIONS = (0, 1, 2, 7, 999, 1001, 32767, 65500, 65535, 2**31 - 1, 2**32 - 1)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def picture(mode: str, size: tuple[int, int] = (13, 9)) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(levels, "RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def seeds() -> dict[str, bytes]:
    """A file of each kind that Pillow writes, small."""
    deep = Image.fromarray(np.arange(120, dtype=np.uint16).reshape(10, 12) * 500)
    frames = [picture("P"), picture("P").rotate(90), picture("P")]
    files = {f"{mode}.png": encoded(picture(mode), "PNG") for mode in ("1", "L", "P", "RGB", "RGBA", "LA")}
    files |= {f"{mode}.jpg": encoded(picture(mode), "JPEG") for mode in ("L", "RGB", "CMYK")}
    files |= {
        f"{compression}.tif": encoded(picture(mode), "TIFF", compression=compression)
        for mode, compression in (
            ("RGB", "raw"), ("RGB", "tiff_lzw"), ("L", "tiff_deflate"), ("1", "group4"), ("RGB", "jpeg"),
            ("L", "packbits"), ("RGBA", "tiff_adobe_deflate"),
        )
    }  # fmt: skip
    return files | {
        "interlaced.png": encoded(picture("P"), "PNG", transparency=3),
        "deep.png": encoded(deep, "PNG"),
        "animated.png": encoded(frames[0].convert("RGB"), "PNG", save_all=True, append_images=[picture("RGB")]),
        "progressive.jpg": encoded(picture("RGB"), "JPEG", progressive=True),
        "exif.jpg": encoded(picture("RGB"), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0", icc_profile=b"x" * 200),
        "deep.tif": encoded(deep, "TIFF"),
        "float.tif": encoded(Image.fromarray(np.linspace(-1, 1, 99, dtype=np.float32).reshape(9, 11)), "TIFF"),
        "lab.tif": encoded(picture("LAB"), "TIFF"),
        "many.tif": encoded(picture("L"), "TIFF", save_all=True, append_images=[picture("RGB")]),
        "still.gif": encoded(picture("P"), "GIF", transparency=2),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], loop=0, disposal=2),
        "rgb.bmp": encoded(picture("RGB"), "BMP"),
        "palette.bmp": encoded(picture("P"), "BMP"),
        "lossy.webp": encoded(picture("RGB"), "WEBP"),
        "lossless.webp": encoded(picture("RGBA"), "WEBP", lossless=True),
        "animated.webp": encoded(frames[0].convert("RGB"), "WEBP", save_all=True, append_images=[picture("RGB")]),
        "rgb.jp2": encoded(picture("RGB"), "JPEG2000"),
        "deep.jp2": encoded(deep, "JPEG2000"),
        "rgb.ppm": encoded(picture("RGB"), "PPM"),
        "grey.eps": encoded(picture("L"), "EPS"),
        "rgb.ico": encoded(picture("RGB", (16, 16)), "ICO"),
        "rgb.tga": encoded(picture("RGB"), "TGA"),
        "rgb.pcx": encoded(picture("RGB"), "PCX"),
        "rgb.sgi": encoded(picture("RGB"), "SGI"),
        "rgb.dds": encoded(picture("RGB"), "DDS"),
        "rgb.pdf": encoded(picture("RGB"), "PDF"),
    }


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rng: random.Random) -> bytes:
    """A PNG with right checksums, of odd dimensions, kinds and chunks, which may unpack to very much."""
    width, height = (rng.choice((*DIMENSIONS, rng.randint(1, 40))) for _ in range(2))
    depth, colour = rng.choice((1, 2, 4, 8, 16, 3)), rng.choice((0, 2, 3, 4, 6, 5))
    header = struct.pack(">IIBBBBB", width & 0x7FFFFFFF, height & 0x7FFFFFFF, depth, colour, 0, 0, rng.choice((0, 1)))
    pixels = zlib.compress(rng.choice((b"", bytes(rng.randint(1, 4000)), bytes(20_000_000))), 1)
    contents = (b"", rng.randbytes(rng.randint(1, 30)), b"a\0\0" + zlib.compress(bytes(10_000_000)))
    odd = [
        png_chunk(kind, rng.choice(contents))
        for kind in rng.choices((b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"eXIf", b"gAMA"), k=2)
    ]
    cut = rng.randint(0, len(pixels))
    parts = [*odd[:1], png_chunk(b"IDAT", pixels[:cut]), png_chunk(b"IDAT", pixels[cut:]), *odd[1:]]
    if rng.random() < 0.2:
        rng.shuffle(parts)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(parts) + png_chunk(b"IEND", b"")


def tiff(rng: random.Random) -> bytes:
    """A TIFF with a directory of odd entries."""
    order, mark = rng.choice(((">", b"MM\0*"), ("<", b"II*\0")))
    tags = {256: 12, 257: 10, 258: 8, 259: rng.choice((1, 2, 5, 6, 7, 8, 32773, 50000)), 262: rng.choice((0, 1, 2, 3)),
            273: 8, 277: 1, 278: 10, 279: 120}  # fmt: skip
    for tag in rng.choices((*tags, 266, 284, 317, 320, 322, 323, 324, 325, 338, 339, 347, 34665, 33550), k=3):
        tags[tag] = rng.choice((*EXTREMES, *DIMENSIONS)) & 0xFFFFFFFF
    entries = b"".join(
        struct.pack(f"{order}HHII", tag, rng.choice((3, 4, 4, 4, 5, 13, 99)) if rng.random() < 0.2 else 4,
                    rng.choice(EXTREMES) & 0xFFFFFFFF if rng.random() < 0.05 else 1, value)
        for tag, value in sorted(tags.items())
    )  # fmt: skip
    again = rng.choice((0, 128, 2**31))  # where the next directory is: a circle is one of the ways
    body = bytes(120) + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", again)
    return mark + struct.pack(f"{order}I", 128) + body


def with_dimensions(data: bytes, name: str, rng: random.Random) -> bytes:
    """The file with other dimensions in its header."""
    width, height = rng.choices(DIMENSIONS, k=2)
    if name.endswith(".gif"):
        at = rng.choice((6, max(0, data.find(b",", 13) + 5)))
        return data[:at] + struct.pack("<HH", width & 0xFFFF, height & 0xFFFF) + data[at + 4 :]
    if name.endswith(".jpg"):
        at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
        return data[:at] + struct.pack(">HH", height & 0xFFFF, width & 0xFFFF) + data[at + 4 :]
    if name.endswith(".bmp"):
        return data[:18] + struct.pack("<II", width, height) + data[26:]
    if name.endswith(".jp2"):
        at = data.find(b"ihdr") + 4
        siz = data.find(b"\xff\x51") + 6
        data = data[:at] + struct.pack(">II", height, width) + data[at + 8 :]
        return data[:siz] + struct.pack(">II", width, height) + data[siz + 8 :]
    if name.endswith(".ppm"):
        return b"P%d\n%d %d\n%d\n" % (rng.randint(1, 7), width, height, rng.choice((255, 65535, 0, 1))) + data[15:]
    if name == "lossy.webp":
        at = data.find(b"\x9d\x01\x2a") + 3
        return data[:at] + struct.pack("<HH", width & 0x3FFF, height & 0x3FFF) + data[at + 4 :]
    if name.endswith(".webp") and b"VP8X" in data:
        at = data.find(b"VP8X") + 12
        return data[:at] + struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3] + data[at + 6 :]
    return mutate(data, rng)


class ImageTarget:
    """Encoded images, decoded and made squares of."""

    name, documented, limit_s, limit_mib = "image", (ValueError,), 10.0, 64.0

    def __init__(self) -> None:
        self.seeds = seeds()
        self.transform = make_transform("clip", 16)

    def begin(self) -> None:
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS
        torch.set_num_threads(1)

    def make(self, rng: random.Random) -> bytes:
        name = rng.choice(list(self.seeds))
        data, others = self.seeds[name], list(self.seeds.values())
        way = rng.random()
        if way < 0.02:
            return data
        if way < 0.12:
            data = png(rng)
        elif way < 0.22:
            data = tiff(rng)
        elif way < 0.4:
            data = with_dimensions(data, name, rng)
        else:
            return mutate(data, rng, others)
        return data if rng.random() < 0.7 else mutate(data, rng, others)

    def read(self, data: bytes, folder: Path) -> str:
        for alpha in ("composite", "official"):
            image = decode_image(data, alpha)
            assert image.mode in ("L", "RGB", "RGBA"), image.mode
            assert self.transform(image).shape == (3, 16, 16)
        return "accepted"


class DicomTarget:
    """DICOM files."""

    name, documented, limit_s, limit_mib = "dicom", (ValueError,), 10.0, 96.0

    def __init__(self) -> None:
        import pydicom
        from pydicom import uid
        from radiographs import dicom_bytes

        from fastm3ae.data.dicom import decode_dicom, open_dicom
        from fastm3ae.data.dicom_header import identifying_fields

        self.decode, self.open, self.identifying = decode_dicom, open_dicom, identifying_fields
        self.pydicom, self.uid = pydicom, uid
        grey, wide = np.arange(63, dtype=np.uint8).reshape(7, 9), np.arange(63, dtype=np.uint16).reshape(7, 9) * 9
        image = Image.fromarray(grey)
        self.seeds = [
            dicom_bytes(grey),
            dicom_bytes(wide, "MONOCHROME1", bits_stored=12), dicom_bytes(wide.astype(np.int16) - 99),
            dicom_bytes(np.stack([grey] * 3, -1), "RGB"),
            dicom_bytes(grey, syntax=uid.JPEGBaseline8Bit, encoded=encoded(image, "JPEG")),
            dicom_bytes(grey, syntax=uid.JPEG2000Lossless, encoded=encoded(image, "JPEG2000", no_jp2=True)),
            dicom_bytes(grey, syntax=uid.JPEG2000Lossless, encoded=encoded(image, "JPEG2000")),
            dicom_bytes(grey, syntax=uid.RLELossless, encoded=self.run_lengths(grey)),
        ]  # fmt: skip
        packed = uid.DeflatedExplicitVRLittleEndian
        self.seeds.append(dicom_bytes(grey, syntax=packed))
        self.bomb = dicom_bytes(np.zeros((13_000, 13_000), np.uint8), syntax=packed)

    def begin(self) -> None:
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS

    @staticmethod
    def run_lengths(grey: np.ndarray) -> bytes:
        """PackBits of single pixels, behind the header of one segment."""
        return struct.pack("<16I", 1, 64, *[0] * 14) + b"".join(bytes((0, level)) for level in grey.tobytes()) + b"\0"

    def make(self, rng: random.Random) -> bytes:
        way, data = rng.random(), rng.choice(self.seeds)
        if way < 0.02:
            return data
        if way < 0.04:
            return mutate(self.bomb, rng) if rng.getrandbits(1) else self.bomb
        if way < 0.45:
            return mutate(data, rng, self.seeds)
        dataset = self.pydicom.dcmread(io.BytesIO(data))
        for _ in range(rng.randint(1, 3)):
            self.change(dataset, rng)
        stream = io.BytesIO()
        try:
            dataset.save_as(stream)
        except Exception:  # what pydicom will not write is made by damaging bytes
            return mutate(data, rng, self.seeds)
        return stream.getvalue() if rng.random() < 0.7 else mutate(stream.getvalue(), rng, self.seeds)

    def change(self, dataset, rng: random.Random) -> None:
        """An odd field."""
        sixteen = rng.choice((0, 1, 2, 3, 8, 12, 16, 32, 64, 1000, 65535))
        name, value = rng.choice(
            (
                ("Rows", sixteen), ("Columns", sixteen), ("SamplesPerPixel", sixteen), ("BitsAllocated", sixteen),
                ("BitsStored", sixteen), ("HighBit", sixteen), ("PixelRepresentation", sixteen),
                ("PlanarConfiguration", sixteen), ("NumberOfFrames", rng.choice((0, 1, 2, -1, 10**6, 2**31))),
                ("PhotometricInterpretation", rng.choice(("RGB", "YBR_FULL", "", "PALETTE COLOR", "MONOCHROME1", "x"))),
                ("PixelData", rng.choice((b"", bytes(63), bytes(64), bytes(10_000)))),
                ("WindowCenter", rng.choice(("1", "-1e9", ["1", "2"], ""))), ("FloatPixelData", bytes(252)),
                ("WindowWidth", rng.choice(("1", "0", "-5", "1e300", ["400", "9"]))),
                ("VOILUTFunction", rng.choice(("LINEAR", "LINEAR_EXACT", "SIGMOID", "x"))),
                ("RescaleSlope", rng.choice(("1", "0", "-2", "1e300"))),
                ("RescaleIntercept", rng.choice(("0", "1e308"))),
                ("VOILUTSequence", self.tables(rng)), ("ModalityLUTSequence", self.tables(rng)),
                ("SharedFunctionalGroupsSequence", self.groups(rng)), ("PatientName", rng.choice(("a^b", "=" * 99))),
                ("PerFrameFunctionalGroupsSequence", self.groups(rng)), ("BurnedInAnnotation", "YES"),
                ("ExtendedOffsetTable", rng.randbytes(16)), ("ImageType", ["A"] * 1000),
            )
        )  # fmt: skip
        if rng.random() < 0.1:
            dataset.pop(name, None)
        elif rng.random() < 0.1:
            syntaxes = (self.uid.RLELossless, self.uid.JPEGBaseline8Bit, self.uid.JPEGLosslessSV1, self.uid.MPEG2MPML,
                        self.uid.ImplicitVRLittleEndian, self.uid.ExplicitVRBigEndian, "1.2.3", "")  # fmt: skip
            dataset.file_meta.TransferSyntaxUID = rng.choice(syntaxes)
        else:
            setattr(dataset, name, value)

    def tables(self, rng: random.Random) -> list:
        """A lookup table with an odd description."""
        table = self.pydicom.Dataset()
        descriptor = [rng.choice((0, 1, 4, 4, 65535)), rng.choice((0, 0, 9, 65535)), rng.choice((8, 8, 10, 16, 1, 0))]
        table.add_new("LUTDescriptor", "US", rng.choice((descriptor, descriptor, descriptor[:2], 4)))
        table.add_new("LUTData", *rng.choice((("US", [0, 9, 200, 65535]), ("OW", bytes(8)), ("OW", b""), ("US", 7))))
        return rng.choice(([table], [table], [], [self.pydicom.Dataset()]))

    def groups(self, rng: random.Random) -> list:
        """What a file of several frames says of them."""
        inner, group = self.pydicom.Dataset(), self.pydicom.Dataset()
        inner.WindowCenter, inner.WindowWidth = rng.choice(("1", "")), rng.choice(("2", "0"))
        inner.RescaleSlope = "2"
        group.FrameVOILUTSequence = rng.choice(([inner], []))
        group.PixelValueTransformationSequence = rng.choice(([inner], []))
        return [group] * rng.choice((0, 1, 3))

    def read(self, data: bytes, folder: Path) -> str:
        refusals = []
        for window in ("max", "tag", (40.0, 80.0)):
            try:
                image = self.decode(data, window)
                assert image.mode in (("L",) if window == "max" else ("L", "I;16", "RGB")), image.mode
                decode_image(encode_png(image))
            except ValueError as error:
                refusals.append(error)
        if len(refusals) == 3:
            raise refusals[-1]
        self.identifying(self.open(data, header_only=True))
        return "accepted"


class NiftiTarget:
    """NIfTI volumes, packed and not."""

    name, documented, limit_s, limit_mib = "nifti", (ValueError,), 10.0, 96.0
    MOST_BYTES = 2**24
    """Claims are bounded by this; so small that the campaign stays cheap."""

    def __init__(self) -> None:
        import nibabel
        from volumes import volume_bytes

        from fastm3ae.data import nifti

        self.nifti = nifti
        values = np.arange(7 * 6 * 5).reshape(7, 6, 5)
        kinds = (np.uint8, np.int16, np.float32, np.float64, np.int32, np.complex64)
        self.plain = [volume_bytes(values.astype(kind), zooms=(1, 2, 3), axes="LPI") for kind in kinds]
        self.plain += [volume_bytes(np.stack([values.astype(np.int16)] * 2, -1)),
                       nibabel.Nifti2Image(values.astype(np.int16), np.eye(4)).to_bytes()]  # fmt: skip
        self.seeds = self.plain + [gzip.compress(data) for data in self.plain]
        self.bomb = gzip.compress(self.plain[1] + bytes(2**28))

    def begin(self) -> None:
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS
        self.nifti.MOST_BYTES = self.MOST_BYTES

    def make(self, rng: random.Random) -> bytes:
        way, data = rng.random(), rng.choice(self.seeds)
        if way < 0.03:
            return data
        if way < 0.08:
            return mutate(self.bomb, rng) if rng.getrandbits(1) else self.bomb
        if way < 0.5:
            return mutate(data, rng, self.seeds)
        changed = bytearray(rng.choice(self.plain))
        for _ in range(rng.randint(1, 3)):
            self.change(changed, rng)
        data = bytes(changed) if rng.getrandbits(1) else gzip.compress(bytes(changed) + bytes(rng.choice((0, 2**22))))
        return data if rng.random() < 0.7 else mutate(data, rng, self.seeds)

    @staticmethod
    def change(data: bytearray, rng: random.Random) -> None:
        """An odd field of the header: dimensions, type, voxel sizes, offset, scaling, range, orientation, magic."""
        shorts = (0, 1, 2, 5, 1000, 3000, 32767, -1, -32768)
        floats = (0, 1, -1, 1e-30, 1e30, float("nan"), float("inf"))
        at = rng.choice((40, 42, 44, 46, 48, 50, 70, 72, 76, 80, 84, 88, 108, 112, 116, 124, 128, 252, 254, 256, 260,
                         264, 280, 296, 312, 344))  # fmt: skip
        if at == 344:
            data[344:348] = rng.choice((b"ni1\0", b"n+1\0", b"\0\0\0\0"))
        elif at < 76 or 252 <= at < 256:
            struct.pack_into("<h", data, at, rng.choice((*shorts, 16, 64, 128, 2304, 1792, 512)))
        else:
            struct.pack_into("<f", data, at, rng.choice((*floats, 348, 352, 5000, 2**31)))

    def read(self, data: bytes, folder: Path) -> str:
        refusals = []
        for axis, volume, window in (("axial", None, "none"), ("sagittal", 0, "tag"), ("coronal", 1, (5.0, 9.0))):
            try:
                decode_image(encode_png(self.nifti.decode_nifti(data, axis=axis, volume=volume, window=window)))
            except ValueError as error:
                refusals.append(error)
        if len(refusals) == 3:
            raise refusals[0]
        return "accepted"
