"""Your own folder of images with their texts beside them."""

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fastm3ae.data.nifti import is_nifti
from fastm3ae.data.prepare.common import PrepareReport, Progress, keep_texts
from fastm3ae.data.prepare.own_data import SPLIT_NAMES, Item, OwnDataOptions, data_set_name, usable_header, write_items
from fastm3ae.data.prepare.own_images import DICOM_SUFFIXES, IMAGE_SUFFIXES, is_dicom_file
from fastm3ae.data.prepare.own_texts import TEXT_SUFFIXES, read_headers, texts_beside
from fastm3ae.errors import UserError

__all__ = ["prepare_folder"]


def prepare_folder(
    source: Path,
    output: Path,
    *,
    text_keys: Sequence[str] = ("caption", "captions", "text", "texts", "report"),
    text_root: Path | None = None,
    group_tag: str | None = None,
    further: OwnDataOptions = OwnDataOptions(),  # noqa: B008, it is immutable
    name: str | None = None,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes {name}_{train,val,test}.arrow from a folder of images with their texts beside them.

    The texts of x.png (or x.dcm, x.nii.gz) are the whole of x.txt, those in x.json (a string, a list of strings, or an
    object with such values) and those in x.xml. DICOM files are found whatever they are called. Folders train, val and
    test (or training, valid, validation, dev, ...) right under the source are the splits; without them the splits are
    drawn at random.

    Args:
        source: The folder; it is searched with all folders below it.
        output: Folder of the arrow files.
        text_keys: Keys of texts in a JSON object, or elements in XML by name (or by their attribute name or label), in
            this order.
        text_root: Folder of the text files, in the images' folders and under their names. None: the images' own.
        group_tag: Field of DICOM headers, such as PatientID, whose equal values a random split keeps together; it is
            not stored.
        further: What becomes of the images and the texts, and how splits are drawn.
        name: Name of the data set. None: the folder's name.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.

    Raises:
        UserError: The folder does not exist or holds no image, or a text file cannot be read.
    """
    source, text_root = Path(source), Path(text_root or source)
    for folder in (source, text_root):
        if not folder.is_dir():
            raise UserError(f"The folder {folder} does not exist.")
    report = PrepareReport(data_set_name(name or source.resolve().name))
    items = _folder_items(source, text_root, text_keys, group_tag, further, report)
    return write_items(items, source, output, report, further, num_workers, progress)


def _folder_items(
    source: Path,
    text_root: Path,
    text_keys: Sequence[str],
    group_tag: str | None,
    options: OwnDataOptions,
    report: PrepareReport,
) -> list[Item]:
    """Returns the images below a folder that have texts, in the order of their paths."""
    files = _files(source)
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES or is_nifti(path.name)]
    images = sorted({*images, *(path for path in files if _may_be_dicom(path) and is_dicom_file(source / path))})
    if not images:
        found = Counter(path.suffix for path in files if path.suffix)
        others = f"; it holds {', '.join(f'{n} x {suffix}' for suffix, n in found.most_common(5))}" if found else ""
        known = ", ".join((*IMAGE_SUFFIXES, *DICOM_SUFFIXES, ".nii", ".nii.gz"))
        raise UserError(f"{source} holds no image ({known}){others}.")
    has_splits = any(_top_split(path) for path in images)
    headers = read_headers(source, map(Path.as_posix, images), options.text_tags, group_tag)
    items = []
    for path in images:
        image = path.as_posix()
        if has_splits and not _top_split(path):
            report.drop("image outside of the split folders", image)
            continue
        if (header := usable_header(headers, image, source, options, report)) is None:
            continue
        texts = texts_beside(text_root / _stem(path), text_keys) + header.texts
        if not texts:
            report.drop(f"image without a text in a {_listed(TEXT_SUFFIXES)} file beside it", image)
        elif texts := keep_texts(texts, options.min_words, report, image, join=options.join):
            items.append(Item(image, texts, _top_split(path), header.group or None))
    stems = {_stem(path) for path in images}
    for path in files if text_root == source else _files(text_root):
        if path.suffix in TEXT_SUFFIXES and path.with_suffix("") not in stems:
            report.drop("text file without an image beside it", path.as_posix())
    return items


def _files(folder: Path) -> list[Path]:
    """Returns all files below a folder; links are followed, hidden files passed over."""
    return sorted(map(Path, glob.glob("**/*", root_dir=folder, recursive=True)))


def _may_be_dicom(path: Path) -> bool:
    return path.suffix.lower() not in (*IMAGE_SUFFIXES, *TEXT_SUFFIXES, ".csv", ".jsonl", ".tsv")


def _stem(image: Path) -> Path:
    """Returns an image's path without its suffix; what follows a dot in other names is a part of the name."""
    if is_nifti(image.name):
        return image.with_name(image.name[: -len(".nii.gz" if image.name.lower().endswith(".gz") else ".nii")])
    return image.with_suffix("") if image.suffix.lower() in (*IMAGE_SUFFIXES, *DICOM_SUFFIXES) else image


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _top_split(path: Path) -> str | None:
    return SPLIT_NAMES.get(path.parts[0].lower()) if len(path.parts) > 1 else None
