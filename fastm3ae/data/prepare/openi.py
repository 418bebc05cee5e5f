"""Open-i: the chest radiographs of Indiana University (IU X-ray), with their reports in XML.

Layout of the two archives, unpacked::

    ecgen-radiology/1.xml               <eCitation> with <AbstractText Label="FINDINGS"> and
                                        <parentImage id="CXR1_1_IM-0001-3001"> for each image
    NLMCXR_png/CXR1_1_IM-0001-3001.png

Nothing in the XML says which image is frontal and which lateral (the numbers at an image's end do not), nor who the
patient is.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fastm3ae.data.prepare.common import (
    OnBadImage,
    PrepareReport,
    Progress,
    Sample,
    draw_splits,
    write_splits,
)
from fastm3ae.data.prepare.reports import Placeholders, Section, TextChoice, check_sections, choose_texts, read_xml
from fastm3ae.data.prepare.tables import read_csv, require_columns
from fastm3ae.errors import UserError, nearest

__all__ = ["prepare_openi"]

SECTIONS = ("impression", "findings", "indication", "comparison")
LAYOUT = "NLMCXR_reports with ecgen-radiology/*.xml, and NLMCXR_png with *.png"


class _Report(NamedTuple):
    """A report's file name, sections, and image ids."""

    name: str
    sections: list[Section]
    images: list[str]


def prepare_openi(
    source: Path,
    output: Path,
    *,
    reports: Path | None = None,
    images: Path | None = None,
    projections: Path | None = None,
    views: Sequence[str] = ("Frontal",),
    sections: Sequence[str] = ("impression", "findings"),
    val_frac: float = 0.1,
    test_frac: float = 0.2,
    seed: int = 0,
    min_words: int = 3,
    placeholders: Placeholders = "keep",
    join: bool = False,
    on_bad_image: OnBadImage = "drop",
    num_workers: int = 0,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes openi_{train,val,test}.arrow from the Indiana University chest X-rays of Open-i: XML reports and PNGs.

    There are no official splits: the reports are drawn at random, 7 : 1 : 2 as is usual for this data set, and all
    images of a report go into its split.

    Args:
        source: The folder with the unpacked archives.
        output: Folder of the arrow files.
        reports: Folder of the XML reports. None: where ecgen-radiology is in the source.
        images: Folder of the images. None: NLMCXR_png in the source, or else the source.
        projections: CSV file with the columns filename and projection, such as indiana_projections.csv of the copy on
            Kaggle. None: images of all projections are taken, because the reports do not say which they are.
        views: Projections whose images are taken, if there is such a file.
        sections: Sections that become texts, in this order: impression, findings, indication, comparison.
        val_frac: Fraction of the reports for validation, before the images are checked.
        test_frac: Fraction of the reports for testing, likewise.
        seed: Seed of the draw.
        min_words: Shorter texts are left out.
        placeholders: What becomes of words that de-identification replaced by XXXX.
        join: Make one text of a report's sections.
        on_bad_image: What to do about an image that cannot be decoded.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.

    Raises:
        UserError: A folder is missing, a report is no such XML or names an image of another, or the projections cannot
            be read.
    """
    check_sections(sections, SECTIONS)
    source = Path(source)
    report_folder, image_folder = _folders(source, reports, images)
    report = PrepareReport("openi")
    files = _image_files(image_folder)
    view_of = _read_projections(Path(projections), views) if projections else None
    choice = TextChoice(sections, min_words, placeholders, join)
    texts_of: dict[str, list[str]] = {}
    images_of: dict[str, list[str]] = {}
    named = {}
    for found in _read_reports(report_folder):
        for image in found.images:
            if image in named:
                raise UserError(
                    f"{report_folder / found.name} names the image {image}, as {named[image]} does; expected one "
                    "report for an image."
                )
            named[image] = found.name
        if not found.images:
            report.drop("report that names no image", found.name)
            continue
        used = _usable_images(found, files, view_of, views, report)
        if not used:
            report.drop("report without a usable image", found.name)
        elif texts := choose_texts(found.sections, choice, report, found.name):
            texts_of[found.name], images_of[found.name] = texts, used
        else:
            for file in used:
                report.drop("image without a usable report", file)
    for image, file in files.items():
        if image not in named:
            report.drop("image that no report names", file)
    for image in view_of or ():
        if image not in named:
            report.drop("row of the projections for an image that no report names", image)
    split_of = draw_splits(texts_of, val_frac, test_frac, seed, report)
    samples = (Sample(split_of[name], image, texts) for name, texts in texts_of.items() for image in images_of[name])
    return write_splits(
        samples, image_folder, output, report, on_bad_image=on_bad_image, num_workers=num_workers, progress=progress
    )


def _usable_images(
    found: _Report,
    files: Mapping[str, str],
    view_of: Mapping[str, str] | None,
    views: Sequence[str],
    report: PrepareReport,
) -> list[str]:
    """Returns the file names of a report's images that can be used, and reports why others cannot."""
    used = []
    for image in found.images:
        if image not in files:
            report.drop("the image file is missing", f"{image}, of {found.name}")
        elif view_of is not None and image not in view_of:
            report.drop("image without a row in the projections", files[image])
        elif view_of is not None and view_of[image] not in views:
            report.drop(f"image of projection {view_of[image]}, not {' or '.join(views)}", files[image])
        else:
            used.append(files[image])
    return used


def _folders(source: Path, reports: Path | None, images: Path | None) -> tuple[Path, Path]:
    """Returns the folder of the XML files and that of the images."""
    if not source.is_dir():
        raise UserError(f"The folder {source} does not exist; expected {LAYOUT}.")
    report_roots = [Path(reports)] if reports else [source / "NLMCXR_reports", source]
    report_folders = [folder for root in report_roots for folder in (root / "ecgen-radiology", root)]
    image_folders = [Path(images)] if images else [source / "NLMCXR_png", source]
    report_folder = next((folder for folder in report_folders if any(folder.glob("*.xml"))), None)
    image_folder = next((folder for folder in image_folders if any(folder.glob("*.png"))), None)
    if report_folder is None:
        raise UserError(f"There is no .xml file in {_listed(report_folders)}; expected {LAYOUT}.")
    if image_folder is None:
        raise UserError(f"There is no .png file in {_listed(image_folders)}; expected {LAYOUT}.")
    return report_folder, image_folder


def _listed(folders: Sequence[Path]) -> str:
    return " or ".join(map(str, folders))


def _image_id(name: str) -> str:
    """Returns an image's id from what it is called in reports, files and projections.

    "CXR1_1_IM-0001-3001" is "1_IM-0001-3001.dcm.png" in the copy on Kaggle; other ids have the report's number once.
    """
    stem = re.sub(r"(\.dcm)?(\.png)?$", "", name).removeprefix("CXR")
    return "CXR" + re.sub(r"^(\d+)_(?=\1_)", "", stem)


def _image_files(folder: Path) -> dict[str, str]:
    """Returns the name of each PNG file, in order, by the image it holds."""
    files: dict[str, str] = {}
    for file in sorted(path.name for path in folder.glob("*.png")):
        other = files.setdefault(_image_id(file), file)
        if other != file:
            raise UserError(f"{folder} holds the same image as {other} and as {file}; expected one of them.")
    return files


def _read_reports(folder: Path) -> Iterator[_Report]:
    """Yields each report, in the order of their numbers."""
    for path in sorted(folder.glob("*.xml"), key=lambda path: (len(path.stem), path.stem)):
        root = read_xml(path)
        if root.tag != "eCitation":
            raise UserError(f"{path} is no report of Open-i: it is a <{root.tag}>, expected an <eCitation>.")
        sections = [
            Section((text.get("Label", "").strip().lower(),), "".join(text.itertext()))
            for text in root.iter("AbstractText")
        ]
        images = [image.get("id", "") for image in root.iter("parentImage")]
        if "" in images:
            raise UserError(f"{path} has a <parentImage> without an id; expected one such as CXR1_1_IM-0001-3001.")
        yield _Report(path.name, sections, [_image_id(image) for image in images])


def _read_projections(table: Path, views: Sequence[str]) -> dict[str, str]:
    """Returns the projection of each image; at least one image must have each of the views."""
    names, rows = read_csv(table)
    require_columns(table, names, ("filename", "projection"))
    view_of: dict[str, str] = {}
    for number, row in rows:
        image = _image_id(row["filename"])
        if image in view_of:
            raise UserError(f"{table}, line {number}: {row['filename']} is there twice; expected one row each.")
        view_of[image] = row["projection"]
    known = sorted(set(view_of.values()))
    for view in views:
        if view not in known:
            raise UserError(
                f"{table} has no image of projection {view!r}; its projections are {', '.join(known)}."
                f"{nearest(view, known)}"
            )
    return view_of
