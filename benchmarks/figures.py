"""Corpora whose images cost what figures of ROCO and MediCaT cost: their sizes, formats, colours and bits per pixel.

The figures are the demo's drawn radiographs with grain, without which a JPEG or PNG would be smaller and faster to
decode than a real one. A sample of figures as those data sets have them gave the numbers: JPEGs of 256 to 1024 pixels
at 0.5 to 2 bits per pixel, nearly all of them (95 %) grey but stored in colour; PNGs of 260 to 740 pixels at 3 to 10
bits per pixel, grey with colour in some places.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastm3ae.data.arrow import write_pairs
from fastm3ae.data.demo import draw_pair
from fastm3ae.data.demo.radiographs import draw_radiograph
from fastm3ae.data.demo.reports import write_captions
from fastm3ae.data.demo.tokenizer import write_tokenizer

NUM_FIGURES = 40
VOCAB_SIZE = 400
CAPTIONS_PER_TEXT = 3  # one caption of the demo is a third of a text of ROCO
JPEG_SIZES_PX = ((512, 512), (512, 404), (410, 512), (300, 256), (720, 540), (600, 760), (1024, 820), (640, 512))
PNG_SIZES_PX = ((634, 468), (736, 374), (700, 602), (684, 260), (520, 650), (734, 388))
JPEG_GRAIN, PNG_GRAIN = 6, 2  # standard deviations in grey levels: 1.0 and 6.3 bits per pixel


def write_corpus(folder: Path, image_format: str, texts_per_image: int) -> None:
    """Writes figures_train.arrow and the folder tokenizer.

    Args:
        folder: Where to.
        image_format: JPEG: as in ROCO. PNG: as in MediCaT.
        texts_per_image: Pairs that share an image.
    """
    texts = [[draw_text(figure, number) for number in range(texts_per_image)] for figure in range(NUM_FIGURES)]
    draw = {"JPEG": draw_jpeg, "PNG": draw_png}[image_format]
    rows = (
        {"image": draw(figure), "caption": texts[figure], "image_id": f"{figure}.{image_format}", "split": "train"}
        for figure in range(NUM_FIGURES)
    )
    write_pairs(folder / "figures_train.arrow", rows)
    write_tokenizer(folder / "tokenizer", (text for texts_of_figure in texts for text in texts_of_figure), VOCAB_SIZE)


def draw_text(figure: int, number: int) -> str:
    study, _ = draw_pair(0, "train", figure)
    rng = np.random.default_rng((figure, number))
    return " . ".join(write_captions(study, rng)[0] for _ in range(CAPTIONS_PER_TEXT))


def draw_jpeg(figure: int) -> bytes:
    """A radiograph stored as YCbCr; every twentieth has an arrow in colour."""
    image = draw_grey(figure, JPEG_SIZES_PX[figure % len(JPEG_SIZES_PX)], JPEG_GRAIN)
    if figure % 20 == 0:
        draw_arrow(image)
    return encode(image, "JPEG")


def draw_png(figure: int) -> bytes:
    """A radiograph with an arrow in colour that was a JPEG once."""
    image = draw_grey(figure, PNG_SIZES_PX[figure % len(PNG_SIZES_PX)], PNG_GRAIN)
    draw_arrow(image)
    return encode(Image.open(io.BytesIO(encode(image, "JPEG", quality=95))), "PNG")


def draw_grey(figure: int, size_px: tuple[int, int], grain: float) -> Image.Image:
    study, _ = draw_pair(0, "train", figure)
    width, height = size_px
    levels = draw_radiograph(study, max(size_px))[:height, :width]
    levels = levels + np.random.default_rng(figure).normal(0, grain, levels.shape)
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).convert("RGB")


def draw_arrow(image: Image.Image) -> None:
    ImageDraw.Draw(image).line([(20, 30), (90, 110)], fill=(255, 210, 0), width=6)


def encode(image: Image.Image, image_format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()
