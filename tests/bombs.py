"""Small files that say they are large images."""

import struct
import zlib


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height, depth=8, colour=0):
    """A PNG with right checksums, whose pixels are some zeros."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(bytes(10**6))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def bmp(width, height):
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def gif(width, height):
    """An animation whose first frame fills its screen."""
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x08\x01\x01\0"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame + b";"


def tiff(width, height):
    """One strip of black and white pixels."""
    tags = {256: width, 257: height, 258: 1, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 8}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 16) + bytes(8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def tiled_tiff(width, height, tile_height):
    """Grey pixels in one tile, packed so that libtiff reads them."""
    tags = {256: width, 257: height, 258: 8, 259: 2, 262: 0, 277: 1, 322: width, 323: tile_height, 324: 8, 325: 120}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 128) + bytes(120) + struct.pack("<H", len(tags)) + entries + bytes(4)


def tiled_jpeg2000(data, width, height, tile_px):
    """An image that says it has another size, and many tiles."""
    box, siz = data.index(b"ihdr") + 4, data.index(b"\xff\x4f\xff\x51") + 8
    data = data[:box] + struct.pack(">II", height, width) + data[box + 8 :]
    return data[:siz] + struct.pack(">8I", width, height, 0, 0, tile_px, tile_px, 0, 0) + data[siz + 32 :]


def ppm(width, height):
    return b"P6\n%d %d\n255\n" % (width, height) + bytes(100)


def jpeg(data, width, height):
    """An image that says it has another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]
