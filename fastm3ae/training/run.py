"""A run from its configuration: checks, model, data, checkpoint, then the loop; whatever it is for."""

import dataclasses
import os
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import RunConfig
from fastm3ae.config.files import to_dict
from fastm3ae.data.loader import Loader, Place
from fastm3ae.data.text import fingerprint
from fastm3ae.device import autocast_context
from fastm3ae.errors import UserError
from fastm3ae.kernels import PACKED_ATTENTION_HEAD_DIMS
from fastm3ae.model.attention import backends
from fastm3ae.model.build import Model, build_model
from fastm3ae.training.checkpoint import Checkpointer
from fastm3ae.training.distributed import Processes
from fastm3ae.training.job import Job
from fastm3ae.training.loop import Trainer
from fastm3ae.training.memory import fit_micro_batch
from fastm3ae.training.remembered import find_once
from fastm3ae.training.resume import check_same_run, find_checkpoint
from fastm3ae.training.run_folder import RunFolder
from fastm3ae.training.saved import load_training_state
from fastm3ae.weights.pretrained import init_model, read_about
from fastm3ae.weights.towers import load_tower_weights, read_tokenizer, resolve

COMPILERS = ("g++", "c++", "clang++")  # where torch.compile looks, besides CXX

__all__ = ["build_loader", "check_device", "resolve_and_build", "run", "with_micro_batch"]


def run(config: RunConfig, job: Job, processes: Processes) -> dict[str, Any] | None:
    """Trains, together with the other processes.

    Args:
        config: The run; the same in all processes.
        job: What it is for.
        processes: Those that train together; they part at the end.

    Returns:
        What was written to summary.json; None in all processes but the first.

    Raises:
        UserError: Something that the configuration names is missing or does not fit.
        Interrupted: A signal ended the run; what it had is saved.
    """
    if processes.are_restarted and config.resume is None:
        config = dataclasses.replace(config, resume="auto")
    config, tokenizer, model = resolve_and_build(config, processes)
    checkpoint, notes = processes.from_first(lambda: find_checkpoint(config, processes.are_restarted))
    state = None if checkpoint is None else load_training_state(checkpoint)
    config = with_micro_batch(config, model, job, processes, state)
    train_loader, val_loader = (build_loader(config, tokenizer, job, split, processes) for split in ("train", "val"))
    notes += [*train_loader.dataset.notes, *val_loader.dataset.notes]
    fingerprints = processes.from_first(lambda: _fingerprints(train_loader, val_loader, tokenizer))
    if checkpoint is None:
        notes += _start_weights(model, config)
    else:
        notes += check_same_run(state, config, fingerprints, processes.number)
        init_model(model, checkpoint)
    model.freeze(*job.freeze)
    if processes.rank:  # the first one goes on with what is left of the seed after the weights
        processes.seed(config.seed)
    if config.train.step == "packed" and config.model.has_texts:
        notes.append(f"attention on {processes.device.type}: {backends(processes.device.type)}")
    run_folder = None

    def open_run_folder() -> None:
        nonlocal run_folder
        files = [*train_loader.dataset.table.paths, *val_loader.dataset.table.paths]
        data = {"files": [{"path": str(file), "bytes": file.stat().st_size} for file in files]}
        progress = (
            {} if state is None else {"step": state["step"], "is_validated": state["validated_step"] == state["step"]}
        )
        run_folder = RunFolder(config, data | {"fingerprints": fingerprints}, processes.device, **progress)

    processes.from_first(open_run_folder)
    about = {
        "config": to_dict(config),
        "fingerprints": fingerprints,
        "weights_were_random": _started_at_random(config, checkpoint),
        **job.about,
    }
    train = config.train
    checkpointer = Checkpointer(
        Path(config.output) / "checkpoints",
        processes,
        train.keep_checkpoints,
        train.keep_every_steps,
        tokenizer,
        about,
        step=None if state is None else state["step"],
    )
    if processes.is_first:
        for note in notes:
            tqdm.write(note)
    trainer = Trainer(
        config, job, tokenizer, model, train_loader, val_loader, run_folder, checkpointer, processes, fingerprints
    )
    if state is not None:
        trainer.restore(state, checkpoint)
    try:
        summary = trainer.run()
    finally:
        if run_folder is not None:
            run_folder.close()
    return summary if processes.is_first else None


def resolve_and_build(
    config: RunConfig, processes: Processes
) -> tuple[RunConfig, PreTrainedTokenizerFast | None, Model]:
    """Returns the resolved configuration, the tokenizer, and the model with random weights on the process's device.

    Draws the demo's corpus first, where the run wants it.

    Raises:
        UserError: Something that the configuration names is missing or does not fit.
    """
    if config.data.draw_demo:
        processes.from_first(lambda: _draw_demo(config.data.root))
    tokenizer = read_tokenizer(config)
    config = resolve(config, tokenizer)
    check_device(config, processes)
    torch.manual_seed(config.seed)
    return config, tokenizer, build_model(config.model).to(processes.device)


def check_device(config: RunConfig, processes: Processes) -> None:
    """Checks that the processes' devices can do what the run asks for.

    Raises:
        UserError: There is no GPU for CUDA graphs, or more than one process; no compiler for ``torch.compile``; or the
            packed step's attention on a GPU does not take the model's heads.
    """
    if config.train.compiled and not any(map(shutil.which, [os.environ.get("CXX", "g++"), *COMPILERS])):
        raise UserError(
            f"train.compiled needs a C++ compiler, but there is none of {', '.join(COMPILERS)} in PATH, "
            "and CXX names none."
        )
    if config.train.cuda_graphs and (processes.device.type != "cuda" or processes.number > 1):
        raise UserError(
            f"train.cuda_graphs works in one process on a GPU, got {processes.number} on {processes.device.type}."
        )
    if config.train.step != "packed" or processes.device.type != "cuda" or not config.model.has_texts:
        return
    taken = " or ".join(map(str, PACKED_ATTENTION_HEAD_DIMS))
    for name, part in (("model.text", config.model.text), ("model.fusion", config.model.fusion)):
        if part.width // part.num_heads not in PACKED_ATTENTION_HEAD_DIMS:
            raise UserError(
                f"{name} has heads of width {part.width // part.num_heads}; on a GPU the packed step takes {taken}. "
                f"Change {name}.width or {name}.num_heads, or take train.step original."
            )


def _draw_demo(root: str) -> None:
    from fastm3ae.data.demo import ensure_demo_corpus

    corpus = ensure_demo_corpus(Path(root))
    tqdm.write(f"{corpus.root}: {corpus.num_train} training images, synthetic: drawn by a program, no patient")


def _start_weights(model: Model, config: RunConfig) -> list[str]:
    """Loads what the run starts from, and returns notes on what that does not cover."""
    if config.init_from is None:
        load_tower_weights(model)
        return []
    report = init_model(model, Path(config.init_from), other_labels=True)
    parts = Counter(name.split(".")[0] for name in report.ignored)
    found = {"new": report.new, "ignored": [f"{part} ({number} tensors)" for part, number in parts.items()]}
    return [f"{config.init_from}: {what}: {', '.join(names)}" for what, names in found.items() if names]


def _started_at_random(config: RunConfig, resumed: Path | None) -> bool:
    """Returns whether no weight was trained by others, neither here nor in what the run started from."""
    # What a resumed run once started from may be gone; its own checkpoint says it.
    origin = resumed or config.init_from
    if origin is None:
        towers = [config.model.vision, *([config.model.text] if config.model.has_texts else [])]
        return all(tower.weights == "random" for tower in towers)
    return read_about(Path(origin))[1].get("weights_were_random", False)


def with_micro_batch(
    config: RunConfig, model: Model, job: Job, processes: Processes, state: dict[str, Any] | None = None
) -> RunConfig:
    """Returns the configuration with a number as ``train.micro_batch``.

    Args:
        config: The run, resolved.
        model: The model, on the process's device.
        job: What the run is for.
        processes: Those that train together.
        state: What a resumed run goes on with; its own number is taken where that is possible.
    """
    train = config.train
    if train.micro_batch != "auto":
        return config
    if state is not None and state["num_processes"] == processes.number:
        micro_batch = state["micro_batch"]
    else:
        most = -(-train.batch_size // processes.number)
        autocast, longest_batch = autocast_context(train, processes.device), partial(job.longest_batch, config)
        state_frac = 1 / processes.number_here if train.parallel == "fsdp" else 1.0
        micro_batch = find_once(
            lambda: fit_micro_batch(model, config, most, autocast, longest_batch, state_frac), config, most, processes
        )
    return dataclasses.replace(config, train=dataclasses.replace(train, micro_batch=micro_batch))


def build_loader(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerFast | None,
    job: Job,
    split: Literal["train", "val"],
    processes: Processes,
) -> Loader:
    """Returns the loader of this process's share in a split."""
    place = Place(micro_batch=config.train.micro_batch, rank=processes.rank, num_ranks=processes.number)
    cores = max(1, (os.cpu_count() or 1) // processes.number_here)
    return job.loader(config, tokenizer, split, place=place, num_workers=min(config.train.num_workers, cores))


def _fingerprints(
    train_loader: Loader, val_loader: Loader, tokenizer: PreTrainedTokenizerFast | None
) -> dict[str, str]:
    """Returns by the names of the data files, and for the tokenizer, a hash of what they hold."""
    found = {**train_loader.dataset.fingerprints(), **val_loader.dataset.fingerprints()}
    if tokenizer is not None:
        found["tokenizer"] = fingerprint(tokenizer)
    return found
