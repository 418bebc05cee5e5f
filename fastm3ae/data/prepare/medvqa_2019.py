"""MedVQA-2019 (VQA-Med of ImageCLEF 2019): questions about modality, organ and plane, not those on abnormalities.

Layout of the release, its archives unpacked; a line of training and validation is ``image|question|answer``, one of the
test questions ``image|category|question|answer``::

    ImageClef-2019-VQA-Med-Training/QAPairsByCategory/C1_Modality_train.txt, C2_Plane_train.txt, C3_Organ_train.txt
    ImageClef-2019-VQA-Med-Training/Train_images/{image}.jpg
    ImageClef-2019-VQA-Med-Validation/QAPairsByCategory/C1_Modality_val.txt, ...
    ImageClef-2019-VQA-Med-Validation/Val_images/{image}.jpg
    VQAMed2019Test/VQAMed2019_Test_Questions_w_Ref_Answers.txt
    VQAMed2019Test/VQAMed2019_Test_Images/{image}.jpg

Layout of the original, whose lines all are ``image|question|answer``::

    {train,val,test}/QA/{Modality,Organ,Plane}.csv
    {train,val,test}/images/{image}.jpg
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastm3ae.data.prepare.common import SPLITS, OnBadImage, PrepareReport, Progress, read_lines, require_files
from fastm3ae.data.prepare.vqa import ANSWER_TYPES, AnswerSplits, OnEmptyAnswer, Question, VqaOptions, write_questions
from fastm3ae.errors import UserError

__all__ = ["prepare_medvqa_2019"]

CATEGORIES = ("modality", "organ", "plane")  # in this order they are numbered
UNUSED = "abnormality"
TEST_FILE = "VQAMed2019Test/VQAMed2019_Test_Questions_w_Ref_Answers.txt"
LAYOUT = (
    "MedVQA-2019: either ImageClef-2019-VQA-Med-Training/, ImageClef-2019-VQA-Med-Validation/ and VQAMed2019Test/, as "
    "unpacked from the release, or {train,val,test}/QA/{Modality,Organ,Plane}.csv and {train,val,test}/images/"
)


class _File(NamedTuple):
    """A file of questions; the folder of their images; and a category if its lines name them and one is wanted."""

    split: str
    path: Path
    images: str
    category: str | None = None


def prepare_medvqa_2019(
    source: Path,
    output: Path,
    *,
    answers: AnswerSplits = "all",
    on_empty_answer: OnEmptyAnswer = "keep",
    allow_missing: bool = False,
    on_bad_image: OnBadImage = "stop",
    num_workers: int = 0,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes vqa_medvqa_2019_{train,val,test}.arrow from VQA-Med 2019: one row per image, with its questions.

    The splits are the official ones. All questions count as open; their ids are numbered over all splits.

    Args:
        source: The folder with the unpacked archives or with the original's train, val and test, or one that holds it
            as medvqa_2019.
        output: Folder of the arrow files.
        answers: Whose answers are labels: those of all splits, or those of train alone.
        on_empty_answer: What to do about an answer without a word: keep it as a label, as the original does, leave the
            question out, or stop.
        allow_missing: Leave out the questions about images that are missing.
        on_bad_image: What to do about an image that cannot be decoded.
        num_workers: Processes that read the images, with the same result; 0: threads of this one.
        progress: Called after each image.

    Raises:
        UserError: A file is missing, or a line is no question with its answer.

    Source: prepro/prepro_finetuning_data.py, ``prepro_vqa_medvqa2019``.
    """
    source = Path(source)
    candidates = [files(folder) for folder in (source, source / "medvqa_2019") for files in (_official, _original)]
    # Of a release that lacks files, the layout that fits best says which.
    files = max(candidates, key=lambda files: sum(file.path.is_file() for file in files))
    require_files(source, dict.fromkeys(file.path for file in files), LAYOUT)
    root = next(folder for folder in (source / "medvqa_2019", source) if files[0].path.is_relative_to(folder))
    report = PrepareReport("vqa_medvqa_2019", "question")
    report.notes.append("Questions on abnormalities are left out, as in the original.")
    lines = [(file, *line) for file in files for line in _read(file, root)]
    questions = [
        Question(file.split, f"{file.images}/{image}.jpg", number, text, answer, ANSWER_TYPES["open"], where)
        for number, (file, image, text, answer, where) in enumerate(lines)
    ]
    options = VqaOptions(
        answers=answers, on_empty_answer=on_empty_answer, allow_missing=allow_missing, on_bad_image=on_bad_image
    )
    return write_questions(questions, root, output, report, options, num_workers=num_workers, progress=progress)


def _official(root: Path) -> list[_File]:
    """Returns the files of questions in the release's layout."""
    files = []
    for split, folder, images in (
        ("train", "ImageClef-2019-VQA-Med-Training", "Train_images"),
        ("val", "ImageClef-2019-VQA-Med-Validation", "Val_images"),
    ):
        names = ("C1_Modality", "C3_Organ", "C2_Plane")
        pairs = root / folder / "QAPairsByCategory"
        files += [_File(split, pairs / f"{name}_{split}.txt", f"{folder}/{images}") for name in names]
    test_images = "VQAMed2019Test/VQAMed2019_Test_Images"
    return files + [_File("test", root / TEST_FILE, test_images, category) for category in CATEGORIES]


def _original(root: Path) -> list[_File]:
    """Returns the files of questions in the original's layout."""
    return [
        _File(split, root / split / "QA" / f"{category.title()}.csv", f"{split}/images")
        for split in SPLITS
        for category in CATEGORIES
    ]


def _read(file: _File, root: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yields image, question, answer, and where they stand, from the root."""
    form = "image|question|answer" if file.category is None else "image|category|question|answer"
    for number, line in read_lines(file.path):
        if not line.strip():
            continue
        where = f"{file.path}, line {number}"
        fields = line.rstrip("\n").split("|")
        if len(fields) != form.count("|") + 1 or not all(field.strip() for field in fields[:-1]):
            raise UserError(f"{where} must be {form}, got {line.strip()!r}.")
        if file.category is not None:
            category = fields.pop(1)
            if category not in (*CATEGORIES, UNUSED):
                raise UserError(
                    f"{where}: the category must be one of {', '.join(CATEGORIES)}, {UNUSED}, got {category!r}."
                )
            if category != file.category:
                continue
        image, text, answer = fields
        yield image, text, answer, f"{file.path.relative_to(root)}, line {number}"
