"""MediCaT: figures of open-access medical articles with their captions and the texts that refer to them.

Layout of the release::

    release/s2_full_figures_oa_nonroco_combined_medical_top4_public.jsonl
    release/figures/{pdf_hash}_{fig_uri}
"""

import random
from collections.abc import Iterator
from pathlib import Path

from fastm3ae.data.prepare.common import (
    OnBadImage,
    PrepareReport,
    Progress,
    Sample,
    keep_texts,
    read_json_lines,
    require_files,
    write_splits,
)
from fastm3ae.errors import UserError

__all__ = ["prepare_medicat"]

FIGURES = Path("release/s2_full_figures_oa_nonroco_combined_medical_top4_public.jsonl")


def prepare_medicat(
    source: Path,
    output: Path,
    *,
    num_val: int = 1000,
    num_test: int = 1000,
    seed: int = 42,
    min_words: int = 3,
    on_bad_image: OnBadImage = "drop",
    num_workers: int = 0,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes medicat_{train,val,test}.arrow from a MediCaT release: its radiology figures, captions first.

    The figures are shuffled; the last num_test are for testing, the num_val before them for validation.

    Args:
        source: The MediCaT folder, or a folder that holds it as medicat.
        output: Folder of the arrow files.
        num_val: Figures for validation, before texts and images are checked.
        num_test: Figures for testing, likewise.
        seed: Seed of the shuffle.
        min_words: Shorter texts are left out.
        on_bad_image: What to do about an image whose file is missing or cannot be decoded.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.

    Raises:
        UserError: The release is incomplete or damaged.

    Source: prepro/prepro_pretraining_data.py, ``prepro_medicat``.
    """
    if num_val < 0 or num_test < 0:
        raise UserError(f"num_val and num_test must not be negative, got {num_val} and {num_test}.")
    source = Path(source)
    root = next((folder for folder in (source, source / "medicat") if (folder / "release").is_dir()), source)
    require_files(source, [root / FIGURES], f"a MediCaT release: {FIGURES} and release/figures/")
    report = PrepareReport("medicat")
    figures = _radiology_figures(root / FIGURES, min_words, report)
    random.Random(seed).shuffle(figures)
    end_of_val = max(0, len(figures) - num_test)
    end_of_train = max(0, end_of_val - num_val)
    if not end_of_train:
        report.notes.append(
            f"There is nothing to train on: the {len(figures)} radiology figures are no more than num_val + num_test = "
            f"{num_val} + {num_test}, and test comes first, then val; lower num_val and num_test."
        )

    def samples() -> Iterator[Sample]:
        for index, (image, texts) in enumerate(figures):
            split = "train" if index < end_of_train else "val" if index < end_of_val else "test"
            if texts:
                yield Sample(split, image, texts)

    return write_splits(
        samples(), root, output, report, on_bad_image=on_bad_image, num_workers=num_workers, progress=progress
    )


def _radiology_figures(path: Path, min_words: int, report: PrepareReport) -> list[tuple[str, list[str]]]:
    """Returns image path and texts of every radiology figure, those without a usable text, too."""
    figures = []
    for number, record in read_json_lines(path):
        missing = [key for key in ("radiology", "pdf_hash", "fig_uri") if key not in record]
        if missing:
            raise UserError(f"{path}, line {number} lacks {', '.join(missing)}; its keys are {', '.join(record)}.")
        if not record["radiology"]:
            continue
        image = f"release/figures/{record['pdf_hash']}_{record['fig_uri']}"
        caption = record.get("s2_caption")
        texts = ([caption] if caption else []) + (record.get("s2orc_references") or [])
        if not texts:
            report.drop("figure without any text", image)
        figures.append((image, keep_texts(texts, min_words, report, image)))
    return figures
