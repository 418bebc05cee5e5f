"""What the tests of preparation share: small images, files, and what stands in the arrow files."""

import io

import numpy as np
from PIL import Image

from fastm3ae.data.arrow import CAPTION_COLUMNS, ArrowTable

REFERENCES = "medicat/net/nfs2.corp/allennlp/sanjays/roco_files"
SPLITS = ("train", "val", "test")


def image_bytes(seed=0, format="PNG", mode="L"):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, format)
    return stream.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(output, name, split):
    table = ArrowTable.open([output / f"{name}_{split}.arrow"], CAPTION_COLUMNS)
    return {table.row(i, "image_id"): table.row(i, "caption") for i in range(len(table))}


def ids(output, name, split):
    return list(rows(output, name, split))


def left_out(report):
    return {reason: len(items) for reason, items in report.dropped.items()}


# ROCO
