"""From a fine-tuned checkpoint to the model that does its task: its training, its tokenizer and its weights."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import FinetuneConfig
from fastm3ae.configfile import from_dict
from fastm3ae.errors import UserError
from fastm3ae.model.build import Model, build_model
from fastm3ae.pretrained import has_tokenizer, init_model, read_about, read_tokenizer, resolve
from fastm3ae.tasks.task import Task

__all__ = ["load_finetuned", "read_finetuned"]


def read_finetuned(checkpoint: Path) -> tuple[FinetuneConfig, dict[str, Any]]:
    """Returns the fine-tuning that made a checkpoint, and all that this says of it.

    The tokenizer is that of the checkpoint's folder, if it has one.

    Args:
        checkpoint: Its folder or file.

    Raises:
        UserError: There is no such checkpoint, it can't be read, or it was not fine-tuned.
    """
    about = read_about(checkpoint)[1]
    if "task" not in about.get("config", {}):
        raise UserError(f"{checkpoint} was not fine-tuned for a task: fastm3ae finetune makes such checkpoints.")
    run = from_dict(FinetuneConfig(), about["config"])
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if has_tokenizer(folder):
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=str(folder)))
    return run, about


def load_finetuned(
    checkpoint: Path, run: FinetuneConfig, task: Task, device: torch.device
) -> tuple[FinetuneConfig, PreTrainedTokenizerFast | None, Model]:
    """Returns the training, resolved, its tokenizer, and the model with a checkpoint's weights.

    Args:
        checkpoint: Where the weights are.
        run: The training.
        task: Its task.
        device: Where the model goes; it is in evaluation mode.

    Raises:
        UserError: The tokenizer or the weights cannot be read, or do not fit the model.
    """
    tokenizer = read_tokenizer(run)
    run = resolve(dataclasses.replace(run, model=task.with_head(run.model)), tokenizer)
    model = build_model(run.model)
    report = init_model(model, checkpoint)
    if report.new:
        raise UserError(f"{checkpoint} lacks {', '.join(report.new)}, which {run.task.kind} needs.")
    return run, tokenizer, model.to(device).eval()
