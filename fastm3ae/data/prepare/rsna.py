"""RSNA Pneumonia Detection Challenge: chest radiographs with boxes around opacities that suggest pneumonia.

Layout of Kaggle's archive, unpacked::

    stage_2_train_labels.csv                columns patientId, x, y, width, height, Target; a row for each box (Target
                                            1), or one without a box (Target 0)
    stage_2_train_images/{patientId}.dcm
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fastm3ae.data.dicom import Window
from fastm3ae.data.prepare.common import OnBadImage, PrepareReport, Progress, require_files, require_images
from fastm3ae.data.prepare.labels import draw_as_mgca, report_unnamed, write_labelled
from fastm3ae.data.prepare.tables import read_csv, require_columns
from fastm3ae.errors import UserError

__all__ = ["prepare_rsna"]

CLASSES = ("pneumonia",)
TABLE, IMAGES = "stage_2_train_labels.csv", "stage_2_train_images"
LAYOUT = f"RSNA's challenge of 2018: {TABLE} and {IMAGES}/*.dcm"
BOX = ("x", "y", "width", "height")


class _Box(NamedTuple):
    """Pixels of columns x to x_end and rows y to y_end, these excluded."""

    x: int
    y: int
    x_end: int
    y_end: int


def prepare_rsna(
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
    """Writes rsna_{train,val,test}.arrow from RSNA's pneumonia challenge: radiographs, labels, and masks of the boxes.

    Images are drawn at random, 70 : 15 : 15; with seed 0 and the whole release, the splits are MGCA's for
    classification. They become PNGs. Needs pydicom: pip install 'fastm3ae[dicom]'.

    Args:
        source: The folder of the release.
        output: Folder of the arrow files.
        seed: Seed of the draw.
        window: Which values become black and white: those of the file's window (tag; none: of its lowest and highest
            value) or of this centre and width, after rescaling, in 16-bit PNGs; max: x * 255 / max(x) of the stored
            values, in 8-bit PNGs, as in MGCA.
        allow_missing: Leave out images that are missing, after the draw.
        on_bad_image: What to do about an image that cannot be decoded, or whose box lies beside it.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.

    Raises:
        UserError: A file is missing or unreadable, or a row is no box and no image without one.

    Source: MGCA's mgca/preprocess/rsna.py and mgca/datasets/segmentation_dataset.py.
    Deviation: For segmentation MGCA holds out 20 % for val and for test; here both tasks have the same splits.
    """
    source = Path(source)
    require_files(source, [source / TABLE], LAYOUT, [source / IMAGES])
    report = PrepareReport("rsna", text_name=None)
    boxes_of = _read(source / TABLE)
    split_of = draw_as_mgca(boxes_of, seed)
    report.notes.append(f"The splits were drawn at random, 70 : 15 : 15 (seed {seed}).")
    rows = [
        {"image_id": f"{IMAGES}/{name}.dcm", "split": split_of[name], "labels": [int(bool(boxes))], "boxes": boxes}
        for name, boxes in boxes_of.items()
    ]
    named = [row["image_id"] for row in rows]
    present = require_images(source, named, allow_missing, report, "the labels")
    report_unnamed(sorted(f"{IMAGES}/{path.name}" for path in (source / IMAGES).glob("*.dcm")), named, TABLE, report)
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
        draw_mask=_draw_boxes,
        window=window,
    )


def _read(table: Path) -> dict[str, list[_Box]]:
    """Returns the boxes of each image, by its name; none where there is no finding."""
    names, rows = read_csv(table)
    require_columns(table, names, ("patientId", *BOX, "Target"))
    boxes_of: dict[str, list[_Box]] = {}
    for number, row in rows:
        where, name, target = f"{table}, line {number}", row["patientId"], row["Target"]
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"{where}: patientId must be letters, digits and dashes, got {name!r}.")
        if target not in ("0", "1"):
            raise UserError(f"{where}: Target must be 0 or 1, got {target!r}.")
        if target == "0" and any(row[column] for column in BOX):
            raise UserError(f"{where}: Target is 0, but the row has a box; expected {', '.join(BOX)} empty.")
        if name in boxes_of and (target == "0" or not boxes_of[name]):
            raise UserError(
                f"{where}: {name} is there twice, not each time with a box; expected one row of Target 0 or "
                "one of Target 1 for each box."
            )
        boxes = boxes_of.setdefault(name, [])
        if target == "1":
            boxes.append(_box(row, where))
    return boxes_of


def _box(row: Mapping[str, str], where: str) -> _Box:
    """Returns a row's box, its edges cut to whole pixels as in MGCA."""
    values = [row[column] for column in BOX]
    if not all(re.fullmatch(r"\d+(\.\d+)?", value) for value in values):
        raise UserError(f"{where}: {', '.join(BOX)} must be numbers of at least 0, got {', '.join(map(repr, values))}.")
    x, y, width, height = map(float, values)
    box = _Box(int(x), int(y), int(x + width), int(y + height))
    if box.x == box.x_end or box.y == box.y_end:
        raise UserError(f"{where}: the box of {row['width']} x {row['height']} pixels is empty.")
    return box


def _draw_boxes(row: Mapping[str, Any], width: int, height: int) -> np.ndarray:
    """Returns the pixels in any of a row's boxes; a box may reach over the image's edge, as in MGCA."""
    is_finding = np.zeros((height, width), dtype=bool)
    for box in row["boxes"]:
        if box.x >= width or box.y >= height:
            raise ValueError(f"a box lies beside the image: it starts at ({box.x}, {box.y}) of {width} x {height}")
        is_finding[box.y : box.y_end, box.x : box.x_end] = True
    return is_finding
