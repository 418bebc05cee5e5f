"""MIMIC-CXR: chest radiographs (MIMIC-CXR-JPG) with their free-text reports (MIMIC-CXR) and CheXpert labels.

Layout of the two releases, each table also without ``.gz``::

    files/p10/p10000032/s50414267/{dicom_id}.jpg
    mimic-cxr-2.0.0-metadata.csv.gz     dicom_id, subject_id, study_id, ViewPosition, ...
    mimic-cxr-2.0.0-split.csv.gz        dicom_id, study_id, subject_id, split (train, validate, test)
    mimic-cxr-2.0.0-chexpert.csv.gz     subject_id, study_id, and 14 labels: 1, 0, -1 (uncertain) or empty (unmentioned)

    mimic-cxr-reports/files/p10/p10000032/s50414267.txt
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fastm3ae.data.arrow import MIMIC_CXR_COLUMNS
from fastm3ae.data.prepare.common import (
    OnBadImage,
    PrepareReport,
    Progress,
    Sample,
    read_lines,
    require_files,
    write_splits,
)
from fastm3ae.data.prepare.reports import (
    SECTIONS,
    Placeholders,
    TextChoice,
    check_sections,
    choose_texts,
    find_sections,
)
from fastm3ae.data.prepare.tables import read_unique_rows
from fastm3ae.data.prepare.workers import map_ahead
from fastm3ae.errors import UserError, nearest

__all__ = ["CHEXPERT_LABELS", "prepare_mimic_cxr"]

LAYOUT = "MIMIC-CXR-JPG: files/ and mimic-cxr-2.0.0-{metadata,split,chexpert}.csv or .csv.gz"
REPORT = "p10/p10000032/s50414267.txt"
CHEXPERT_LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)
"""What the integers of the column ``chexpert`` stand for, in order."""
LABEL_VALUES = {"": 0, "0": 0, "0.0": 0, "-1": 0, "-1.0": 0, "1": 1, "1.0": 1}
SPLIT_NAMES = {"train": "train", "validate": "val", "test": "test"}


class _Image(NamedTuple):
    """An image of the metadata, its file in the release of images, and its report's in that of reports."""

    dicom_id: str
    subject: str
    study: str
    view: str

    @property
    def report(self) -> str:
        return f"p{self.subject[:2]}/p{self.subject}/s{self.study}.txt"

    @property
    def file(self) -> str:
        return f"files/p{self.subject[:2]}/p{self.subject}/s{self.study}/{self.dicom_id}.jpg"


def prepare_mimic_cxr(
    source: Path,
    output: Path,
    *,
    reports: Path | None = None,
    sections: Sequence[str] = ("impression", "findings"),
    views: Sequence[str] = ("PA", "AP"),
    min_words: int = 3,
    placeholders: Placeholders = "keep",
    join: bool = False,
    on_bad_image: OnBadImage = "drop",
    num_workers: int = 0,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes mimic_cxr_{train,val,test}.arrow from MIMIC-CXR-JPG and its reports: one row per frontal image.

    Each image has the texts of its study's report, and the study's 14 CheXpert labels, uncertain and unmentioned as 0.
    The splits are the official ones.

    Args:
        source: The MIMIC-CXR-JPG folder.
        output: Folder of the arrow files.
        reports: Folder of the reports, which holds files/ or p10 to p19. None: mimic-cxr-reports in or next to the
            source, or else the reports lie among the images.
        sections: Sections that become texts, in this order, such as impression, findings, indication, comparison.
        views: Values of the metadata's ViewPosition whose images are taken.
        min_words: Shorter texts are left out.
        placeholders: What becomes of words that de-identification replaced by ___.
        join: Make one text of a report's sections.
        on_bad_image: What to do about an image whose file is missing or cannot be decoded.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.

    Raises:
        UserError: A file of the release is missing, unreadable or damaged, or a patient is in several splits.

    Source: prepro/make_arrow.py, ``make_arrow_mimic_cxr``, for the files. How the original finds the sections is not
        among its code: see ``find_sections``.
    """
    check_sections(sections, SECTIONS)
    source = Path(source)
    tables = {}
    for name in ("metadata", "split", "chexpert"):
        plain = source / f"mimic-cxr-2.0.0-{name}.csv"
        tables[name] = plain if plain.is_file() else plain.with_suffix(".csv.gz")
    require_files(source, tables.values(), LAYOUT)
    if not (source / "files").is_dir():
        raise UserError(f"{source} lacks the folder files; expected {LAYOUT}.")
    folder = _report_folder(source, reports)
    report = PrepareReport("mimic_cxr")
    choice = TextChoice(sections, min_words, placeholders, join)

    def samples() -> Iterator[Sample]:
        images = _read_metadata(tables["metadata"], views)
        splits = _read_splits(tables["split"], images, report)
        labels = _read_labels(tables["chexpert"])
        studies: dict[str, list[_Image]] = {}
        for image in images:
            used = studies.setdefault(image.report, [])
            if image.view not in views:
                report.drop(f"image of view {image.view or '(empty)'}, not {' or '.join(views)}", image.file)
            elif image.dicom_id not in splits:
                report.drop("image without a row in the split table", image.file)
            elif image.study not in labels:
                report.drop("image of a study without a row in the chexpert table", image.file)
            else:
                used.append(image)
        for name in [name for name, used in studies.items() if not used]:
            report.drop("report without a usable image", name)
            del studies[name]
        found = False
        texts_of_reports = map_ahead(_read_report, (folder / name for name in studies))
        for (name, used), text in zip(studies.items(), texts_of_reports, strict=True):
            found = found or text is not None
            if text is None:
                report.drop("the report file is missing", name)
                texts = []
            else:
                texts = choose_texts(find_sections(text), choice, report, name)
            for image in used:
                if texts:
                    yield Sample(splits[image.dicom_id], image.file, texts, {"chexpert": labels[image.study]})
                else:
                    report.drop("image without a usable report", image.file)
        if studies and not found:
            raise UserError(f"There is no report in {folder}; expected {REPORT} and so on; --reports names its folder.")

    return write_splits(
        samples(),
        source,
        output,
        report,
        columns=MIMIC_CXR_COLUMNS,
        on_bad_image=on_bad_image,
        num_workers=num_workers,
        progress=progress,
    )


def _report_folder(source: Path, reports: Path | None) -> Path:
    """Returns the folder that holds p10 to p19 with the reports."""
    if reports is None:
        roots = [source / "mimic-cxr-reports", source.absolute().parent / "mimic-cxr-reports", source]
    else:
        roots = [Path(reports)]
    root = next((root for root in roots if root.is_dir()), None)
    if root is None:
        raise UserError(f"The folder {reports} does not exist; expected the reports: files/{REPORT} and so on.")
    return root / "files" if (root / "files").is_dir() else root


def _read_report(path: Path) -> str | None:
    """Returns a report's text, or None if there is no such file."""
    return "".join(line for _, line in read_lines(path)) if path.is_file() else None


def _read_metadata(table: Path, views: Sequence[str]) -> list[_Image]:
    """Returns all images; at least one must have each view."""
    images = []
    for where, row in read_unique_rows(table, ("dicom_id", "subject_id", "study_id", "ViewPosition")):
        image = _Image(row["dicom_id"], row["subject_id"], row["study_id"], row["ViewPosition"])
        # These become paths.
        for name, value, form in (
            ("dicom_id", image.dicom_id, r"[\w-]+"),
            ("subject_id", image.subject, r"\d+"),
            ("study_id", image.study, r"\d+"),
        ):
            if not re.fullmatch(form, value):
                kind = "digits" if form == r"\d+" else "letters, digits and dashes"
                raise UserError(f"{where}: {name} must be {kind}, got {value!r}.")
        images.append(image)
    known = sorted({image.view for image in images} - {""})
    for view in views:
        if view not in known:
            raise UserError(
                f"{table} has no image of view {view!r}; its views are {', '.join(known)}.{nearest(view, known)}"
            )
    return images


def _read_splits(table: Path, images: Sequence[_Image], report: PrepareReport) -> dict[str, str]:
    """Returns the split of each image by its dicom_id; all images of a patient must be in one split."""
    splits = {}
    for where, row in read_unique_rows(table, ("dicom_id", "split")):
        if row["split"] not in SPLIT_NAMES:
            raise UserError(f"{where}: split must be one of {', '.join(SPLIT_NAMES)}, got {row['split']!r}.")
        splits[row["dicom_id"]] = SPLIT_NAMES[row["split"]]
    first_of: dict[str, _Image] = {}
    for image in images:
        if image.dicom_id in splits:
            first = first_of.setdefault(image.subject, image)
            if splits[first.dicom_id] != splits[image.dicom_id]:
                raise UserError(
                    f"{table} puts patient {image.subject} into {splits[first.dicom_id]} (image {first.dicom_id}) and "
                    f"{splits[image.dicom_id]} (image {image.dicom_id}); expected all images of a patient in one split."
                )
    known = {image.dicom_id for image in images}
    for dicom_id in splits:
        if dicom_id not in known:
            report.drop("row of the split table for an image that the metadata lack", dicom_id)
    return splits


def _read_labels(table: Path) -> dict[str, list[int]]:
    """Returns the labels of each study."""
    labels = {}
    for where, row in read_unique_rows(table, ("study_id", *CHEXPERT_LABELS)):
        for name in CHEXPERT_LABELS:
            if row[name] not in LABEL_VALUES:
                raise UserError(f"{where}: {name} must be 1, 0, -1 or empty, got {row[name]!r}.")
        labels[row["study_id"]] = [LABEL_VALUES[row[name]] for name in CHEXPERT_LABELS]
    return labels
