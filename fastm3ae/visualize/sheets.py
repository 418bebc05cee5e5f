"""Sheets of pictures with words beside or above them, drawn with Pillow."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["Reconstruction", "TileRow", "Usage", "case_sheet", "reconstruction_grid", "tile_grid", "usage_chart"]

CAPTION_WIDTH_PX = 420
GAP_PX = 6


class Reconstruction(NamedTuple):
    """One row of the picture; images (3, H, W) float in [0, 1].

    Args:
        original: The image.
        masked: The image with its hidden patches in grey.
        rebuilt: The visible patches as they are, the hidden ones as predicted.
        caption: Lines of text beside the images.
    """

    original: Tensor
    masked: Tensor
    rebuilt: Tensor
    caption: Sequence[str]


def reconstruction_grid(rows: Sequence[Reconstruction], min_tile_px: int = 144) -> Image.Image:
    """Draws one line per image: original, masked input, reconstruction, and the caption.

    Args:
        rows: What to draw.
        min_tile_px: Smaller images are enlarged by a whole factor to at least this size.
    """
    titles = ("original", "masked input", "reconstruction")
    return _captioned_rows([(row[:3], row.caption) for row in rows], titles, min_tile_px)


def case_sheet(cases: Sequence[tuple[Tensor, Sequence[str]]], min_tile_px: int = 144) -> Image.Image:
    """Draws images (3, H, W) in [0, 1], all of one size, below each other, with lines of text beside each.

    Args:
        cases: What to draw.
        min_tile_px: Smaller images are enlarged by a whole factor to at least this size.
    """
    return _captioned_rows([((image,), lines) for image, lines in cases], (), min_tile_px)


def _captioned_rows(
    rows: Sequence[tuple[Sequence[Tensor], Sequence[str]]], titles: Sequence[str], min_tile_px: int
) -> Image.Image:
    """Draws rows of images with lines of text beside them, below the columns' titles, if there are any."""
    header, font = 20 if titles else 0, _font()
    tile = _tile_size(rows[0][0][0], min_tile_px)
    captions = ["\n".join(part for text in caption for part in textwrap.wrap(text, 64) or [""]) for _, caption in rows]
    heights = [GAP_PX + max(tile[1], _text_size(caption)[1]) for caption in captions]
    text_left = len(rows[0][0]) * (tile[0] + GAP_PX) + GAP_PX
    sheet = Image.new("RGB", (text_left + CAPTION_WIDTH_PX, header + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((column * (tile[0] + GAP_PX), 2), title, fill="black", font=font)
    top = header
    for (images, _), caption, row_height in zip(rows, captions, heights, strict=True):
        for column, image in enumerate(images):
            sheet.paste(_enlarged(image, tile), (column * (tile[0] + GAP_PX), top))
        draw.multiline_text((text_left, top), caption, fill="black", font=font)
        top += row_height
    return sheet


class TileRow(NamedTuple):
    """Images beside each other.

    Args:
        caption: A text above them.
        tiles: Each with its title, of as many lines as all others have.
    """

    caption: str
    tiles: Sequence[tuple[str, Tensor]]


def tile_grid(rows: Sequence[TileRow], min_tile_px: int = 144, max_lines: int | None = 3) -> Image.Image:
    """Draws rows of titled images (3, H, W) in [0, 1], all of one size.

    Args:
        rows: What to draw.
        min_tile_px: Smaller images are enlarged by a whole factor to at least this size.
        max_lines: Each line of a caption takes at most so many lines of the picture; None: as many as it needs.
    """
    font = _font()
    tile = _tile_size(rows[0].tiles[0][1], min_tile_px)
    num_columns = max(max(len(row.tiles) for row in rows), -(-CAPTION_WIDTH_PX // (tile[0] + GAP_PX)))
    width = num_columns * (tile[0] + GAP_PX)
    # 6 px is about what a letter takes.
    wrapper = textwrap.TextWrapper(width // 6, max_lines=max_lines, placeholder=" ...")
    captions = ["\n".join(part for line in row.caption.split("\n") for part in wrapper.wrap(line)) for row in rows]
    title_height = max(_text_size(title)[1] for row in rows for title, _ in row.tiles) + GAP_PX
    heights = [_text_size(caption)[1] + title_height + tile[1] + 3 * GAP_PX for caption in captions]
    sheet = Image.new("RGB", (width, sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for row, caption, height in zip(rows, captions, heights, strict=True):
        draw.multiline_text((0, top), caption, fill="black", font=font)
        tile_top = top + height - tile[1] - 2 * GAP_PX
        for column, (title, image) in enumerate(row.tiles):
            left = column * (tile[0] + GAP_PX)
            draw.multiline_text((left, tile_top - title_height), title, fill="black", font=font)
            sheet.paste(_enlarged(image, tile), (left, tile_top))
        top += height
    return sheet


class Usage(NamedTuple):
    """How much each slot of a memory is used.

    Args:
        title: A line above.
        values_M: One number for each slot, none negative.
    """

    title: str
    values_M: Tensor


def usage_chart(rows: Sequence[Usage], num_columns: int = 64, cell_px: int = 14) -> Image.Image:
    """Draws a cell for each slot, from white (0) to dark blue (the largest number of all rows).

    Args:
        rows: What to draw.
        num_columns: Longer rows go on in further lines.
        cell_px: Height and width of a cell.
    """
    line_px, font = 20, _font()
    most = max(float(row.values_M.max()) for row in rows)
    num_lines = [-(-len(row.values_M) // num_columns) for row in rows]
    header = f"one cell each: white 0%, dark blue {most:.2%}"
    cells_width = min(num_columns, max(len(row.values_M) for row in rows)) * cell_px + 1
    width = max(cells_width, *(_text_size(text)[0] + GAP_PX for text in (header, *(row.title for row in rows))))
    sheet = Image.new("RGB", (width, line_px + sum(line_px + n * cell_px + GAP_PX for n in num_lines)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((0, 2), header, fill="black", font=font)
    top = line_px
    for row, lines in zip(rows, num_lines, strict=True):
        draw.text((0, top + 2), row.title, fill="black", font=font)
        top += line_px
        for number, value in enumerate(row.values_M.tolist()):
            left, cell_top = number % num_columns * cell_px, top + number // num_columns * cell_px
            relative = value / most if most > 0 else 0.0
            colour = tuple(round(255 + (dark - 255) * relative) for dark in (8, 48, 107))
            draw.rectangle((left, cell_top, left + cell_px, cell_top + cell_px), fill=colour, outline="lightgrey")
        top += lines * cell_px + GAP_PX
    return sheet


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=12)


def _text_size(text: str) -> tuple[int, int]:
    """Returns the width and the height."""
    _, _, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=_font())
    return int(right), int(bottom)


def _tile_size(image_CHW: Tensor, min_tile_px: int) -> tuple[int, int]:
    _, height, width = image_CHW.shape
    scale = max(1, -(-min_tile_px // min(height, width)))
    return width * scale, height * scale


def _enlarged(image_CHW: Tensor, size: tuple[int, int]) -> Image.Image:
    pixels = (image_CHW.cpu().permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
