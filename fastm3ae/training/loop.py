"""Training: plain PyTorch, batch after batch, into a run folder."""

import itertools
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import RunConfig
from fastm3ae.configfile import to_dict
from fastm3ae.data.batch import ImageBatch
from fastm3ae.data.images import normalization
from fastm3ae.data.loader import Loader
from fastm3ae.device import autocast_context, batch_mover, compute_dtype
from fastm3ae.errors import Interrupted, UserError
from fastm3ae.model.build import Model
from fastm3ae.training.checkpoint import Checkpointer
from fastm3ae.training.distributed import Processes
from fastm3ae.training.graphs import PassGraphs, record_graph
from fastm3ae.training.interrupt import StopRequest
from fastm3ae.training.job import Job
from fastm3ae.training.memory import explain_full_memory
from fastm3ae.training.meter import Meter
from fastm3ae.training.run_folder import RunFolder
from fastm3ae.training.step import OptimizerStep

__all__ = ["Trainer", "build_step"]


def build_step(config: RunConfig, model: Model, num_steps: int, processes: Processes) -> OptimizerStep:
    """Returns what makes the run's steps on the model."""
    train, device = config.train, processes.device
    is_fp16 = compute_dtype(train, device) == torch.float16
    autocast = autocast_context(train, device)
    graphs = (
        PassGraphs(model, train.share_texts, train.compiled, tqdm.write, record_graph) if train.cuda_graphs else None
    )
    return OptimizerStep(model, config.optim, num_steps, processes, autocast, is_fp16, config.step_options(), graphs)


class Trainer:
    """The loop: when to step, log, validate, save and stop.

    Args:
        config: The resolved configuration; ``train.micro_batch`` is a number.
        job: What the run is for.
        tokenizer: For the words in the pictures; None: there are no texts.
        model: The model, on its device.
        train_loader: Training batches.
        val_loader: Validation batches.
        run_folder: Where everything is written; None in all processes but the first.
        checkpointer: Writes the checkpoints; None in all processes but the first.
        processes: Those that train together.
        fingerprints: What the data and the tokenizer hold, for the checkpoints.
    """

    def __init__(
        self,
        config: RunConfig,
        job: Job,
        tokenizer: PreTrainedTokenizerFast | None,
        model: Model,
        train_loader: Loader,
        val_loader: Loader,
        run_folder: RunFolder | None,
        checkpointer: Checkpointer | None,
        processes: Processes,
        fingerprints: dict[str, str],
    ) -> None:
        train = config.train
        self.config, self.job, self.tokenizer, self.model = config, job, tokenizer, model
        self.run_folder, self.checkpointer = run_folder, checkpointer
        self.train_loader, self.val_loader, self.processes = train_loader, val_loader, processes
        self.fingerprints = fingerprints
        from_epochs = train.num_epochs * len(train_loader) if train.num_epochs else None
        self.num_steps = min(steps for steps in (train.num_steps, from_epochs) if steps is not None)
        self.validate_every = train.validate_every_steps
        if train.validate_every_epochs is not None:
            self.validate_every = max(1, round(train.validate_every_epochs * len(train_loader)))
        self.make_step = build_step(config, model, self.num_steps, processes)
        self.meter = Meter(processes)
        self._to_device = batch_mover(config.data, processes.device)
        self.stop = StopRequest(is_quiet=not processes.is_first)
        self.step, self.saved_step, self.validated_step = 0, None, None
        self.position = (0, 0)  # epoch and batch to go on with
        self.num_skipped_now = 0  # in the epoch, up to there
        self.validation: dict[str, float] = {}
        self.best_score: float | None = None
        self.num_stale = 0  # validations since the best one
        self.num_skipped = {"train": 0, "val": 0}
        self.wall_s = 0.0

    def run(self) -> dict[str, Any]:
        """Trains to the end and returns the summary.

        Raises:
            Interrupted: A signal asked to stop; the steps made so far are saved.
            UserError: A sample or another process failed, or the last checkpoint could not be written.
        """
        with self.stop, tqdm(
            total=self.num_steps, initial=self.step, desc=self.job.name, unit="step", dynamic_ncols=True,
            disable=self.run_folder is None,
        ) as bar:  # fmt: skip
            try:
                self._train(bar)
            finally:
                if self.checkpointer is not None:
                    self.checkpointer.close()
        summary = self._summary()
        if self.run_folder is not None:
            self.run_folder.summarize(summary)
        return summary

    def _train(self, bar: tqdm) -> None:
        started = time.perf_counter() - self.wall_s
        self.model.train()
        batches = self._batches()
        self._follow_step()
        while self.step < self.num_steps:
            pieces = self.meter.wait(partial(self._next, batches))
            counts = self.make_step.count(pieces)
            num_stops, num_pairs, *totals = self.processes.sum(
                [self.stop.signal is not None, sum(map(len, pieces)), *counts]
            )
            if num_stops:
                break
            if num_pairs:
                self.meter.add(self._try_step(pieces, totals), sum(map(len, pieces)))
                self.step += 1
                bar.update()
            self.position, self.num_skipped_now = self.train_loader.state(), len(self.train_loader.bad_samples)
            self.wall_s = time.perf_counter() - started
            if num_pairs:
                self._follow_step(bar)
        self.wall_s = time.perf_counter() - started
        if self.validated_step != self.num_steps:
            self._stop_early()

    def _try_step(self, pieces: list[ImageBatch], totals: list[float]) -> dict[str, tuple[torch.Tensor, int]]:
        with explain_full_memory(self.processes.device, self.step + 1, self.config.train.micro_batch):
            return self.make_step(pieces, totals)

    def _follow_step(self, bar: tqdm | None = None) -> None:
        """Logs, validates and saves what is due after a step, or after resuming at it."""
        train, is_last = self.config.train, self.step == self.num_steps
        if bar is not None and (self.step % train.log_every_steps == 0 or is_last):
            values = self.meter.read()
            values["learning_rate"] = self.make_step.optimizer.param_groups[0]["lr"]
            self._log("train", values)
            bar.set_postfix_str(_brief(values), refresh=False)
        if self.step == 0:
            return
        is_best = False
        if (self.step % self.validate_every == 0 or is_last) and self.validated_step != self.step:
            self.meter.pause(self._validate)
            if self.validated_step == self.step:
                is_best = self.best_score is None or self.validation["score"] > self.best_score
                self.best_score = self.validation["score"] if is_best else self.best_score
                self.num_stale = 0 if is_best else self.num_stale + 1
                is_last = self._end_if_stale() or is_last
        is_due = self.step % train.save_every_steps == 0 or is_last or is_best
        if is_due and (self.saved_step != self.step or is_best):
            self.meter.pause(partial(self._save, is_best))

    def _end_if_stale(self) -> bool:
        """Makes this step the last one if the last validations found nothing better; returns whether it is."""
        patience = self.config.train.patience
        if patience is None or self.num_stale < patience:
            return False
        self.num_steps = self.step
        return True

    def _batches(self) -> Iterator[list[ImageBatch]]:
        """Yields this process's pieces of batch after batch, on the device, epoch after epoch."""
        first_epoch, first_batch = self.position
        for epoch in itertools.count(first_epoch):
            for pieces in self.train_loader.epoch(epoch, first_batch if epoch == first_epoch else 0):
                yield [self._to_device(piece) for piece in pieces]
            self._count_skipped("train", f"epoch {epoch}", self.train_loader)

    def _next(self, batches: Iterator[list[ImageBatch]]) -> list[ImageBatch]:
        try:
            return next(batches)
        except UserError:
            # A signal to the whole process group ends the loader's processes, too; the batch is not needed any more.
            if self.stop.signal is None:
                raise
            return []

    def _count_skipped(self, split: str, where: str, loader: Loader) -> None:
        """Counts the samples that were bad since the loader's epoch began, and says which was the first."""
        bad = loader.bad_samples
        if bad:
            tqdm.write(f"{where}: {len(bad)} bad samples skipped; the first: {bad[0]}")
        self.num_skipped[split] = len(bad) + (self.num_skipped[split] if split == "train" else 0)
        self.num_skipped_now = 0 if split == "train" else self.num_skipped_now

    def _log(self, split: str, values: dict[str, float]) -> None:
        if self.run_folder is not None:
            self.run_folder.log(self.step, split, values)

    def _validate(self) -> None:
        """Evaluates the validation split, logs it, and draws its first pairs; leaves all that when asked to stop."""
        first: list[ImageBatch] = []

        def pieces() -> Iterator[ImageBatch]:
            for pieces in itertools.islice(self.val_loader.epoch(0), self.config.train.max_val_batches):
                for piece in pieces:
                    if self.stop.signal is not None:
                        return
                    piece = self._to_device(piece)
                    first[:] = first or [piece]
                    yield piece

        metrics = self.job.validate(self.model, pieces(), self.make_step.autocast, self.processes)
        (num_stops,) = self.processes.sum([self.stop.signal is not None])
        if num_stops:
            return
        if "score" not in metrics:
            raise UserError(
                f"{self.job.score}, which chooses the best checkpoint, is not defined for the validation split, as "
                f"far as its {self.val_loader.num_pairs} items can be used."
            )
        self.validation, self.validated_step = metrics, self.step
        self._count_skipped("val", "validation", self.val_loader)
        self._log("val", metrics)
        if self.run_folder is None:
            return
        tqdm.write(f"step {self.step}, validation: {_brief(metrics)}")
        if first and self.config.train.num_pictures and self.job.draw is not None:
            mean, std = (t.flatten().tolist() for t in normalization(self.config.data.val_transform))
            pictures = self.job.draw(
                self.model, first[0], self.tokenizer, self.config.train.num_pictures, mean, std, self.make_step.autocast
            )
            for name, picture in pictures.items():
                self.run_folder.picture(self.step, name, picture)

    def _save(self, is_best: bool = False) -> None:
        of_each_process = self.processes.gather(
            {
                "torch_rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state() if self.processes.device.type == "cuda" else None,
                "meter": self.meter.state(),
                "num_skipped": self.num_skipped["train"] + self.num_skipped_now,
            }
        )
        self.saved_step = self.step
        if self.checkpointer is None:
            return
        state = {
            "step": self.step,
            **self.make_step.state(),
            "position": self.position,
            "of_each_process": of_each_process,
            "validation": self.validation,
            "validated_step": self.validated_step,
            "best_score": self.best_score,
            "num_stale": self.num_stale,
            "wall_s": self.wall_s,
            "config": to_dict(self.config),
            "fingerprints": self.fingerprints,
            "num_processes": self.processes.number,
            "micro_batch": self.config.train.micro_batch,
        }
        self.checkpointer.save(self.step, self.model, state, is_best)

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where a checkpoint's training state was taken.

        Raises:
            UserError: The state does not fit the model, as after a forced change of the configuration.
        """
        try:
            self.make_step.restore(state)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"The checkpoint's optimiser state does not fit this configuration: {error}") from error
        self.step = self.saved_step = state["step"]
        self.position, self.validation = tuple(state["position"]), state["validation"]
        self.validated_step, self.best_score = state["validated_step"], state["best_score"]
        self.num_stale, self.wall_s = state.get("num_stale", 0), state["wall_s"]
        self._end_if_stale()
        rank, device, number = self.processes.rank, self.processes.device, self.processes.number
        if len(state["of_each_process"]) == number:
            own = state["of_each_process"][rank]
            self.meter.restore(own["meter"], device)
            self.num_skipped["train"] = own["num_skipped"]
            torch.set_rng_state(own["torch_rng"])
            if own["cuda_rng"] is not None and device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda_rng"])
        else:
            self.processes.seed(self.config.seed, self.step)

    def _stop_early(self) -> None:
        """Saves what there is, unless that was done, and ends.

        Raises:
            Interrupted: Always.
        """
        if self.step and self.saved_step != self.step:
            self._save()
        if self.checkpointer is not None:
            self.checkpointer.close()
        signals = [signal for signal in self.processes.gather(self.stop.signal) if signal is not None]
        saved = f"step {self.step} is saved; --resume auto goes on from it" if self.step else "no step was made yet"
        raise Interrupted(f"{signals[0].name} stopped the run: {saved}.", int(signals[0]))

    def _summary(self) -> dict[str, Any]:
        skipped = self.num_skipped["train"] + self.num_skipped_now
        num_train, num_val = self.processes.sum([skipped, self.num_skipped["val"]])
        return {
            "steps": self.step,
            **self.validation,
            "best_score": self.best_score,
            "samples_per_s": self.meter.total_samples / max(self.meter.total_seconds, 1e-9),
            "data_wait_frac": self.meter.total_waited / max(self.meter.total_seconds, 1e-9),
            "wall_s": self.wall_s,
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "num_processes": self.processes.number,
            "micro_batch": self.config.train.micro_batch,
            "train_pairs": self.train_loader.num_pairs,
            "val_pairs": self.val_loader.num_pairs,
            "skipped_samples": {"train": int(num_train), "val": int(num_val)},
        }


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
