"""Fine-tuning: what its runs are, to the code that all runs share, and the test at their end."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastm3ae import objectives
from fastm3ae.config import DataConfig, EvaluateConfig, FinetuneConfig
from fastm3ae.data.arrow import dataset_files
from fastm3ae.data.batch import ImageBatch
from fastm3ae.errors import UserError
from fastm3ae.model.build import Model
from fastm3ae.tasks.evaluation import METRICS_FILE, Evaluation
from fastm3ae.tasks.registry import make_task
from fastm3ae.tasks.results import read_results, results_table
from fastm3ae.tasks.task import Item, Task
from fastm3ae.training.checkpoint import BEST
from fastm3ae.training.distributed import Processes
from fastm3ae.training.evaluate import evaluate
from fastm3ae.training.job import Job
from fastm3ae.training.launch import is_one_of_several
from fastm3ae.training.resume import check_same_run
from fastm3ae.training.run import run
from fastm3ae.weights.header import check_fits
from fastm3ae.weights.pretrained import own_tokenizer, read_about
from fastm3ae.weights.towers import read_tokenizer, resolve

__all__ = ["check_task", "finetune", "finetune_seeds", "start_from"]

TOWERS = ("vision", "text")


def start_from(config: FinetuneConfig, checkpoint: str) -> FinetuneConfig:
    """Returns the configuration with a checkpoint's model and tokenizer; the size of the images stays.

    If the checkpoint's images were normalised by other statistics (MAE's tower has ImageNet's), so are the run's. Of a
    task on images without texts it is the vision tower alone.

    Args:
        config: The run, as a preset has it.
        checkpoint: What it starts from: one of ours, or an official .ckpt, which may not say of what model it is.

    Raises:
        UserError: There is no such checkpoint, it can't be read, or it has no language tower where there are texts.
    """
    path = Path(checkpoint)
    model, about = read_about(path)
    if model is not None:
        check_fits(model, path)
    config = dataclasses.replace(config, init_from=checkpoint)
    size = config.model.vision.image_size_px
    # Official checkpoints are of CLIP's normalisation.
    known = about.get("config", {}).get("data", {}).get("val_transform", "clip")
    if not config.model.has_texts:
        vision = config.model.vision if model is None else model.vision
        vision = dataclasses.replace(vision, image_size_px=size, weights="random")
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, vision=vision),
            data=_normalized_as(known, config.data),
        )
    if model is None:
        return config
    if not model.has_texts:
        raise UserError(f"{checkpoint} has no language tower, so that {config.task.kind} cannot start from it.")
    model = dataclasses.replace(
        model,
        vision=dataclasses.replace(model.vision, image_size_px=size, weights="random"),
        text=dataclasses.replace(model.text, weights="random"),
    )
    data = own_tokenizer(config.data, path)
    return dataclasses.replace(config, model=model, data=_normalized_as(known, data))


def _normalized_as(name: str, data: DataConfig) -> DataConfig:
    """Returns the configuration with the normalisation of another transform, "clip" or "imagenet"."""
    family, own = name.split("_")[0], data.val_transform.split("_")[0]
    names = {"train_transform": data.train_transform, "val_transform": data.val_transform}
    return dataclasses.replace(data, **{key: of.replace(own, family) for key, of in names.items()})


def finetune(config: FinetuneConfig) -> dict[str, Any] | None:
    """Fine-tunes a model, together with the other processes that torchrun may have started, and tests it.

    Args:
        config: The run; all processes take that of the first.

    Returns:
        What was written to summary.json, and the metrics of the test; None in all processes but the first.

    Raises:
        UserError: Something that the configuration names is missing or does not fit.
        Interrupted: A signal ended the run; what it had is saved.
    """
    processes = Processes(config.train.device)
    config = processes.from_first(lambda: config)
    check_task(config)
    task = make_task(config)
    config = dataclasses.replace(config, model=task.with_head(config.model))
    job = Job(
        name=f"finetune {config.task.kind}",
        loader=task.loader,
        longest_batch=task.longest_batch,
        score=task.score,
        validate=partial(validate, task, config),
        freeze=(TOWERS if config.model.has_texts else ("vision",)) if config.task.freeze_towers else (),
        about=task.about(),
    )
    summary = run(config, job, processes)
    processes.close()  # none has to wait for the test, which may take long
    if summary is None or not config.task.test:
        return summary
    if missing := [path for path in task.files("test") if not path.exists()]:
        tqdm.write(f"not tested: there is no {missing[0]}")
        return summary
    evaluation = _test(config, processes.device, batch_size=summary["micro_batch"])
    return summary | {f"test_{name}": interval.value for name, interval in evaluation.metrics.items()}


def check_task(config: FinetuneConfig) -> None:
    """Checks that the model can be fine-tuned for the task.

    Raises:
        UserError: It cannot; it says what to do instead.
    """
    if config.model.kind == "mpma" and config.task.kind == "retrieval":
        raise UserError(
            "MPMA finds images and texts by its global alignment, without fine-tuning for retrieval: measure it by "
            "fastm3ae evaluate CHECKPOINT --task retrieval, or train it on by fastm3ae pretrain --config "
            "RUN/config.yaml --init-from CHECKPOINT --model.objectives global_alignment local_alignment."
        )


def _test(config: FinetuneConfig, device: torch.device, batch_size: int) -> Evaluation:
    output = Path(config.output)
    tqdm.write(f"testing the weights that validated best: {output / 'test'}")
    return evaluate(
        EvaluateConfig(
            checkpoint=str(output / "checkpoints" / BEST),
            output=str(output / "test"),
            root=config.data.root,
            batch_size=batch_size,
            precision=config.train.precision,
            device=str(device),
            num_workers=config.train.num_workers,
            on_bad_sample=config.data.on_bad_sample,
        ),
    )


@torch.no_grad()
def validate(
    task: Task,
    config: FinetuneConfig,
    model: Model,
    batches: Iterable[ImageBatch],
    autocast: Callable[[], AbstractContextManager],
    processes: Processes,
) -> dict[str, float]:
    """Returns the mean loss and the task's metrics over all batches of all processes; "score" is the task's own.

    Of batches that ended early, because the run is to stop, there may be no metric and no score.

    Args:
        task: The task.
        config: The run.
        model: The model; its mode (training or evaluation) is left as it was.
        batches: Batches of this process, on the model's device, images normalised.
        autocast: Gives the context in which the model computes.
        processes: Those that share the work.
    """
    items: list[Item] = []
    loss = 0.0
    with model.evaluating():
        for batch in batches:
            with autocast():
                outputs = model(batch)
                (result,) = objectives.losses(outputs, batch, model.config).values()
            loss += float(result.mean) * len(batch)
            items += task.items(outputs[task.objective], batch)
    shares = processes.gather((items, loss))
    items = [item for share, _ in shares for item in share]
    if not items:
        return {}
    metrics = {f"{task.objective}_loss": sum(share_loss for _, share_loss in shares) / len(items)}
    found = task.metrics(items, num_resamples=1)
    metrics |= {name: interval.value for name, interval in found.items() if interval.value is not None}
    metrics |= processes.from_first(lambda: task.validation(config, model, autocast))
    return metrics | ({"score": metrics[task.score]} if task.score in metrics else {})


def _check_same_test(config: FinetuneConfig, folder: Path) -> None:
    """Raises a UserError if a complete run's test is of another run, or of other data, than is now asked for."""
    task = make_task(config)
    config = dataclasses.replace(config, model=task.with_head(config.model))
    config = resolve(config, read_tokenizer(config))
    (test,) = read_results([folder])
    state = {"config": test.about["configuration"], "fingerprints": test.about["fingerprints"], "num_processes": 1}
    check_same_run(state, config, task.dataset("test").fingerprints(), num_processes=1)


def finetune_seeds(config: FinetuneConfig, seeds: Sequence[int]) -> str:
    """Fine-tunes once for each seed, into folders of their own, and compares the tests.

    A run that was begun goes on, and one that is complete is not made again: what was interrupted is ended by the same
    command.

    Args:
        config: The run; its output is the folder of all runs.
        seeds: The seeds.

    Returns:
        The table, as Markdown; it and its content as JSON are written to results.md and results.json.

    Raises:
        UserError: As ``finetune``; or there is nothing to test on, a seed is given twice, a complete run is another
            one, or there are several processes.
    """
    if is_one_of_several():
        raise UserError("--seeds makes one run after another in one process: start it without torchrun.")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds must name different seeds, got {' '.join(map(str, seeds))}.")
    if config.resume not in (None, "auto"):
        raise UserError(f"--seeds goes on with each seed's own run, so that --resume cannot be {config.resume}.")
    if not config.task.test:
        raise UserError("--seeds compares tests, but task.test is off.")
    dataset_files(config.data.root, config.data.datasets, "test")
    folders = [Path(config.output, f"seed_{seed}") for seed in seeds]
    runs = [
        dataclasses.replace(config, seed=seed, output=str(folder), resume="auto")
        for seed, folder in zip(seeds, folders, strict=True)
    ]
    for of_seed, folder in zip(runs, folders, strict=True):
        if (folder / "test" / METRICS_FILE).is_file():
            _check_same_test(of_seed, folder / "test")
        else:
            finetune(of_seed)
    markdown, content = results_table(read_results([folder / "test" for folder in folders]))
    Path(config.output, "results.md").write_text(markdown)
    Path(config.output, "results.json").write_text(json.dumps(content, indent=2) + "\n")
    return markdown
