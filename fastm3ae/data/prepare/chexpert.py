"""CheXpert: chest radiographs with 14 findings each, of which the first release hides the test set.

Layout of CheXpert-v1.0 and CheXpert-v1.0-small::

    train.csv, valid.csv    columns Path, Frontal/Lateral, and a column for each finding: 1, 0, -1 (uncertain) or empty
    train/patient00001/study1/view1_frontal.jpg
    valid/patient64541/study1/view1_frontal.jpg

Paths in the tables start with the name of the release's folder.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fastm3ae.data.prepare.common import OnBadImage, PrepareReport, Progress, require_files, require_images
from fastm3ae.data.prepare.labels import draw_val, write_labelled
from fastm3ae.data.prepare.mimic_cxr import CHEXPERT_LABELS
from fastm3ae.data.prepare.tables import read_unique_rows
from fastm3ae.errors import UserError

__all__ = ["prepare_chexpert"]

CLASSES = {
    "competition": ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"),
    "all": CHEXPERT_LABELS,
}
UNCERTAIN_IS_POSITIVE = {"Atelectasis", "Edema", "Pleural Effusion"}
UNCERTAIN = -1
VALUES = {"": 0, "0": 0, "0.0": 0, "1": 1, "1.0": 1, "-1": UNCERTAIN, "-1.0": UNCERTAIN}
VIEWS = ("Frontal", "Lateral")
LAYOUT = "CheXpert-v1.0 or CheXpert-v1.0-small: train.csv, valid.csv, train/ and valid/"


def prepare_chexpert(
    source: Path,
    output: Path,
    *,
    classes: Literal["competition", "all"] = "competition",
    views: Sequence[Literal["Frontal", "Lateral"]] = ("Frontal",),
    num_val: int = 5000,
    val_by: Literal["image", "patient"] = "image",
    seed: int = 0,
    allow_missing: bool = False,
    on_bad_image: OnBadImage = "stop",
    num_workers: int = 0,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes chexpert_{train,val,test}.arrow from CheXpert: one row per radiograph, with its findings as labels.

    The official validation set is the test set, because the official test set came later; the validation set is drawn
    from the training set. An uncertain finding counts as 1 for atelectasis, edema and pleural effusion, and as 0
    otherwise; one that is not mentioned counts as 0.

    Args:
        source: The folder of the release.
        output: Folder of the arrow files.
        classes: competition: the five of CheXpert's competition. all: all 14, in the order of MIMIC-CXR's labels.
        views: Radiographs of which views are taken.
        num_val: Number of images for validation.
        val_by: image: images are drawn, as MGCA does, so that train and val share patients. patient: all images of a
            patient are in the same split, and val has at least ``num_val`` images.
        seed: Seed of the draw.
        allow_missing: Leave out images that are missing, after the draw.
        on_bad_image: What to do about an image that cannot be decoded.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.

    Raises:
        UserError: A file is missing or unreadable, or a row has another value than those of the release.

    Source: MGCA's mgca/preprocess/chexpert.py and mgca/datasets/classification_dataset.py.
    Deviation: MGCA sets 1,000 images aside for retrieval, leaves many of the images that it draws for validation in the
        training set, too, and draws them before it leaves lateral ones out.
    """
    source = Path(source)
    require_files(source, [source / "train.csv", source / "valid.csv"], LAYOUT, [source / "train", source / "valid"])
    if not views:
        raise UserError(f"views must name at least one of {', '.join(VIEWS)}; got none.")
    report = PrepareReport("chexpert", text_name=None)
    names = CLASSES[classes]
    train = _read(source, "train", views, names, report)
    patients = [row["patient"] if val_by == "patient" else row["image_id"] for row in train]
    val = draw_val(patients, num_val, seed)
    for row, patient in zip(train, patients, strict=True):
        row["split"] = "val" if patient in val else "train"
    rows = train + [row | {"split": "test"} for row in _read(source, "valid", views, names, report)]
    present = require_images(source, (row["image_id"] for row in rows), allow_missing, report, "the tables")
    report.notes.append(
        f"val was drawn from train.csv by {val_by} (seed {seed})"
        f"{', as in MGCA, so that train and val share patients' if val_by == 'image' else ''}; test is valid.csv."
    )
    chosen = {"classes": classes, "views": list(views), "num_val": num_val, "val_by": val_by, "seed": seed}
    return write_labelled(
        [row for row in rows if row["image_id"] in present],
        source,
        output,
        report,
        names,
        chosen | {"allow_missing": allow_missing},
        on_bad_image=on_bad_image,
        num_workers=num_workers,
        progress=progress,
    )


def _read(
    source: Path, folder: str, views: Sequence[str], classes: Sequence[str], report: PrepareReport
) -> list[dict[str, Any]]:
    """Returns image, patient and labels of each row of a table whose view is wanted."""
    rows = []
    num_uncertain: Counter[str] = Counter()
    table = source / f"{folder}.csv"
    for where, row in read_unique_rows(table, ("Path", "Frontal/Lateral", *classes)):
        path = re.fullmatch(rf"(?:[^/]+/)?({folder}/(patient\d+)/study\d+/[\w-]+\.\w+)", row["Path"])
        if not path:
            form = f"{folder}/patient00001/study1/view1_frontal.jpg"
            raise UserError(f"{where}: Path must be as CheXpert-v1.0/{form}, got {row['Path']!r}.")
        if row["Frontal/Lateral"] not in VIEWS:
            raise UserError(f"{where}: Frontal/Lateral must be {' or '.join(VIEWS)}, got {row['Frontal/Lateral']!r}.")
        for name in classes:
            if row[name] not in VALUES:
                raise UserError(f"{where}: {name} must be 1, 0, -1 or empty, got {row[name]!r}.")
        if row["Frontal/Lateral"] not in views:
            report.drop(f"{row['Frontal/Lateral'].lower()} image", path[1])
            continue
        values = {name: VALUES[row[name]] for name in classes}
        uncertain = [name for name, value in values.items() if value == UNCERTAIN]
        num_uncertain.update(uncertain)
        labels = values | {name: int(name in UNCERTAIN_IS_POSITIVE) for name in uncertain}
        rows.append({"image_id": path[1], "patient": path[2], "labels": list(labels.values())})
    if num_uncertain:
        counts = ", ".join(
            f"{num_uncertain[name]} x {name} as {int(name in UNCERTAIN_IS_POSITIVE)}"
            for name in classes
            if num_uncertain[name]
        )
        report.notes.append(f"Uncertain findings in {table.name}: {counts}.")
    return rows
