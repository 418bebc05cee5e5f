"""Evaluation: a checkpoint's task on a split, and the files that say how well it was done."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastm3ae.config import EvaluateConfig, FinetuneConfig
from fastm3ae.config.files import to_dict
from fastm3ae.data.text import fingerprint
from fastm3ae.device import pick_device
from fastm3ae.errors import UserError
from fastm3ae.tasks.checkpoint import load_finetuned, read_finetuned, read_pretrained
from fastm3ae.tasks.evaluation import About, Evaluation, make_folder, write_evaluation
from fastm3ae.tasks.registry import make_task
from fastm3ae.tasks.retrieval import RetrievalTask
from fastm3ae.tasks.task import Loaded, Task, with_notes
from fastm3ae.tasks.zero_shot import ZeroShotTask
from fastm3ae.training.run_folder import environment
from fastm3ae.weights.pretrained import read_about

__all__ = ["evaluate"]


@torch.inference_mode()
def evaluate(config: EvaluateConfig, run: FinetuneConfig | None = None) -> Evaluation:
    """Evaluates a checkpoint, and writes the results.

    Args:
        config: Which checkpoint, on what, and where to.
        run: The fine-tuning that made the checkpoint, where that does not say it: an official .ckpt.

    Raises:
        UserError: The checkpoint or the data cannot be read or do not fit each other.
    """
    checkpoint = Path(config.checkpoint).expanduser()
    if run is not None:
        about = _about(checkpoint, run)
    else:
        read = read_finetuned if config.task == "auto" else read_pretrained
        run, about = read(checkpoint)
        run = _as_asked(run, config)
    if config.task == "zero-shot":
        task: Task = ZeroShotTask(run, config.prompts)
    else:
        task = make_task(run, about if "labels" in about else None)
    if config.max_images is not None and not isinstance(task, RetrievalTask):
        raise UserError(f"max_images is for retrieval and zero-shot, not for {task.name}.")
    loaded = load_finetuned(checkpoint, run, task, pick_device(config.device))
    make_folder(Path(config.output))  # now, rather than after hours of work
    notes = _notes(loaded, about)
    with tqdm(desc=f"evaluate {task.name}", unit=task.item_name, dynamic_ncols=True) as bar:

        def progress(num_done: int, num_items: int) -> None:
            bar.total = num_items
            bar.update(num_done - bar.n)

        evaluation, dataset = task.evaluate(loaded, config, progress)
    evaluation = with_notes(evaluation, notes)
    described = About(
        task=task.name,
        datasets=list(run.data.datasets),
        split=config.split,
        options=_options(config),
        configuration=about["config"],
        seed=run.seed,
        checkpoint=str(checkpoint),
        weights_were_random=about["weights_were_random"],
        fingerprints=dataset.fingerprints(),
        preparation={name: facts.get("options", {}) for name, facts in dataset.table.facts().items()},
        labels=list(task.labels),
        resampling_unit=task.unit(dataset),
        environment=environment(loaded.device),
    )
    write_evaluation(evaluation, Path(config.output), described)
    return evaluation


def _about(checkpoint: Path, run: FinetuneConfig) -> dict[str, Any]:
    """Returns what is known of a checkpoint that a given fine-tuning made: its labels, if it is one of ours."""
    about = read_about(checkpoint)[1]
    is_of_task = about.get("config", {}).get("task", {}).get("kind") == run.task.kind
    return {"weights_were_random": False, **(about if is_of_task else {}), "config": to_dict(run)}


def _options(config: EvaluateConfig) -> dict[str, Any]:
    """Returns what of an evaluation is not as in training, and so makes other numbers."""
    names = ("image_size_px", "max_text_tokens", "tokenizer", "max_images", "prompts")
    found = {name: getattr(config, name) for name in names}
    if config.preselect_with is not None:
        found |= {"preselect_with": config.preselect_with, "num_preselected": config.num_preselected}
    return {name: value for name, value in found.items() if value is not None}


def _notes(loaded: Loaded, about: Mapping[str, Any]) -> list[str]:
    """Returns a remark on a tokenizer that is another one than in training."""
    trained_with = about.get("fingerprints", {}).get("tokenizer")
    if None in (loaded.tokenizer, trained_with) or fingerprint(loaded.tokenizer) == trained_with:
        return []
    return [f"The tokenizer {loaded.config.data.tokenizer} is another one than the model was trained with."]


def _as_asked(run: FinetuneConfig, config: EvaluateConfig) -> FinetuneConfig:
    """Returns a checkpoint's training with what the evaluation changes."""
    size = config.image_size_px or run.model.vision.image_size_px
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, vision=dataclasses.replace(run.model.vision, image_size_px=size)),
        data=dataclasses.replace(
            run.data,
            root=config.root or run.data.root,
            datasets=config.datasets or run.data.datasets,
            tokenizer=config.tokenizer or run.data.tokenizer,
            max_text_tokens=config.max_text_tokens or run.data.max_text_tokens,
            on_bad_sample=config.on_bad_sample,
        ),
        train=dataclasses.replace(
            run.train, batch_size=config.batch_size, precision=config.precision, device=config.device
        ),
    )
