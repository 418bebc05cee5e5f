"""Images with labels and without texts: how their splits are drawn, and how they and their masks are written."""

import functools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from fastm3ae.data.arrow import IMAGE_LABEL_COLUMNS, PATIENT_COLUMN, SEGMENTATION_COLUMNS
from fastm3ae.data.decode import encode_png
from fastm3ae.data.dicom import Window, decode_dicom
from fastm3ae.data.prepare.common import OnBadImage, PrepareReport, Progress, write_rows
from fastm3ae.data.prepare.encode import Encoded, keep_bytes
from fastm3ae.errors import UserError

__all__ = ["DrawMask", "draw_as_mgca", "draw_val", "report_unnamed", "write_labelled"]

DrawMask = Callable[[Mapping[str, Any], int, int], np.ndarray]
"""Returns the pixels that belong to a row's finding, boolean (height, width), from the row, the width and the height.

Raises a ValueError, whose message is a part of a sentence, if they do not fit the image.
"""


def draw_val(groups: Sequence[str], num_images: int, seed: int) -> set[str]:
    """Returns groups, drawn at random, that together have ``num_images`` images, or as few more as possible.

    Args:
        groups: The group of each image: what is kept together, such as a patient.
        num_images: At least so many images are drawn.
        seed: Seed of the draw.

    Raises:
        UserError: The number is negative, or no image would be left to train on.
    """
    sizes = Counter(groups)
    order = list(sizes)
    random.Random(seed).shuffle(order)
    drawn: set[str] = set()
    num_drawn = 0
    while num_drawn < num_images and order:
        group = order.pop()
        drawn.add(group)
        num_drawn += sizes[group]
    if num_images < 0 or not order:
        raise UserError(
            f"The validation split must have at least 0 images and leave some to train on; got {num_images} of "
            f"{len(groups)} images ({len(sizes)} groups that are kept together)."
        )
    return drawn


def draw_as_mgca(images: Iterable[str], seed: int) -> dict[str, str]:
    """Returns the split of each image: 70 % train, 15 % val, 15 % test, the same as MGCA's for the same images.

    Args:
        images: Images by name, in any order.
        seed: Seed of the draw; MGCA's is 0.

    Raises:
        UserError: The seed is none that numpy takes.

    Source: MGCA's mgca/preprocess/rsna.py: scikit-learn's ``train_test_split`` of the sorted names, and again of its
    test part.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"The seed must be at least 0 and less than 2**32, got {seed}.")
    held_out, train = _cut(np.array(sorted(images)), 0.3, seed)
    val, test = _cut(held_out, 0.5, seed)
    return {str(image): split for split, part in (("train", train), ("val", val), ("test", test)) for image in part}


def _cut(items: np.ndarray, frac: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a fraction of the items, rounded up, and the others, both in random order."""
    order = np.random.RandomState(seed).permutation(len(items))
    num_first = math.ceil(frac * len(items))
    return items[order[:num_first]], items[order[num_first:]]


def report_unnamed(files: Iterable[str], named: Iterable[str], namer: str, report: PrepareReport) -> None:
    """Reports image files that a data set's table does not name."""
    known = set(named)
    for file in files:
        if file not in known:
            report.drop(f"image that {namer} does not name", file)


def write_labelled(
    rows: Sequence[Mapping[str, Any]],
    root: Path,
    output: Path,
    report: PrepareReport,
    classes: Sequence[str],
    options: Mapping[str, Any],
    *,
    on_bad_image: OnBadImage,
    num_workers: int,
    progress: Progress | None,
    draw_mask: DrawMask | None = None,
    window: Window | Literal["max"] = "max",
) -> PrepareReport:
    """Writes ``{report.name}_{split}.arrow`` for each split, and completes the report.

    Without masks, images are stored as they lie in their files. With masks, the files are DICOM files, and images and
    masks are stored as PNGs.

    Args:
        rows: ``image_id``, ``split`` and ``labels`` (one 0 or 1 for every class) of each image, ``patient`` where that
            is known, and what ``draw_mask`` needs.
        root: Folder from which the image ids start.
        output: Folder of the arrow files.
        report: Names the data set.
        classes: Names of the classes, in the order of the labels.
        options: What was chosen; the files will name it, with ``on_bad_image``.
        on_bad_image: What to do about an image that cannot be decoded.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.
        draw_mask: Draws the mask of an image, and can be pickled; None: there are no masks.
        window: Which values of DICOM files become black and white (``decode_dicom``).

    Raises:
        UserError: As ``write_rows``.
    """
    columns = IMAGE_LABEL_COLUMNS if draw_mask is None else SEGMENTATION_COLUMNS
    return write_rows(
        rows,
        root,
        output,
        report,
        columns=columns | (PATIENT_COLUMN if rows and "patient" in rows[0] else {}),
        on_bad_image=on_bad_image,
        num_workers=num_workers,
        progress=progress,
        facts={"options": {**options, "on_bad_image": on_bad_image}, "classes": {"labels": list(classes)}},
        kinds_of=lambda row: dict(zip(classes, row["labels"], strict=True)),
        encode=keep_bytes if draw_mask is None else functools.partial(_encode, draw_mask=draw_mask, window=window),
    )


def _encode(data: bytes, row: Mapping[str, Any], *, draw_mask: DrawMask, window: Window | Literal["max"]) -> Encoded:
    """Returns the PNGs of a DICOM file's image and of its mask."""
    image = decode_dicom(data, window)
    mask = Image.fromarray(draw_mask(row, image.width, image.height).astype(np.uint8) * 255)
    return Encoded({"image": encode_png(image), "mask": encode_png(mask)}, image)
