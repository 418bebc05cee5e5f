"""Training: plain PyTorch, batch after batch, into a run folder."""

import itertools
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import RunConfig
from fastm3ae.config.files import to_dict
from fastm3ae.data.batch import ImageBatch
from fastm3ae.data.images import normalization
from fastm3ae.data.loader import Loader
from fastm3ae.device import autocast_context, batch_mover, compute_dtype
from fastm3ae.errors import Interrupted, UserError
from fastm3ae.model.build import Model
from fastm3ae.training.checkpoint import Checkpointer
from fastm3ae.training.distributed import Processes, explain_gone_process
from fastm3ae.training.graphs import PassGraphs, record_graph
from fastm3ae.training.interrupt import StopRequest
from fastm3ae.training.job import Job
from fastm3ae.training.memory import explain_full_memory
from fastm3ae.training.meter import Meter
from fastm3ae.training.parallel import share
from fastm3ae.training.run_folder import RunFolder
from fastm3ae.training.saved import read_own
from fastm3ae.training.step import OptimizerStep
from fastm3ae.training.watchdog import Watchdog

__all__ = ["Trainer", "build_step"]

MAX_UNREAD_STEPS = 100  # the device is asked at least so often which steps it left out


def build_step(config: RunConfig, model: Model, num_steps: int, processes: Processes) -> OptimizerStep:
    """Returns what makes the run's steps on the model."""
    train, device = config.train, processes.device
    most_pairs = -(-train.batch_size // processes.number)
    num_passes = -(-most_pairs // train.micro_batch)
    parallel = share(model, processes, train.parallel, num_passes)
    is_fp16 = compute_dtype(train, device) == torch.float16
    autocast = autocast_context(train, device)
    graphs = (
        PassGraphs(model, train.share_texts, train.compiled, tqdm.write, record_graph) if train.cuda_graphs else None
    )
    return OptimizerStep(parallel, config.optim, num_steps, processes, autocast, is_fp16, config.step_options(), graphs)


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
        checkpointer: Writes the checkpoints.
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
        checkpointer: Checkpointer,
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
        self.watchdog = Watchdog(train.stall_timeout_s, processes, Path(config.output), lambda: self.step)
        self.make_step.autocast = self.watchdog.watching(self.make_step.autocast)
        train_loader.on_piece = val_loader.on_piece = self.watchdog.progress
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
        with self.stop, self.watchdog, tqdm(
            total=self.num_steps, initial=self.step, desc=self.job.name, unit="step", dynamic_ncols=True,
            disable=self.run_folder is None,
        ) as bar:  # fmt: skip
            try:
                with explain_gone_process():
                    self._train(bar)
            finally:
                self._close()
            with self.stop.held_back():
                self.train_loader.close()
                self.val_loader.close()
            self.watchdog.begin("summing up", waits=True)
            summary = self._summary()
        if self.run_folder is not None:
            self.run_folder.summarize(summary)
        return summary

    def _close(self) -> None:
        self.watchdog.begin("waiting for the last checkpoint")
        self.checkpointer.close()

    def _train(self, bar: tqdm) -> None:
        started = time.perf_counter() - self.wall_s
        self.model.train()
        batches = self._until_stopped(self._batches())
        self._follow_step()
        while self.step < self.num_steps:
            self.watchdog.begin("loading data")
            pieces = self.meter.wait(partial(self._next, batches))
            counts = self.make_step.count(pieces)
            self.watchdog.begin("exchanging counts", waits=True)
            num_stops, num_pairs, *totals = self.processes.sum(
                [self.stop.signal is not None, sum(map(len, pieces)), *counts]
            )
            if num_stops:
                break
            if num_pairs:
                self.watchdog.begin("computing the step")
                sums = self._try_step(pieces, totals)
                self.meter.add(sums, sum(map(len, pieces)), self.make_step.nonfinite.is_skipped)
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
        self.watchdog.begin("reading losses off the device", waits=True)
        if self.step % MAX_UNREAD_STEPS == 0:
            self._settle()
        if bar is not None and (self.step % train.log_every_steps == 0 or is_last):
            self._settle()
            values = self.meter.read()
            values["learning_rate"] = self.make_step.optimizer.param_groups[0]["lr"]
            self._log("train", values | self.make_step.nonfinite.values())
            bar.set_postfix_str(_brief(values), refresh=False)
        if self.step == 0:
            return
        is_best = False
        if (self.step % self.validate_every == 0 or is_last) and self.validated_step != self.step:
            self._settle()
            self.watchdog.begin("validating")
            with self.make_step.parallel.whole():
                self.meter.pause(self._validate)
            if self.validated_step == self.step:
                is_best = self.best_score is None or self.validation["score"] > self.best_score
                self.best_score = self.validation["score"] if is_best else self.best_score
                self.num_stale = 0 if is_best else self.num_stale + 1
                is_last = self._end_if_stale() or is_last
        is_due = self.step % train.save_every_steps == 0 or is_last or is_best
        if is_due and (self.saved_step != self.step or is_best):
            self._settle()
            self.watchdog.begin("saving a checkpoint")
            self.meter.pause(partial(self._save, is_best))

    def _settle(self) -> None:
        """Reads which steps were left out since the last call, and writes them down.

        Raises:
            UserError: Too many of them followed one another.
        """
        nonfinite, limit = self.make_step.nonfinite, self.config.train.max_nonfinite_steps
        self.meter.settle()
        lines = nonfinite.read(self.step, self.processes, limit)
        if lines and self.run_folder is not None:
            self.run_folder.log_nonfinite(lines)
        if lines and nonfinite.in_a_row > limit:
            raise nonfinite.too_many(Path(self.config.output)) if self.processes.is_first else SystemExit(2)

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
        return next(batches, [])

    def _until_stopped(self, batches: Iterator[list[ImageBatch]]) -> Iterator[list[ImageBatch]]:
        """Yields batches until a signal asks to stop; no more are needed then."""
        try:
            while self.stop.signal is None and (pieces := next(batches, None)) is not None:
                yield pieces
        except UserError:
            # A signal to the whole process group ends the loader's processes, too.
            if self.stop.signal is None:
                raise

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
            batches = itertools.islice(self.val_loader.epoch(0), self.config.train.max_val_batches)
            for pieces in self._until_stopped(batches):
                for piece in pieces:
                    if self.stop.signal is not None:
                        return
                    piece = self._to_device(piece)
                    first[:] = first or [piece]
                    yield piece
            self.watchdog.begin("joining the validations", waits=True)

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
            self.watchdog.begin("drawing pictures")
            mean, std = (t.flatten().tolist() for t in normalization(self.config.data.val_transform))
            pictures = self.job.draw(
                self.model, first[0], self.tokenizer, self.config.train.num_pictures, mean, std, self.make_step.autocast
            )
            for name, picture in pictures.items():
                self.run_folder.picture(self.step, name, picture)

    def _save(self, is_best: bool = False) -> None:
        rank, meter = self.processes.rank, self.meter.state()
        own = {"torch_rng": torch.get_rng_state()}
        if self.processes.device.type == "cuda":
            own["cuda_rng"] = torch.cuda.get_rng_state()
        own |= {f"sums.{name}": total for name, total in meter.pop("sums").items()}
        of_each_process = self.processes.gather(
            {"meter": meter, "num_skipped": self.num_skipped["train"] + self.num_skipped_now}
        )
        self.saved_step = self.step
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
        weights, parts = self.make_step.parallel.weights(), self.make_step.parts()
        own = {f"{_prefix(rank)}{name}": tensor for name, tensor in own.items()}
        self.checkpointer.save(self.step, self.model.config, weights, parts, own, state, is_best)

    def restore(self, state: dict[str, Any], checkpoint: Path) -> None:
        """Goes on where a checkpoint's training state was taken.

        Raises:
            UserError: The state does not fit the model, as after a forced change of the configuration.
        """
        try:
            self.make_step.restore(state, checkpoint)
        except ValueError as error:
            raise UserError(f"The checkpoint's optimiser state does not fit this configuration: {error}") from error
        self.step = self.saved_step = state["step"]
        self.position, self.validation = tuple(state["position"]), state["validation"]
        self.validated_step, self.best_score = state["validated_step"], state["best_score"]
        self.num_stale, self.wall_s = state["num_stale"], state["wall_s"]
        self._end_if_stale()
        rank, device, number = self.processes.rank, self.processes.device, self.processes.number
        if len(state["of_each_process"]) != number:
            self.processes.seed(self.config.seed, self.step)
            return
        of_process, own = state["of_each_process"][rank], read_own(checkpoint, _prefix(rank))
        sums = {name: own[f"sums.{name}"] for name in of_process["meter"]["counts"]}
        self.meter.restore({**of_process["meter"], "sums": sums}, device)
        self.num_skipped["train"] = of_process["num_skipped"]
        torch.set_rng_state(own["torch_rng"])
        if "cuda_rng" in own and device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"])

    def _stop_early(self) -> None:
        """Saves what there is, unless that was done, and ends.

        Raises:
            Interrupted: Always.
        """
        self.watchdog.begin("saving a checkpoint")
        if self.step and self.saved_step != self.step:
            self._settle()
            self._save()
        self._close()
        self.watchdog.begin("ending", waits=True)
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
            "nonfinite_steps": self.make_step.nonfinite.num,
        }


def _prefix(rank: int) -> str:
    """Returns how the names of what a process alone saves begin."""
    return f"process_{rank}."


def _brief(values: dict[str, float]) -> str:
    """Returns metrics as a short line."""
    forms = {"samples_per_s": "samples/s {:.3g}", "data_wait_frac": "data wait {:.0%}", "learning_rate": ""}
    parts = (forms.get(name, f"{name} {{:.3g}}").format(value) for name, value in values.items())
    return ", ".join(filter(None, parts))
