"""VQA-RAD: questions of clinicians about radiographs, CT and MRI, in the usual form of 3,064 + 451 questions.

Layout::

    trainset.json, testset.json    lists of {"qid", "image_name", "question", "answer", "answer_type", ...}
    images/{image_name}
"""

from pathlib import Path
from typing import Literal

from fastm3ae.data.prepare.common import OnBadImage, PrepareReport, Progress, draw_splits, require_files
from fastm3ae.data.prepare.vqa import AnswerSplits, OnEmptyAnswer, VqaOptions, read_questions, write_questions
from fastm3ae.errors import UserError

__all__ = ["prepare_vqa_rad"]

LAYOUT = "VQA-RAD: trainset.json, testset.json and images/"
Validation = Literal["test", "train"]
"""Which questions validate: those of the test split, as the original's, or some that leave the training split."""


def prepare_vqa_rad(
    source: Path,
    output: Path,
    *,
    answers: AnswerSplits = "all",
    val: Validation = "test",
    val_frac: float = 0.1,
    seed: int = 0,
    on_empty_answer: OnEmptyAnswer = "keep",
    allow_missing: bool = False,
    on_bad_image: OnBadImage = "stop",
    num_workers: int = 0,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes vqa_vqa_rad_{train,val,test}.arrow from VQA-RAD: one row per image of a split, with its questions.

    The original validates on the test questions: its valset.json is a copy of testset.json, and is not read here.

    Args:
        source: The folder, or one that holds it as vqa_rad.
        output: Folder of the arrow files.
        answers: Whose answers are labels: those of all splits, or those of train alone.
        val: Which questions validate: the test questions, or those of some training images, which leave train.
        val_frac: Fraction of the training images for validation, if they are drawn.
        seed: Seed of the draw.
        on_empty_answer: What to do about an answer without a word: keep it as a label, as the original does, leave the
            question out, or stop.
        allow_missing: Leave out the questions about images that are missing.
        on_bad_image: What to do about an image that cannot be decoded.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.

    Raises:
        UserError: A file is missing, unreadable or damaged.

    Source: prepro/prepro_finetuning_data.py, ``prepro_vqa_vqa_rad``.
    """
    source = Path(source)
    root = next((folder for folder in (source, source / "vqa_rad") if (folder / "trainset.json").is_file()), source)
    files = {split: f"{split}set.json" for split in ("train", "test")}
    require_files(source, [root / file for file in files.values()], LAYOUT)
    report = PrepareReport("vqa_vqa_rad", "question")
    of = {
        split: [question for question, _ in read_questions(root, file, split, "images", "image_name")]
        for split, file in files.items()
    }
    facts: dict[str, str | float] = {"val": val}
    if val == "test":
        validation = [question._replace(split="val") for question in of["test"]]
        report.notes.append("val has the questions of test, as in the original; --val train draws one that differs.")
    else:
        if val_frac <= 0:
            raise UserError(f"val_frac must be greater than 0 to draw a validation split, got {val_frac}.")
        drawn = draw_splits((question.image for question in of["train"]), val_frac, 0, seed, report)
        questions = [question._replace(split=drawn[question.image]) for question in of["train"]]
        of["train"] = [question for question in questions if question.split == "train"]
        validation = [question for question in questions if question.split == "val"]
        report.notes.append("val has the questions of training images, which train lacks.")
        facts |= {"val_frac": val_frac, "seed": seed}
    options = VqaOptions(
        answers=answers, on_empty_answer=on_empty_answer, allow_missing=allow_missing, on_bad_image=on_bad_image
    )
    questions = [*of["train"], *validation, *of["test"]]
    return write_questions(
        questions, root, output, report, options, facts=facts, num_workers=num_workers, progress=progress
    )
