"""The fine-tuning steps beside the original's, forward and backward, at the official sizes on a CPU.

    python benchmarks/finetune_step.py            # the figures
    python benchmarks/finetune_step.py --check    # and exit with 1 if one misses its target
    python benchmarks/finetune_step.py --task vqa # of one task alone

Images of 384 px (577 tokens) and real lengths of texts: 9 questions of 7 to 14 tokens, which the original pads to 32,
about 8 images (of 64 questions that are drawn from VQA-RAD's, 57 have an image of their own: two questions about one
image share its encoding); 2 captions of 29 and 62 of 128 tokens, the median and the 90th percentile of ROCO's captions,
in the place of MELINDA's; and 1 image with 4 captions (18 to 40 of 40; the original's 16 would save more, because it
encodes the image again for each text). float32, dropout 0.1. Both steps run on one model, in turn, without an
optimiser; a figure is the ratio of the medians. Takes about 15 minutes and 13 GB.

What is saved, counted in operations: padding, the rows of the last fusion layer that no pooler reads (of 577 tokens of
the image, one is read), and the encodings of images that were encoded already. So little is saved for questions (1.13
times, and 1.22 with the shared image) that nearly all of the time is still needed.
"""

import argparse
import dataclasses
from functools import partial

import harness
import original_tasks
import torch
import whole_step
from whole_step import Figure, with_vocabulary

from fastm3ae.config.presets import FINETUNE_PRESETS
from fastm3ae.data.batch import ClassificationBatch, RetrievalBatch, VqaBatch

LENGTHS = {"vqa": (7, 8, 8, 9, 10, 10, 11, 12, 14), "classification": (29, 62), "retrieval": (24,)}
FALSE_LENGTHS = (18, 33, 40)
PRESETS = {"vqa": "vqa-rad", "classification": "melinda", "retrieval": "roco"}
NUM_LABELS = {"vqa": 498, "classification": 85}


def make_texts(lengths, num_tokens, generator):
    ids_BT = torch.randint(4, 50265, (len(lengths), num_tokens), generator=generator)
    is_padding_BT = torch.arange(num_tokens) >= torch.tensor(lengths)[:, None]
    return ids_BT.masked_fill(is_padding_BT, 1), is_padding_BT


def make_batch(task, size, num_tokens):
    generator = torch.Generator().manual_seed(0)
    lengths = LENGTHS[task]
    ids_BT, is_padding_BT = make_texts(lengths, num_tokens, generator)
    num = len(lengths)
    common = {
        "image_BCHW": torch.randn(num, 3, size, size, generator=generator),
        "text_ids_BT": ids_BT,
        "is_padding_BT": is_padding_BT,
        "texts": [""] * num,
        "item_ids": [""] * num,
        "bad_samples": [],
    }
    if task == "vqa":
        labels_B1 = torch.randint(NUM_LABELS[task], (num, 1), generator=generator)
        common["image_BCHW"] = common["image_BCHW"][:-1]
        return VqaBatch(
            **common,
            image_index_B=torch.tensor([*range(num - 1), 0]),
            answer_ids_BA=labels_B1,
            answer_scores_BA=torch.ones(num, 1),
            is_open_B=torch.zeros(num, dtype=torch.bool),
            question_ids=[0] * num,
            answers=[[]] * num,
        )
    if task == "classification":
        return ClassificationBatch(**common, label_B=torch.randint(NUM_LABELS[task], (num,), generator=generator))
    ids_RT, is_padding_RT = make_texts(FALSE_LENGTHS, num_tokens, generator)
    return RetrievalBatch(
        **common, false_text_ids_BRT=ids_RT[None], is_false_text_padding_BRT=is_padding_RT[None], false_texts=[[]]
    )


def make_model(task):
    config = FINETUNE_PRESETS[task][PRESETS[task]]()
    sizes = {"num_answers": NUM_LABELS["vqa"], "num_classes": NUM_LABELS["classification"]}
    model = dataclasses.replace(with_vocabulary(config.model, 50265), objectives=(task,), **sizes)
    return whole_step.make_model(model), config.data.max_text_tokens


def ratio(task, rounds):
    """How many times as fast our step is."""
    model, num_tokens = make_model(task)
    batch = make_batch(task, model.config.image_size_px, num_tokens)
    steps = {"original": original_tasks.loss, "packed": whole_step.packed}
    runs = {name: partial(whole_step.run, losses, model, batch) for name, losses in steps.items()}
    timings = whole_step.compare(runs, rounds, warm_up_rounds=1)
    return timings["original"].median_s / timings["packed"].median_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure misses its target")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each step")
    parser.add_argument("--task", choices=LENGTHS, action="append", help="this task alone; may be repeated")
    arguments = parser.parse_args()
    print(f"fine-tuning steps at the official sizes, 384 px, float32\n{harness.machine()}")
    figures = []
    for task in arguments.task or LENGTHS:
        print(f"\n{task}: texts of {LENGTHS[task]} tokens")
        name = f"{task}: the original's time over ours"
        figures.append(Figure(name, ratio(task, arguments.rounds), 1.2))
    print()
    whole_step.report(figures, arguments.check)


if __name__ == "__main__":
    main()
