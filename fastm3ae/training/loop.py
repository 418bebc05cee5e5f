"""Pre-training: plain PyTorch, from a configuration to a run folder."""

import dataclasses
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from fastm3ae import objectives
from fastm3ae.config import PRETRAINING_OBJECTIVES, PretrainConfig, TrainConfig
from fastm3ae.data.batch import PretrainBatch
from fastm3ae.data.images import normalization, normalize
from fastm3ae.data.loader import Loader, pretrain_loader
from fastm3ae.data.text import load_tokenizer
from fastm3ae.errors import UserError
from fastm3ae.model.m3ae import M3AE
from fastm3ae.pretrained import init_model, load_tower_weights, resolve_text
from fastm3ae.training.checkpoint import save_checkpoint
from fastm3ae.training.optim import build_optimizer, build_schedule, parameter_groups
from fastm3ae.training.run_folder import RunFolder
from fastm3ae.training.validation import draw_reconstructions, validate

__all__ = ["pretrain"]


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Runs a pre-training and returns what it wrote to summary.json.

    Args:
        config: The run.

    Raises:
        UserError: Something that the configuration names is missing or does not fit.
    """
    device = pick_device(config.train.device)
    tokenizer = load_tokenizer(config.data.tokenizer)
    config = resolve(config, tokenizer)
    train_loader = pretrain_loader(config, tokenizer, "train")
    val_loader = pretrain_loader(config, tokenizer, "val")
    torch.manual_seed(config.seed)
    model = M3AE(config.model)
    load_tower_weights(model)
    if config.init_from is not None:
        report = init_model(model, Path(config.init_from))
        for what, names in report._asdict().items():
            if names:
                tqdm.write(f"{config.init_from}: {what}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}")
    run = RunFolder(Path(config.output), config, device, config.train.tensorboard)
    for note in [*train_loader.dataset.notes, *val_loader.dataset.notes]:
        tqdm.write(note)
    try:
        return Trainer(config, tokenizer, model.to(device), train_loader, val_loader, run, device).run()
    finally:
        run.close()


def resolve(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> PretrainConfig:
    """Fills in what the tokenizer and pretrained towers decide, and checks that data and model fit.

    Raises:
        UserError: The longest text would not fit the language tower, or an objective is not one of pre-training.
    """
    others = [name for name in config.model.objectives if name not in PRETRAINING_OBJECTIVES]
    if others:
        raise UserError(
            f"model.objectives names {others[0]!r}, which is no objective of pre-training; "
            f"expected some of {', '.join(PRETRAINING_OBJECTIVES)}."
        )
    text = resolve_text(config.model.text, tokenizer)
    longest = text.max_positions - (2 if text.kind == "roberta" else 0)
    if config.data.max_text_tokens > longest:
        raise UserError(
            f"data.max_text_tokens is {config.data.max_text_tokens}, but the language tower takes at most {longest} "
            f"tokens (model.text.max_positions {text.max_positions})."
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))


def pick_device(name: str) -> torch.device:
    """Returns the device that ``TrainConfig.device`` names."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"train.device must be auto, cpu, cuda or cuda:N, got {name!r}.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"train.device is {name!r}, but torch {torch.__version__} sees no GPU here.")
    return device


def autocast_context(train: TrainConfig, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Returns what makes the context in which the model computes: autocast on a GPU, nothing on a CPU."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if device.type != "cuda" or train.precision not in dtypes:
        return nullcontext
    return partial(torch.autocast, "cuda", dtype=dtypes[train.precision])


class Trainer:
    """The loop: optimiser steps, logging, validation, checkpoints.

    Args:
        config: The resolved configuration.
        tokenizer: For the words in the pictures.
        model: The model, on its device.
        train_loader: Training batches.
        val_loader: Validation batches.
        run: Where everything is written.
        device: Where the model computes.
    """

    def __init__(
        self,
        config: PretrainConfig,
        tokenizer: PreTrainedTokenizerFast,
        model: M3AE,
        train_loader: Loader,
        val_loader: Loader,
        run: RunFolder,
        device: torch.device,
    ) -> None:
        self.config, self.tokenizer, self.model, self.run_folder, self.device = config, tokenizer, model, run, device
        self.train_loader, self.val_loader = train_loader, val_loader
        self.num_steps = config.train.num_steps
        if config.train.num_epochs is not None:
            steps_per_epoch = max(1, len(train_loader) // config.train.accumulation_steps)
            self.num_steps = min(self.num_steps, config.train.num_epochs * steps_per_epoch)
        self.optimizer = build_optimizer(parameter_groups(model, config.optim), config.optim)
        self.schedule = build_schedule(self.optimizer, config.optim, self.num_steps)
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=device.type == "cuda" and config.train.precision == "fp16"
        )
        self.autocast = autocast_context(config.train, device)
        self.mean, self.std = (t.to(device) for t in normalization(config.data.val_transform))
        self.step = 0
        self.validation: dict[str, float] = {}
        self.num_skipped = {"train": 0, "val": 0}

    def run(self) -> dict[str, Any]:
        """Trains to the end and returns the summary."""
        train, started = self.config.train, time.perf_counter()
        meter = Meter()
        batches = self._train_batches(meter)
        self.model.train()
        with tqdm(total=self.num_steps, desc="pretrain", unit="step", dynamic_ncols=True) as bar:
            while self.step < self.num_steps:
                meter.add(self.optimizer_step([next(batches) for _ in range(train.accumulation_steps)]))
                self.step += 1
                last = self.step == self.num_steps
                if self.step % train.log_every_steps == 0 or last:
                    values = meter.read()
                    values["learning_rate"] = self.optimizer.param_groups[0]["lr"]
                    self.run_folder.log(self.step, "train", values)
                    bar.set_postfix_str(_brief(values), refresh=False)
                bar.update()
                if self.step % train.validate_every_steps == 0 or last:
                    meter.pause(self._validate)
                if self.step % train.save_every_steps == 0 or last:
                    meter.pause(self._save)
        self.num_skipped["train"] += self._report_skipped("the last epoch", self.train_loader)
        summary = self._summary(meter, time.perf_counter() - started)
        self.run_folder.summarize(summary)
        return summary

    def _train_batches(self, meter: "Meter") -> Iterator[PretrainBatch]:
        """Yields batches on the device, epoch after epoch."""
        for epoch in itertools.count():
            batches = self.train_loader.epoch(epoch)
            while (batch := meter.wait(partial(next, batches, None))) is not None:
                yield self._to_device(batch)
            self.num_skipped["train"] += self._report_skipped(f"epoch {epoch}", self.train_loader)

    def _report_skipped(self, where: str, loader: Loader) -> int:
        """Says how many samples were bad since the loader's epoch began, and which was the first."""
        bad = loader.bad_samples
        if bad:
            tqdm.write(f"{where}: {len(bad)} bad samples skipped; the first: {bad[0]}")
        return len(bad)

    def _to_device(self, batch: PretrainBatch) -> PretrainBatch:
        batch = batch.to(self.device, non_blocking=True)
        return dataclasses.replace(
            batch,
            image_BCHW=normalize(batch.image_BCHW, self.mean, self.std),
            false_image_FCHW=normalize(batch.false_image_FCHW, self.mean, self.std),
        )

    def optimizer_step(self, batches: list[PretrainBatch]) -> dict[str, tuple[Tensor, int]]:
        """Makes one step on the mean losses over all batches together; returns sums and counts of the metrics."""
        config = self.model.config
        counts = {
            name: [objectives.num_averaged(name, batch, config) for batch in batches] for name in config.objectives
        }
        sums: dict[str, tuple[Tensor, int]] = {}
        for i, batch in enumerate(batches):
            with self.autocast():
                outputs = self.model(batch)
                results = objectives.losses(outputs, batch, config)
            # The batch's share in the mean over all batches: a mean of means would weigh tokens differently.
            shares = {name: counts[name][i] / max(1, sum(counts[name])) for name in results}
            self.scaler.scale(
                torch.stack([loss.mean * shares[name] for name, loss in results.items()]).sum()
            ).backward()
            for name, loss in results.items():
                for metric, total in {"loss": loss.mean.detach() * counts[name][i], **loss.sums}.items():
                    before, count = sums.get(f"{name}_{metric}", (0, 0))
                    sums[f"{name}_{metric}"] = (before + total, count + counts[name][i])
        if self.config.optim.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()
        sums["samples"] = (torch.tensor(float(sum(map(len, batches)))), 1)
        return sums

    def _validate(self) -> None:
        """Evaluates the validation split, logs it, and draws its first pairs."""
        first: list[PretrainBatch] = []

        def batches() -> Iterator[PretrainBatch]:
            for number, batch in enumerate(self.val_loader.epoch(0)):
                if number == self.config.train.max_val_batches:
                    break
                batch = self._to_device(batch)
                first[:] = first or [batch]
                yield batch

        self.validation = validate(self.model, batches(), self.autocast)
        self.num_skipped["val"] = self._report_skipped("validation", self.val_loader)
        self.run_folder.log(self.step, "val", self.validation)
        tqdm.write(f"step {self.step}, validation: {_brief(self.validation)}")
        if first and "mim" in self.model.config.objectives and self.config.train.num_pictures:
            mean, std = (t.flatten().tolist() for t in (self.mean, self.std))
            sheet = draw_reconstructions(
                self.model, first[0], self.tokenizer, self.config.train.num_pictures, mean, std, self.autocast
            )
            self.run_folder.picture(self.step, "reconstructions", sheet)

    def _save(self) -> None:
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": self.train_loader.state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }
        folder = self.run_folder.path / "checkpoints"
        save_checkpoint(folder, self.step, self.model, state, self.config.train.keep_checkpoints)

    def _summary(self, meter: "Meter", seconds: float) -> dict[str, Any]:
        return {
            "steps": self.step,
            **self.validation,
            "samples_per_s": meter.total_samples / max(meter.total_seconds, 1e-9),
            "data_wait_frac": meter.total_waited / max(meter.total_seconds, 1e-9),
            "wall_s": seconds,
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "train_pairs": len(self.train_loader.dataset),
            "val_pairs": len(self.val_loader.dataset),
            "skipped_samples": self.num_skipped,
        }


class Meter:
    """Running sums on the device, read (and waited for) only when they are logged; and where the time goes."""

    def __init__(self) -> None:
        self.total_samples = self.total_seconds = self.total_waited = 0.0
        self._start_window()

    def _start_window(self) -> None:
        self._sums: defaultdict[str, Tensor | float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._waited, self._paused, self._started = 0.0, 0.0, time.perf_counter()

    def add(self, sums: dict[str, tuple[Tensor, int]]) -> None:
        """Adds one step's sums and counts."""
        for name, (total, count) in sums.items():
            self._sums[name] += total
            self._counts[name] += count

    def wait(self, fetch: Callable[[], Any]) -> Any:
        """Returns what ``fetch`` gives, and counts its time as waiting for data."""
        before = time.perf_counter()
        fetched = fetch()
        self._waited += time.perf_counter() - before
        return fetched

    def pause(self, work: Callable[[], None]) -> None:
        """Does some work whose time is not training time."""
        before = time.perf_counter()
        work()
        self._paused += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """Returns the means since the last call, with samples per second and the share of time spent on waiting."""
        sums = {name: float(total) for name, total in self._sums.items()}  # waits for the device
        seconds = time.perf_counter() - self._started - self._paused
        samples = sums.pop("samples", 0.0)
        values = {name: total / max(1, self._counts[name]) for name, total in sums.items()}
        values["loss"] = sum(value for name, value in values.items() if name.endswith("_loss"))
        values["samples_per_s"] = samples / max(seconds, 1e-9)
        values["data_wait_frac"] = self._waited / max(seconds, 1e-9)
        self.total_samples += samples
        self.total_seconds += seconds
        self.total_waited += self._waited
        self._start_window()
        return values


def _brief(values: dict[str, float]) -> str:
    """Returns metrics as a short line."""
    names = {"samples_per_s": "samples/s", "data_wait_frac": "data wait", "learning_rate": ""}
    parts = []
    for name, value in values.items():
        if name == "data_wait_frac":
            parts.append(f"{names[name]} {value:.0%}")
        elif names.get(name, name):
            parts.append(f"{names.get(name, name)} {value:.3g}")
    return ", ".join(parts)
