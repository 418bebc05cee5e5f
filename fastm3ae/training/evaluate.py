"""Evaluation: a checkpoint's task on a split, and the files that say how well it was done."""

import dataclasses
import os
from pathlib import Path

import torch
from tqdm import tqdm

from fastm3ae.config import EvaluateConfig, FinetuneConfig
from fastm3ae.configfile import to_dict
from fastm3ae.device import autocast_context, batch_mover, pick_device
from fastm3ae.tasks.checkpoint import load_finetuned, read_finetuned
from fastm3ae.tasks.evaluation import About, Evaluation, write_evaluation
from fastm3ae.tasks.registry import make_task
from fastm3ae.training.run_folder import environment

__all__ = ["evaluate"]


@torch.inference_mode()
def evaluate(checkpoint: Path, config: EvaluateConfig, run: FinetuneConfig | None = None) -> Evaluation:
    """Evaluates a checkpoint, and writes the results.

    Args:
        checkpoint: A checkpoint of a fine-tuned model, its folder or file; or another one, with ``run``.
        config: On what, and where to.
        run: The fine-tuning that made the checkpoint, where that does not say it: an official .ckpt.

    Raises:
        UserError: The checkpoint or the data cannot be read or do not fit each other.
    """
    if run is not None:
        about = {"config": to_dict(run), "weights_were_random": False}
        task = make_task(run)
    else:
        run, about = read_finetuned(checkpoint)
        run = _as_asked(run, config)
        task = make_task(run, about)
    device = pick_device(config.device)
    run, tokenizer, model = load_finetuned(checkpoint, run, task, device)
    workers = min(config.num_workers, os.cpu_count() or 1)
    loader = task.loader(run, tokenizer, config.split, num_workers=workers, is_training=False)
    autocast, to_device = autocast_context(run.train, device), batch_mover(run.data, device)
    items = []
    with tqdm(total=loader.num_pairs, desc=f"evaluate {run.task.kind}", unit="item", dynamic_ncols=True) as bar:
        for pieces in loader.epoch(0):
            for batch in pieces:
                with autocast():
                    outputs = model(to_device(batch))
                items += task.items(outputs[task.objective], batch)
            bar.update(min(config.batch_size, loader.num_pairs - bar.n))
    evaluation = task.evaluation(items, task.squares(run, loader.dataset), num_resamples=config.num_resamples)
    if loader.bad_samples:
        first = f"{len(loader.bad_samples)} items were left out because of their images; the first: "
        evaluation = dataclasses.replace(evaluation, notes=[*evaluation.notes, f"{first}{loader.bad_samples[0]}"])
    described = About(
        task=run.task.kind,
        datasets=list(run.data.datasets),
        split=config.split,
        configuration=about["config"],
        seed=run.seed,
        checkpoint=str(checkpoint),
        weights_were_random=about["weights_were_random"],
        fingerprints=loader.dataset.fingerprints(),
        preparation={name: facts.get("options", {}) for name, facts in loader.dataset.table.facts().items()},
        labels=list(task.labels),
        resampling_unit=task.unit(loader.dataset),
        environment=environment(device),
    )
    write_evaluation(evaluation, Path(config.output), described)
    return evaluation


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
        train=dataclasses.replace(run.train, batch_size=config.batch_size, precision=config.precision),
    )
