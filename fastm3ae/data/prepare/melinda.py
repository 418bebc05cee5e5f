"""MELINDA: figures of biomedical articles with their captions, and the experiments' methods as classes, in four ways.

Layout::

    train.csv, dev.csv, test.csv    columns figure_file, caption, i_meth, p_meth, i_meth_label, p_meth_label
    melinda_images/{figure_file}
"""

import re
from pathlib import Path
from typing import Any

from fastm3ae.data.arrow import MELINDA_COLUMNS
from fastm3ae.data.prepare.common import (
    OnBadImage,
    PrepareReport,
    Progress,
    require_files,
    require_images,
    write_rows,
)
from fastm3ae.data.prepare.tables import read_csv, require_columns
from fastm3ae.errors import UserError

__all__ = ["prepare_melinda"]

FILES = {"train": "train.csv", "val": "dev.csv", "test": "test.csv"}
CLASSES = ("i_meth", "p_meth", "i_meth_label", "p_meth_label")
IMAGES = "melinda_images"
LAYOUT = f"MELINDA: train.csv, dev.csv, test.csv and {IMAGES}/"


def prepare_melinda(
    source: Path,
    output: Path,
    *,
    allow_missing: bool = False,
    on_bad_image: OnBadImage = "stop",
    num_workers: int = 0,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes cls_melinda_{train,val,test}.arrow from MELINDA: one row per figure, with its captions and their classes.

    The splits are the official ones; a figure that several of them name goes into the last, with all its captions, as
    in the original. The classes are the sorted values of each column over all splits.

    Args:
        source: The folder, or one that holds it as melinda.
        output: Folder of the arrow files.
        allow_missing: Leave out the captions of figures that are missing.
        on_bad_image: What to do about a figure that cannot be decoded.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.

    Raises:
        UserError: A file is missing or unreadable, or a row lacks its figure or a class.

    Source: prepro/prepro_finetuning_data.py, ``prepro_cls_melinda``, and prepro/make_arrow.py, ``make_arrow_melinda``.
    """
    source = Path(source)
    root = next((folder for folder in (source, source / "melinda") if (folder / FILES["train"]).is_file()), source)
    require_files(source, [root / name for name in FILES.values()], LAYOUT)
    report = PrepareReport("cls_melinda", "caption")
    rows: dict[str, dict[str, Any]] = {}
    for split, name in FILES.items():
        for image, caption, values in _read(root / name, report):
            row = rows.setdefault(image, {column: [] for column in ("caption", *CLASSES)} | {"image_id": image})
            if row.get("split", split) != split:
                report.moved.append(image)
            row["split"] = split
            row["caption"].append(caption)
            for column in CLASSES:
                row[column].append(values[column])
    classes = {column: _sorted({value for row in rows.values() for value in row[column]}) for column in CLASSES}
    for column, names in classes.items():
        label_of = {name: label for label, name in enumerate(names)}
        for row in rows.values():
            row[column] = [label_of[value] for value in row[column]]
    present = require_images(root, rows, allow_missing, report, "the tables")
    counts = ", ".join(f"{len(names)} {column}" for column, names in classes.items())
    report.notes.append(f"The classes are the values in train, val and test, as in the original: {counts}.")
    return write_rows(
        [row for image, row in rows.items() if image in present],
        root,
        output,
        report,
        columns=MELINDA_COLUMNS,
        on_bad_image=on_bad_image,
        num_workers=num_workers,
        progress=progress,
        facts={"options": {"allow_missing": allow_missing, "on_bad_image": on_bad_image}, "classes": classes},
    )


def _read(table: Path, report: PrepareReport) -> list[tuple[str, str, dict[str, str]]]:
    """Returns image, caption and classes of each row that has a caption."""
    names, rows = read_csv(table)
    require_columns(table, names, ("figure_file", "caption", *CLASSES))
    found = []
    for number, row in rows:
        where = f"{table}, line {number}"
        for column in ("figure_file", *CLASSES):
            if not row[column].strip():
                raise UserError(f"{where}: {column} is empty; expected a value.")
        if row["caption"].strip():
            found.append((f"{IMAGES}/{row['figure_file']}", row["caption"], row))
        else:
            report.drop("row without a caption", where)
    return found


def _sorted(values: set[str]) -> list[str]:
    """Returns the values in order: of numbers where all are numbers, which is how pandas reads such a column."""
    are_numbers = all(re.fullmatch(r"[+-]?\d+(\.\d+)?", value) for value in values)
    return sorted(values, key=float) if are_numbers else sorted(values)
