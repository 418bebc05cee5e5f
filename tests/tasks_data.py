"""Made-up tasks that a tiny model can learn: what is asked for can be seen, as grey or as a side."""

from corpus import png

from fastm3ae.data.arrow import CAPTION_COLUMNS, MELINDA_COLUMNS, VQA_COLUMNS, write_pairs

ANSWERS = ["yes", "no", "left", "right"]
CLASSES = {column: ["chest", "head"] for column in ("i_meth", "p_meth", "i_meth_label", "p_meth_label")}


def vqa_rows(num_images, first=0, answers=ANSWERS, more_answers=()):
    """Two questions about each image: whether it is dark, which is closed, and on which side, which is open."""
    for i in range(first, first + num_images):
        words = ["yes" if i % 2 else "no", "left" if i % 4 < 2 else "right"]
        labels = [[answers.index(word)] if word in answers else [] for word in words]
        yield {
            "image": png(20 + 200 * (i % 2) + i % 4 * 5),
            "questions": ["is the image dark", "which side is the lesion"],
            "answers": [[word] for word in words],
            "answer_labels": labels,
            "answer_scores": [[1.0] * len(of) for of in labels],
            "image_id": f"img/{i}.png",
            "question_id": [2 * i, 2 * i + 1],
            "answer_type": [0, 1],
            "split": "train",
        }


def write_vqa(folder, answers=ANSWERS, with_facts=True, splits=("train", "val", "test"), name="vqa_made"):
    """24, 16 and 16 questions."""
    facts = {"options": {"answers": "all"}, "classes": {"answer_labels": answers}} if with_facts else None
    for first, split in enumerate(splits):
        rows = vqa_rows(12 if split == "train" else 8, 100 * first, answers)
        write_pairs(folder / f"{name}_{split}.arrow", rows, VQA_COLUMNS, facts)
    return folder


def write_classes(folder, with_facts=True, splits=("train", "val", "test")):
    """16 captions a split, of two classes that the caption names."""
    facts = {"options": {}, "classes": CLASSES} if with_facts else None
    for first, split in enumerate(splits):
        rows = (
            {
                "image": png(20 + 200 * (i % 2)),
                "caption": [f"axial {'brain' if i % 2 else 'lobe'} image {i % 5}"] * 2,
                "image_id": f"img/{100 * first + i}.png",
                **{column: [i % 2] * 2 for column in CLASSES},
                "split": split,
            }
            for i in range(8)
        )
        write_pairs(folder / f"cls_made_{split}.arrow", rows, MELINDA_COLUMNS, facts)
    return folder


def write_captions(folder, splits=("train", "val", "test")):
    """10 images a split, each with one or two captions of its own words."""
    words = "acute axial brain chest cm ct figure gland image knee".split()
    for first, split in enumerate(splits):
        rows = (
            {
                "image": png(10 + 24 * i),
                "caption": [f"{words[i]} {words[(i + 3) % 10]} lesion"] * (1 + i % 2),
                "image_id": f"img/{100 * first + i}.png",
                "split": split,
            }
            for i in range(10)
        )
        write_pairs(folder / f"irtr_made_{split}.arrow", rows, CAPTION_COLUMNS)
    return folder
