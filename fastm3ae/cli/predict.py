"""The command that asks a fine-tuned model."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from fastm3ae.cli.configure import choose
from fastm3ae.cli.say import printable, warn

__all__ = ["predict"]

# For each task what its text is called, and what is predicted.
TASKS = {"vqa": ("question", "answer"), "classification": ("text", "class")}
HELP = {"vqa": "Answer a question about images.", "classification": "Tell the class of images with a text."}


def predict(arguments: Sequence[str]) -> None:
    """Ask a fine-tuned model about images: answers to a question, or classes."""
    task = choose("fastm3ae predict", arguments, HELP)
    text_name, label_name = TASKS[task]
    parser = argparse.ArgumentParser(prog=f"fastm3ae predict {task}", description=HELP[task])
    parser.add_argument("--checkpoint", type=Path, required=True, help=f"one of fastm3ae finetune {task}")
    parser.add_argument("--image", type=Path, nargs="+", required=True, help="image files")
    parser.add_argument(f"--{text_name}", dest="text", required=True, help=f"the {text_name} to each of them")
    parser.add_argument("--top", type=int, default=5, help="how many are shown of each image (default 5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args(arguments[1:])

    from fastm3ae.tasks.predict import Predictor

    predictor = Predictor.load(chosen.checkpoint, chosen.device)
    ask = predictor.answer_all if task == "vqa" else predictor.classify_all
    found = ask([(image, chosen.text) for image in chosen.image], chosen.top)
    if predictor.is_cut(chosen.text):
        warn(f"the {text_name} is longer than the {predictor.run.data.max_text_tokens} tokens that the model reads.")
    if chosen.json:
        predictions = [
            {
                "image": str(image),
                text_name: chosen.text,
                "predictions": [{label_name: label, "probability": p} for label, p in choices],
            }
            for image, choices in zip(chosen.image, found, strict=True)
        ]
        print(json.dumps(predictions, ensure_ascii=False, indent=2))
        return
    for image, choices in zip(chosen.image, found, strict=True):
        print(printable(str(image)))
        for label, probability in choices:
            print(printable(f"  {probability:.3f}  {label}"))
