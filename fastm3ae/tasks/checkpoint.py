"""From a fine-tuned checkpoint to the model that does its task: its training, its tokenizer and its weights."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from fastm3ae.config import FinetuneConfig, ModelConfig, RunConfig, TaskConfig
from fastm3ae.config.files import from_dict, to_dict
from fastm3ae.errors import UserError
from fastm3ae.model.build import build_model
from fastm3ae.tasks.task import Loaded, Task
from fastm3ae.weights.header import check_fits
from fastm3ae.weights.pretrained import data_of, init_model, own_tokenizer, read_about
from fastm3ae.weights.towers import read_tokenizer, resolve

__all__ = ["load_finetuned", "read_finetuned", "read_pretrained"]


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
        raise UserError(
            f"{checkpoint} was not fine-tuned for a task: fastm3ae finetune makes such checkpoints; fastm3ae evaluate "
            "--task retrieval or zero_shot needs none."
        )
    return _with_own_tokenizer(from_dict(FinetuneConfig(), about["config"]), checkpoint), about


def _with_own_tokenizer(run: FinetuneConfig, checkpoint: Path) -> FinetuneConfig:
    return dataclasses.replace(run, data=own_tokenizer(run.data, checkpoint))


def load_finetuned(checkpoint: Path, run: FinetuneConfig, task: Task, device: torch.device) -> Loaded:
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
    run = resolve(dataclasses.replace(run, model=_resolved(task.with_head(run.model))), tokenizer)
    check_fits(run.model, checkpoint)
    model = build_model(run.model)
    report = init_model(model, checkpoint)
    # The retrieval head starts as a part of the matching head: a pre-trained model has it.
    new = set(report.new) - ({"retrieval_head"} if "itm_head" not in report.new else set())
    if new:
        raise UserError(f"{checkpoint} lacks {', '.join(sorted(new))}, which {run.task.kind} needs.")
    return Loaded(run, tokenizer, model.to(device).eval())


def _resolved(model: ModelConfig) -> ModelConfig:
    """Returns a model whose language tower is not looked for where its sizes are known: its weights are here."""
    if not model.has_texts or model.text.vocab_size is None:
        return model
    return dataclasses.replace(model, text=dataclasses.replace(model.text, weights="random"))


def read_pretrained(checkpoint: Path) -> tuple[FinetuneConfig, dict[str, Any]]:
    """Returns a retrieval without fine-tuning: a checkpoint's model on the data of its pre-training; and what it says.

    Args:
        checkpoint: One of ours, its folder or file, or an official .ckpt that holds its configuration.

    Raises:
        UserError: There is no such checkpoint, or it can't be read.
    """
    model, about = read_about(checkpoint)
    if model is None:
        raise UserError(f"{checkpoint} does not say of what model it is: evaluate it by a line of the original.")
    trained = about.get("config", {})
    run = FinetuneConfig(
        task=TaskConfig(kind="retrieval"),
        model=model,
        data=data_of(about, checkpoint),
        seed=from_dict(RunConfig(), {"seed": trained.get("seed", 0)}).seed,
    )
    return run, {"config": to_dict(run), "weights_were_random": False, **about}
