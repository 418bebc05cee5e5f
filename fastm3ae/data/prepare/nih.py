"""NIH ChestX-ray14: chest radiographs with 14 findings, read out of their reports by a program.

Layout, as the archives unpack and in the copy on Kaggle::

    Data_Entry_2017.csv or Data_Entry_2017_v2020.csv    columns Image Index, Finding Labels (a|b), Patient ID, ...
    train_val_list.txt, test_list.txt                   an image's name in each line
    images/00000001_000.png                             or images_001/images/ to images_012/images/
"""

import math
import re
from pathlib import Path
from typing import Any

from fastm3ae.data.prepare.common import OnBadImage, PrepareReport, Progress, read_lines, require_files, require_images
from fastm3ae.data.prepare.labels import draw_val, report_unnamed, write_labelled
from fastm3ae.data.prepare.tables import read_unique_rows
from fastm3ae.errors import UserError, nearest

__all__ = ["prepare_nih"]

CLASSES = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
NONE = "No Finding"
TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
LAYOUT = (
    f"ChestX-ray14: {' or '.join(TABLES)}, {', '.join(LISTS.values())}, and images/ or images_001/images/ to "
    "images_012/images/"
)


def prepare_nih(
    source: Path,
    output: Path,
    *,
    val_frac: float = 0.1,
    seed: int = 0,
    allow_missing: bool = False,
    on_bad_image: OnBadImage = "stop",
    num_workers: int = 0,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes nih_{train,val,test}.arrow from ChestX-ray14: one row per radiograph, with its 14 findings as labels.

    The test set is the official one; the validation set is drawn by patient from the official train_val_list.txt. An
    image with no finding has 14 zeros.

    Args:
        source: The folder of the release.
        output: Folder of the arrow files.
        val_frac: Fraction of the images of train_val_list.txt for validation, or a little more, because all images of
            a patient are in the same split.
        seed: Seed of the draw.
        allow_missing: Leave out images that are missing, after the draw.
        on_bad_image: What to do about an image that cannot be decoded.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.

    Raises:
        UserError: A file is missing or unreadable, a finding is unknown, or the lists do not fit the table.
    """
    source = Path(source)
    table = next((source / name for name in TABLES if (source / name).is_file()), source / TABLES[0])
    require_files(source, [table, *(source / name for name in LISTS.values())], LAYOUT)
    files = _image_files(source)
    if not 0 <= val_frac < 1:
        raise UserError(f"val_frac must be at least 0 and less than 1, got {val_frac}.")
    report = PrepareReport("nih", text_name=None)
    rows = _read(table, files)
    report_unnamed(files, rows, table.name, report)
    split_of = _read_lists(source, rows, table)
    for name in [name for name in rows if name not in split_of]:
        report.drop(f"image that neither {' nor '.join(LISTS.values())} names", name)
        del rows[name]
    patients = [row["patient"] for name, row in rows.items() if split_of[name] == "train"]
    val = draw_val(patients, math.ceil(val_frac * len(patients)), seed)
    for name, row in rows.items():
        row["split"] = "val" if split_of[name] == "train" and row["patient"] in val else split_of[name]
    images = [row["image_id"] for row in rows.values()]
    present = require_images(source, images, allow_missing, report, "the lists")
    report.notes.append(f"val was drawn from {LISTS['train']} by patient (seed {seed}); test is {LISTS['test']}.")
    return write_labelled(
        [row for row in rows.values() if row["image_id"] in present],
        source,
        output,
        report,
        CLASSES,
        {"val_frac": val_frac, "seed": seed, "allow_missing": allow_missing},
        on_bad_image=on_bad_image,
        num_workers=num_workers,
        progress=progress,
    )


def _image_files(source: Path) -> dict[str, str]:
    """Returns the path of each image by its name, from the source."""
    folders = [source / "images"] if (source / "images").is_dir() else sorted(source.glob("images_*/images"))
    if not folders:
        raise UserError(f"{source} has neither the folder images nor images_001/images; expected {LAYOUT}.")
    return {
        path.name: path.relative_to(source).as_posix() for folder in folders for path in sorted(folder.glob("*.png"))
    }


def _read(table: Path, files: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Returns image, patient and labels of each row, by the image's name."""
    rows = {}
    for where, row in read_unique_rows(table, ("Image Index", "Finding Labels", "Patient ID")):
        name = row["Image Index"]
        if not re.fullmatch(r"[\w-]+\.png", name):
            raise UserError(f"{where}: Image Index must be as 00000001_000.png, got {name!r}.")
        if not row["Patient ID"].strip():
            raise UserError(f"{where}: Patient ID is empty; expected a number.")
        findings = row["Finding Labels"].split("|")
        for finding in findings:
            if finding not in (*CLASSES, NONE):
                raise UserError(
                    f"{where}: Finding Labels must be {NONE} or of {', '.join(CLASSES)}, joined by |, got "
                    f"{row['Finding Labels']!r}.{nearest(finding, CLASSES)}"
                )
        if NONE in findings and len(findings) > 1:
            raise UserError(f"{where}: Finding Labels has {NONE} beside findings: {row['Finding Labels']!r}.")
        rows[name] = {
            "image_id": files.get(name, f"images/{name}"),
            "patient": row["Patient ID"].strip(),
            "labels": [int(finding in findings) for finding in CLASSES],
        }
    return rows


def _read_lists(source: Path, rows: dict[str, dict[str, Any]], table: Path) -> dict[str, str]:
    """Returns train or test for each image of the two lists, by its name."""
    split_of: dict[str, str] = {}
    for split, file in LISTS.items():
        for number, line in read_lines(source / file):
            name = line.strip()
            if not name:
                continue
            if name not in rows:
                raise UserError(f"{source / file}, line {number}: {name!r} has no row in {table}.")
            if name in split_of:
                other = f", as {LISTS[split_of[name]]} does" if split_of[name] != split else " twice"
                raise UserError(f"{source / file}, line {number} names {name}{other}; expected it in one line.")
            split_of[name] = split
    return split_of
