"""SIIM-ACR Pneumothorax Segmentation: chest radiographs with outlines of pneumothoraces.

Layout::

    train-rle.csv                                       columns ImageId, EncodedPixels; a row for each outline, or one
                                                        with -1
    dicom-images-train/{study}/{series}/{ImageId}.dcm   1024 x 1024 pixels

Encoded pixels are pairs of numbers: how many pixels to pass over after the last run, and how many the next run has,
down the columns, one after the other.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastm3ae.data.dicom import Window
from fastm3ae.data.prepare.common import OnBadImage, PrepareReport, Progress, require_files, require_images
from fastm3ae.data.prepare.labels import draw_as_mgca, report_unnamed, write_labelled
from fastm3ae.data.prepare.tables import read_csv, require_columns
from fastm3ae.errors import UserError

__all__ = ["prepare_siim"]

CLASSES = ("pneumothorax",)
TABLE, IMAGES = "train-rle.csv", "dicom-images-train"
LAYOUT = f"SIIM-ACR's challenge of 2019: {TABLE} and {IMAGES}/**/*.dcm"
SIZE_PX = 1024
NONE = "-1"


def prepare_siim(
    source: Path,
    output: Path,
    *,
    seed: int = 0,
    window: Window | Literal["max"] = "max",
    allow_missing: bool = False,
    on_bad_image: OnBadImage = "stop",
    num_workers: int = 0,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes siim_{train,val,test}.arrow from SIIM-ACR's pneumothorax challenge: radiographs, labels, and masks.

    Images are drawn at random, 70 : 15 : 15. They become PNGs. An image's mask is the union of its outlines.
    Needs pydicom: pip install 'fastm3ae[dicom]'.

    Args:
        source: The folder of the release.
        output: Folder of the arrow files.
        seed: Seed of the draw.
        window: Which values become black and white: those of the file's window (tag; none: of its lowest and highest
            value) or of this centre and width, after rescaling, in 16-bit PNGs; max: x * 255 / max(x) of the stored
            values, in 8-bit PNGs, as in MGCA.
        allow_missing: Leave out images that are missing, after the draw.
        on_bad_image: What to do about an image that cannot be decoded, or with a mask of another size.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.

    Raises:
        UserError: A file is missing or unreadable, or encoded pixels are malformed.

    Source: MGCA's mgca/preprocess/siim.py and mgca/datasets/segmentation_dataset.py.
    Deviation: MGCA draws rows, so that an image with several outlines may be in several splits. Here images are drawn.
    """
    source = Path(source)
    require_files(source, [source / TABLE], LAYOUT, [source / IMAGES])
    report = PrepareReport("siim", text_name=None)
    runs_of = _read(source / TABLE)
    paths = sorted((source / IMAGES).rglob("*.dcm"))
    files = {path.stem: path.relative_to(source).as_posix() for path in paths}
    split_of = draw_as_mgca(runs_of, seed)
    report.notes.append(f"The splits were drawn at random, 70 : 15 : 15 (seed {seed}).")
    rows = [
        {
            "image_id": files.get(name, f"{IMAGES}/**/{name}.dcm"),
            "split": split_of[name],
            "labels": [int(len(runs) > 0)],
            "runs": runs,
        }
        for name, runs in runs_of.items()
    ]
    named = [row["image_id"] for row in rows]
    present = require_images(source, named, allow_missing, report, f"the rows of {TABLE}")
    report_unnamed((path.relative_to(source).as_posix() for path in paths), named, TABLE, report)
    return write_labelled(
        [row for row in rows if row["image_id"] in present],
        source,
        output,
        report,
        CLASSES,
        {"seed": seed, "allow_missing": allow_missing} | ({} if window == "max" else {"window": window}),
        on_bad_image=on_bad_image,
        num_workers=num_workers,
        progress=progress,
        draw_mask=_draw_runs,
        window=window,
    )


def _read(table: Path) -> dict[str, np.ndarray]:
    """Returns the runs of each image's outlines, by its name: int64 (runs, 2), their starts and ends."""
    names, rows = read_csv(table)
    column = " EncodedPixels" if " EncodedPixels" in names else "EncodedPixels"  # Kaggle's has the space
    require_columns(table, names, ("ImageId", column))
    outlines_of: dict[str, list[np.ndarray]] = {}
    for number, row in rows:
        where, name, encoded = f"{table}, line {number}", row["ImageId"].strip(), row[column].strip()
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"{where}: ImageId must be digits and dots, got {name!r}.")
        if name in outlines_of and (encoded == NONE or not outlines_of[name]):
            raise UserError(
                f"{where}: {name} is there twice, not each time with an outline; expected one row of {NONE} or one for "
                "each outline."
            )
        outlines = outlines_of.setdefault(name, [])
        if encoded != NONE:
            outlines.append(_runs(encoded, where))
    no_runs = np.zeros((0, 2), dtype=np.int64)
    return {name: np.concatenate([no_runs, *outlines]) for name, outlines in outlines_of.items()}


def _runs(encoded: str, where: str) -> np.ndarray:
    """Returns start and end of each run, counted in pixels down the columns."""
    words = encoded.split()
    if not words or len(words) % 2 or not all(re.fullmatch(r"\d{1,9}", word) for word in words):
        raise UserError(
            f"{where}: EncodedPixels must be {NONE} or pairs of whole numbers, got {len(words)}: {encoded[:40]!r}."
        )
    # What is passed over and what is in a run add up, in turn, to the starts and the ends.
    runs = np.cumsum([int(word) for word in words]).reshape(-1, 2)
    if runs[-1, 1] > SIZE_PX**2:
        raise UserError(f"{where}: EncodedPixels end at pixel {runs[-1, 1]} of {SIZE_PX} x {SIZE_PX}.")
    if (runs[:, 0] == runs[:, 1]).any():
        raise UserError(f"{where}: EncodedPixels have a run of no pixel.")
    return runs


def _draw_runs(row: Mapping[str, Any], width: int, height: int) -> np.ndarray:
    """Returns the pixels in any of a row's runs."""
    if not len(row["runs"]):
        return np.zeros((height, width), dtype=bool)
    if (width, height) != (SIZE_PX, SIZE_PX):
        raise ValueError(f"the image is not of its mask's size: {width} x {height}, expected {SIZE_PX} x {SIZE_PX}")
    is_finding = np.zeros(SIZE_PX**2, dtype=bool)
    for start, end in row["runs"]:
        is_finding[start:end] = True
    return is_finding.reshape(SIZE_PX, SIZE_PX).T  # the columns came one after the other
