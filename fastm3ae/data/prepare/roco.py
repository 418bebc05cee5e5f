"""ROCO: radiology figures of PubMed Central with their captions, and the texts that refer to them (from MediCaT).

Layout of the release, with ``validation`` also for ``val``::

    {train,val,test}/radiology/captions.txt     ROCO id <tab> caption
    {train,val,test}/radiology/dlinks.txt       ROCO id <tab> download command with the PMC id <tab> figure's file name
    {train,val,test}/radiology/images/{ROCO id}.jpg

and of the references, next to the ROCO folder: ``medicat/net/nfs2.corp/allennlp/sanjays/roco_files/
roco_{train,val,test}_references.jsonl``, whose ``roco_image_id`` is the PMC id, an underscore and the figure's name.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from fastm3ae.data.prepare.common import (
    SPLITS,
    OnBadImage,
    PrepareReport,
    Progress,
    Sample,
    keep_texts,
    read_json_lines,
    read_lines,
    require_files,
    write_splits,
)

__all__ = ["find_roco", "parse_caption", "prepare_roco"]

LAYOUT = "a ROCO release: {train,val,test}/radiology/captions.txt and images/ beside it"
REFERENCES = Path("medicat/net/nfs2.corp/allennlp/sanjays/roco_files")
# ROCO id, "wget -r ftp://.../{PMC id}.tar.gz -P ...", file name of the figure.
DLINK = re.compile(r"([^\t]+)\t[^ \t]+ [^ \t]+ (?:[^ \t]*/)?([^/. \t]+)[^\t]*\t(.+)")


def prepare_roco(
    source: Path,
    output: Path,
    *,
    references: Path | None = None,
    min_words: int = 3,
    on_bad_image: OnBadImage = "drop",
    num_workers: int = 0,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes roco_{train,val,test}.arrow from a ROCO release: of each image, texts that refer to it, then its caption.

    Args:
        source: The ROCO folder, or a folder that holds it as roco or data.
        output: Folder of the arrow files.
        references: Folder of the files roco_{split}_references.jsonl. None: where MediCaT's release has them, next
            to the ROCO folder; if they are not there, captions are the only texts.
        min_words: Shorter texts are left out.
        on_bad_image: What to do about an image whose file is missing or cannot be decoded.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.

    Raises:
        UserError: A file of the release is missing or unreadable.

    Source: prepro/prepro_pretraining_data.py, ``prepro_roco``.
    """
    root, folders = find_roco(Path(source))
    report = PrepareReport("roco")
    reference_folder = Path(references) if references else Path(os.path.abspath(root)).parent / REFERENCES
    if references or reference_folder.is_dir():
        files = {split: reference_folder / f"roco_{split}_references.jsonl" for split in SPLITS}
        require_files(reference_folder, files.values(), "MediCaT's roco_{train,val,test}_references.jsonl")
        links = [folder / "dlinks.txt" for folder in folders.values()]
        require_files(root, links, f"{LAYOUT}, with dlinks.txt, which joins MediCaT's references to ROCO's images")
    else:
        files = {}
        report.notes.append(f"Captions are the only texts: there are no MediCaT references in {reference_folder}.")

    def samples() -> Iterator[Sample]:
        ids = _ids_of_figures(folders, report) if files else {}
        for split, folder in folders.items():
            images = (folder / "images").relative_to(root).as_posix()
            for number, record in read_json_lines(files[split]) if files else ():
                where = f"{files[split].name} line {number}"
                roco_id = ids.get(record.get("roco_image_id", ""))
                if roco_id is None:
                    report.drop("references to a figure that no dlinks.txt names", where)
                elif texts := keep_texts(record.get("gorc_references") or [], min_words, report, where):
                    yield Sample(split, f"{images}/{roco_id}.jpg", texts)
            for number, line in read_lines(folder / "captions.txt"):
                where = f"{split} captions.txt line {number}"
                if caption := parse_caption(line, report, where):
                    roco_id, text = caption
                    if texts := keep_texts([text], min_words, report, where):
                        yield Sample(split, f"{images}/{roco_id}.jpg", texts)

    return write_splits(
        samples(), root, output, report, on_bad_image=on_bad_image, num_workers=num_workers, progress=progress
    )


def find_roco(source: Path) -> tuple[Path, dict[str, Path]]:
    """Returns the ROCO folder and, per split, its radiology folder.

    Raises:
        UserError: A captions.txt or an image folder is missing.
    """
    candidates = [source, source / "roco", source / "data"]
    root = next((folder for folder in candidates if any(folder.glob("*/radiology"))), source)
    names = {split: split for split in SPLITS}
    if not (root / "val").is_dir() and (root / "validation").is_dir():
        names["val"] = "validation"
    folders = {split: root / name / "radiology" for split, name in names.items()}
    require_files(source, [folder / "captions.txt" for folder in folders.values()], LAYOUT)
    return root, folders


def parse_caption(line: str, report: PrepareReport, where: str) -> tuple[str, str] | None:
    """Returns the ROCO id and the caption of a line of captions.txt, or reports why it has none."""
    fields = line.strip().split("\t")
    if len(fields) == 2:
        return fields[0], fields[1]
    if line.strip():
        report.drop("line without an id and one caption, separated by one tab", where)
    return None


def _ids_of_figures(folders: dict[str, Path], report: PrepareReport) -> dict[str, str]:
    """Returns the ROCO id of each figure, which MediCaT names {PMC id}_{file name}."""
    ids = {}
    for split, folder in folders.items():
        for number, line in read_lines(folder / "dlinks.txt"):
            if match := DLINK.fullmatch(line.strip()):
                roco_id, pmc_id, figure = match.groups()
                ids[f"{pmc_id}_{figure}"] = roco_id
            elif line.strip():
                reason = "line without a ROCO id, a download command and a file name"
                report.drop(reason, f"{split} dlinks.txt line {number}")
    return ids
