"""IRTR-ROCO: the retrieval benchmark on ROCO, one caption per image, 2,000 pairs each to validate and to test."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from fastm3ae.data.prepare.common import (
    OnBadImage,
    PrepareReport,
    Progress,
    Sample,
    keep_texts,
    read_lines,
    write_splits,
)
from fastm3ae.data.prepare.roco import find_roco, parse_caption

__all__ = ["prepare_irtr_roco"]


def prepare_irtr_roco(
    source: Path,
    output: Path,
    *,
    num_val: int = 2000,
    num_test: int = 2000,
    seed: int = 42,
    min_words: int = 3,
    on_bad_image: OnBadImage = "drop",
    num_workers: int = 0,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes irtr_roco_{train,val,test}.arrow from a ROCO release: its captions, shuffled within each split.

    Validation and test are the first num_val and num_test usable captions of their shuffled splits.

    Args:
        source: The ROCO folder, or a folder that holds it as roco or data.
        output: Folder of the arrow files.
        num_val: Captions for validation, before the images are checked.
        num_test: Captions for testing, likewise.
        seed: Seed of the one random stream that shuffles train, val and test, in this order.
        min_words: Shorter captions are left out.
        on_bad_image: What to do about an image whose file is missing or cannot be decoded.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.

    Raises:
        UserError: A file of the release is missing or unreadable.

    Source: prepro/prepro_finetuning_data.py, ``prepro_irtr_roco``. As there, a caption keeps the space before it.
    """
    root, folders = find_roco(Path(source))
    report = PrepareReport("irtr_roco")
    rng = random.Random(seed)

    def samples(split: str) -> Iterator[Sample]:
        folder = folders[split]
        images = (folder / "images").relative_to(root).as_posix()
        # Blank lines between captions take part in the shuffle; those around all captions do not.
        lines = "".join(line for _, line in read_lines(folder / "captions.txt")).strip().split("\n")
        rng.shuffle(lines)
        for line in lines:
            if caption := parse_caption(line, report, f"{split} captions.txt, {line.strip()[:40]!r}"):
                roco_id, text = caption
                where = f"{split} captions.txt, {roco_id}"
                if texts := keep_texts([text], min_words, report, where, strip=False):
                    yield Sample(split, f"{images}/{roco_id}.jpg", texts)

    pairs = itertools.chain(
        samples("train"), itertools.islice(samples("val"), num_val), itertools.islice(samples("test"), num_test)
    )
    return write_splits(
        pairs, root, output, report, on_bad_image=on_bad_image, num_workers=num_workers, progress=progress
    )
