"""SLAKE ("slack" in the original): questions in English and Chinese about CT, MRI and chest radiographs.

Layout::

    train.json, validate.json, test.json    lists of {"qid", "img_name", "question", "answer", "answer_type", "q_lang"}
    imgs/{img_name}                         such as imgs/xmlab1/source.jpg
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fastm3ae.data.prepare.common import OnBadImage, PrepareReport, Progress, require_files
from fastm3ae.data.prepare.vqa import AnswerSplits, OnEmptyAnswer, VqaOptions, read_questions, write_questions
from fastm3ae.errors import UserError, nearest

__all__ = ["prepare_slake"]

FILES = {"train": "train.json", "val": "validate.json", "test": "test.json"}
LAYOUT = "SLAKE: train.json, validate.json, test.json and imgs/"


def prepare_slake(
    source: Path,
    output: Path,
    *,
    languages: Sequence[str] = ("en",),
    answers: AnswerSplits = "all",
    on_empty_answer: OnEmptyAnswer = "keep",
    allow_missing: bool = False,
    on_bad_image: OnBadImage = "stop",
    num_workers: int = 0,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes vqa_slack_{train,val,test}.arrow from SLAKE: one row per image of a split, with its questions.

    The files have the name that the original gives the data set. The splits are the official ones.

    Args:
        source: The folder, or one that holds it as slake, slack or Slake1.0.
        output: Folder of the arrow files.
        languages: Values of q_lang whose questions are taken.
        answers: Whose answers are labels: those of all splits, or those of train alone.
        on_empty_answer: What to do about an answer without a word: keep it as a label, as the original does, leave the
            question out, or stop.
        allow_missing: Leave out the questions about images that are missing.
        on_bad_image: What to do about an image that cannot be decoded.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.

    Raises:
        UserError: A file is missing, unreadable or damaged.

    Source: prepro/prepro_finetuning_data.py, ``prepro_vqa_slack``.
    """
    source = Path(source)
    folders = (source, *(source / name for name in ("slake", "slack", "Slake1.0")))
    root = next((folder for folder in folders if (folder / FILES["train"]).is_file()), source)
    require_files(source, [root / name for name in FILES.values()], LAYOUT)
    report = PrepareReport("vqa_slack", "question")
    questions = []
    counts: Counter[str] = Counter()
    for split, name in FILES.items():
        for question, record in read_questions(root, name, split, "imgs", "img_name", ("q_lang",)):
            language = record["q_lang"]
            counts[language] += 1
            if language in languages:
                questions.append(question)
            else:
                report.drop(f"question of language {language}, not {' or '.join(languages)}", question.where)
    for language in languages:
        if language not in counts:
            raise UserError(
                f"{root} has no question of language {language!r}; its languages are {', '.join(sorted(counts))}."
                f"{nearest(language, counts)}"
            )
    options = VqaOptions(
        answers=answers, on_empty_answer=on_empty_answer, allow_missing=allow_missing, on_bad_image=on_bad_image
    )
    facts = {"languages": list(languages)}
    return write_questions(
        questions, root, output, report, options, facts=facts, num_workers=num_workers, progress=progress
    )
