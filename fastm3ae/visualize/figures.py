"""Figures of matplotlib as files, for the screen and for a paper. No window is opened and no state shared."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from fastm3ae.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "save_figure", "save_sheet", "svg_text"]

FORMATS = ("png", "pdf", "svg")
PNG_DPI = 200
NO_SVG_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # which would name addresses and the day


def save_sheet(sheet: Image.Image, folder: Path, name: str) -> Path:
    """Writes a sheet as PNG into a folder, which need not exist, and returns the file.

    Raises:
        UserError: The folder cannot be written.
    """
    with _writing(folder):
        sheet.save(folder / f"{name}.png")
    return folder / f"{name}.png"


def save_figure(figure: "Figure", folder: Path, name: str) -> list[Path]:
    """Writes a figure as PNG, PDF and SVG into a folder, which need not exist, and returns the files.

    In PDF and SVG words stay words.

    Raises:
        UserError: The folder cannot be written.
    """
    import matplotlib

    paths = [folder / f"{name}.{suffix}" for suffix in FORMATS]
    png, pdf, svg = paths
    with _writing(folder):
        png.write_bytes(_printed(figure, "png"))
        with matplotlib.rc_context({"pdf.fonttype": 42}):  # journals refuse the default, 3
            pdf.write_bytes(_printed(figure, "pdf"))
        svg.write_text(svg_text(figure), encoding="utf-8")
    return paths


def svg_text(figure: "Figure") -> str:
    """Returns a figure as SVG, in which words are words; what is drawn alike gives the same text."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastm3ae"}):
        return _printed(figure, "svg").decode()


def _printed(figure: "Figure", suffix: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import

    file = io.BytesIO()
    metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": NO_SVG_METADATA}[suffix]
    FigureCanvasAgg(figure).print_figure(file, format=suffix, dpi=PNG_DPI, metadata=metadata)
    return file.getvalue()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Makes a folder, and says in a sentence why it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written: {error.strerror or error}.") from error
