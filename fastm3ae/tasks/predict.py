"""A fine-tuned model asked by hand.

predictor = Predictor.load("runs/vqa-rad/checkpoints/best")
predictor.answer("x.png", "Is there a fracture?")  # [("yes", 0.81), ("no", 0.12), ...]
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import FinetuneConfig
from fastm3ae.data.collate import BatchRequest
from fastm3ae.data.collate_pairs import TextBatches
from fastm3ae.data.given import GivenPairs, ImageSource
from fastm3ae.data.loader import transform_of
from fastm3ae.data.text import encode
from fastm3ae.device import autocast_context, batch_mover, pick_device
from fastm3ae.errors import UserError
from fastm3ae.model.build import Model
from fastm3ae.tasks.checkpoint import load_finetuned, read_finetuned
from fastm3ae.tasks.labels import ChoiceTask
from fastm3ae.tasks.registry import make_task

__all__ = ["Choices", "ImageSource", "Predictor"]

Choices = list[tuple[str, float]]
"""Labels with their probabilities, the best first."""

METHODS = {"vqa": "answer", "classification": "classify"}


class Predictor:
    """A fine-tuned model, ready to be asked. It gives what ``fastm3ae evaluate`` writes into its predictions.

    Attributes:
        labels: All answers or classes from which the model chooses.

    Args:
        checkpoint: Where it was read from.
        run: The training that made it, resolved.
        task: Its task.
        tokenizer: Splits the texts.
        model: The model, on its device, in evaluation mode.
        batch_size: Pairs per pass, at most.
    """

    def __init__(
        self,
        checkpoint: Path,
        run: FinetuneConfig,
        task: ChoiceTask,
        tokenizer: PreTrainedTokenizerFast,
        model: Model,
        batch_size: int = 32,
    ) -> None:
        self.checkpoint, self.run, self.task = checkpoint, run, task
        self.tokenizer, self.model, self.batch_size = tokenizer, model, batch_size
        self.labels = task.labels
        device = next(model.parameters()).device
        self._autocast, self._to_device = autocast_context(run.train, device), batch_mover(run.data, device)

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike[str],
        device: str = "auto",
        precision: Literal["bf16", "fp16", "fp32"] = "bf16",
    ) -> "Predictor":
        """Reads a checkpoint.

        Args:
            checkpoint: One of ``fastm3ae finetune vqa`` or ``fastm3ae finetune classification``, its folder or file.
            device: "auto", "cpu", "cuda" or "cuda:N".
            precision: Autocast type on a GPU; a CPU always computes in fp32.

        Raises:
            UserError: The checkpoint cannot be read or is of no such task, or the device is not here.
        """
        path = Path(checkpoint).expanduser()
        run, about = read_finetuned(path)
        if run.task.kind not in METHODS:
            raise UserError(f"{path} was fine-tuned for {run.task.kind}; expected one of {', '.join(METHODS)}.")
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, precision=precision))
        task = make_task(run, about)
        run, tokenizer, model = load_finetuned(path, run, task, pick_device(device))
        assert isinstance(task, ChoiceTask) and tokenizer is not None, "as METHODS says"
        return cls(path, run, task, tokenizer, model)

    def answer(self, image: ImageSource, question: str, top: int = 5) -> Choices:
        """Returns the most probable answers to a question about an image.

        Args:
            image: The image.
            question: The question.
            top: How many answers; fewer where the model knows fewer.

        Raises:
            UserError: The image cannot be read, the question is empty, or the model does not answer questions.
        """
        return self.answer_all([(image, question)], top)[0]

    def answer_all(self, pairs: Sequence[tuple[ImageSource, str]], top: int = 5) -> list[Choices]:
        """Returns the same as ``answer`` for each of many pairs, in batches."""
        for number, (_, question) in enumerate(pairs, 1):
            if not question.strip():
                of_many = f" number {number}" if len(pairs) > 1 else ""
                raise UserError(f"The question{of_many} is empty.")
        return self._choose("vqa", pairs, top)

    def classify(self, image: ImageSource, text: str, top: int = 5) -> Choices:
        """Returns the most probable classes of an image and its text.

        Args:
            image: The image.
            text: The text.
            top: How many classes; fewer where the model knows fewer.

        Raises:
            UserError: The image cannot be read, or the model does not tell classes.
        """
        return self.classify_all([(image, text)], top)[0]

    def classify_all(self, pairs: Sequence[tuple[ImageSource, str]], top: int = 5) -> list[Choices]:
        """Returns the same as ``classify`` for each of many pairs, in batches."""
        return self._choose("classification", pairs, top)

    def is_cut(self, text: str) -> bool:
        """Returns whether the model sees only the beginning of a text, because it was trained on shorter ones."""
        return bool(encode(self.tokenizer, text, self.run.data.max_text_tokens).overflowing)

    @torch.inference_mode()
    def _choose(self, kind: str, pairs: Sequence[tuple[ImageSource, str]], top: int) -> list[Choices]:
        own = self.run.task.kind
        if kind != own:
            raise UserError(
                f"{self.checkpoint} was fine-tuned for {own}, not for {kind}: ask it by fastm3ae predict {own}, or in "
                f"Python by {METHODS[own]}."
            )
        if top < 1:
            raise UserError(f"top must be at least 1, got {top}.")
        batches = TextBatches(
            GivenPairs(pairs, self.run.data.alpha),
            self.tokenizer,
            transform_of(self.run, is_training=False),
            max_text_tokens=self.run.data.max_text_tokens,
        )
        found: list[Choices] = []
        for start in range(0, len(pairs), self.batch_size):
            batch = batches[BatchRequest(0, 0, range(start, min(start + self.batch_size, len(pairs))))]
            with self._autocast():
                outputs = self.model(self._to_device(batch))
            chosen = self.task.choices(outputs[kind], top)
            if not chosen.probabilities.isfinite().all():
                raise UserError(f"{self.checkpoint} gives probabilities that are not finite.")
            for labels, probabilities in zip(chosen.labels.tolist(), chosen.probabilities.tolist(), strict=True):
                found.append([(self.labels[label], p) for label, p in zip(labels, probabilities, strict=True)])
        return found
