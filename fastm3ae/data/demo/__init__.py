"""The embedded demo corpus: synthetic "radiographs", drawn by a program, with captions in the wording of reports.

Nothing here was acquired from a patient and nothing is fit for clinical use. The corpus exists so that a newcomer can
watch a small model learn, within minutes and without a download: what a caption says can be seen in its picture, and
can not be guessed from the caption's other words.
"""

import dataclasses
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastm3ae import __version__
from fastm3ae.data.arrow import write_pairs
from fastm3ae.data.demo.radiographs import draw_radiograph
from fastm3ae.data.demo.reports import write_captions
from fastm3ae.data.demo.studies import SPLITS, Study, draw_study
from fastm3ae.data.demo.tokenizer import write_tokenizer

__all__ = ["DemoCorpus", "draw_pair", "ensure_demo_corpus", "write_demo_corpus"]

VOCAB_SIZE = 340
RECIPE = "corpus.json"

README = f"""\
fastm3ae demo corpus
====================

Synthetic. Every picture was drawn by a program and every caption was composed by one: no patient, no hospital, no
radiologist. The pictures are schematic, and what they show is placed at random: learn nothing medical from them.

demo_train.arrow, demo_val.arrow, demo_test.arrow: pictures with one or two captions (image, caption, image_id, split)
tokenizer: a small WordPiece tokenizer, learned from the training captions
{RECIPE}: the numbers from which this version of fastm3ae draws the same corpus again

Left is the patient's left. In frontal pictures of the trunk and the head it is the finding's side, on the right of the
picture. Limbs, and lateral and oblique views, are mirrored as a whole: a left lateral view faces the left edge.
"""


@dataclass(frozen=True, kw_only=True)
class DemoCorpus:
    """Where a demo corpus lies and from which numbers it is drawn.

    Args:
        root: The folder.
        num_train: Pictures for training, with one or two captions each.
        num_val: Pictures for validation.
        num_test: Pictures for testing.
        image_size_px: Height and width of the pictures.
        seed: Other seeds give other studies.
    """

    root: Path
    num_train: int = 3000
    num_val: int = 400
    num_test: int = 400
    image_size_px: int = 112
    seed: int = 0

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer."""
        return self.root / "tokenizer"

    def arrow(self, split: str) -> Path:
        """Returns the arrow file of a split."""
        return self.root / f"demo_{split}.arrow"

    def recipe(self) -> str:
        """Returns all that decides the content of the files, as the text of ``corpus.json``."""
        numbers = {key: value for key, value in dataclasses.asdict(self).items() if key != "root"}
        return json.dumps({"synthetic": True, "fastm3ae": __version__, **numbers}, indent=2) + "\n"


def draw_pair(seed: int, split: str, index: int) -> tuple[Study, list[str]]:
    """Draws one study and its captions: a pure function of the three arguments."""
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    study = draw_study(rng)
    return study, write_captions(study, rng)


def write_demo_corpus(
    folder: Path | str,
    *,
    num_train: int = DemoCorpus.num_train,
    num_val: int = DemoCorpus.num_val,
    num_test: int = DemoCorpus.num_test,
    image_size_px: int = DemoCorpus.image_size_px,
    seed: int = DemoCorpus.seed,
) -> DemoCorpus:
    """Draws a corpus into a folder: three arrow files, a tokenizer, and a text that says what they are.

    Args:
        folder: Where to; it is made if need be, and an older corpus in it is replaced.
        num_train: Pictures for training.
        num_val: Pictures for validation.
        num_test: Pictures for testing.
        image_size_px: Height and width of the pictures.
        seed: Other seeds give other studies.
    """
    corpus = DemoCorpus(
        root=Path(folder),
        num_train=num_train,
        num_val=num_val,
        num_test=num_test,
        image_size_px=image_size_px,
        seed=seed,
    )
    corpus.root.mkdir(parents=True, exist_ok=True)
    (corpus.root / RECIPE).unlink(missing_ok=True)  # It comes last, so that a corpus with a recipe is complete.
    for split, num_images in zip(SPLITS, (num_train, num_val, num_test), strict=True):
        write_pairs(corpus.arrow(split), _draw_rows(corpus, split, num_images))
    captions = (caption for index in range(num_train) for caption in draw_pair(seed, "train", index)[1])
    write_tokenizer(corpus.tokenizer, captions, VOCAB_SIZE)
    (corpus.root / "README.txt").write_text(README, encoding="utf-8")
    (corpus.root / RECIPE).write_text(corpus.recipe(), encoding="utf-8")
    return corpus


def ensure_demo_corpus(folder: Path | str) -> DemoCorpus:
    """Returns the corpus of default size in a folder, after drawing it unless this version has drawn it there."""
    corpus = DemoCorpus(root=Path(folder))
    recipe = corpus.root / RECIPE
    if recipe.is_file() and recipe.read_text(encoding="utf-8") == corpus.recipe():
        return corpus
    return write_demo_corpus(folder)


def _draw_rows(corpus: DemoCorpus, split: str, num_images: int) -> Iterator[dict[str, Any]]:
    for index in range(num_images):
        study, captions = draw_pair(corpus.seed, split, index)
        png = io.BytesIO()
        Image.fromarray(draw_radiograph(study, corpus.image_size_px)).save(png, "PNG", compress_level=3)
        yield {"image": png.getvalue(), "caption": captions, "image_id": f"{split}/{index:05d}.png", "split": split}
