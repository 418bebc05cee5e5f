"""One optimiser step: passes over the pieces of a batch, whose gradients add up to those of the batch as a whole."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastm3ae import objectives
from fastm3ae.config import OptimConfig
from fastm3ae.data.batch import ImageBatch
from fastm3ae.errors import UserError
from fastm3ae.model.build import Model
from fastm3ae.training.contrast import Pass, passes
from fastm3ae.training.distributed import Processes
from fastm3ae.training.graphs import PassGraphs, Results
from fastm3ae.training.optim import build_optimizer, build_schedule, parameter_groups

__all__ = ["OptimizerStep"]

ALONE = Pass()


class OptimizerStep:
    """Makes steps on a model.

    Attributes:
        optimizer: The optimiser.
        schedule: Its learning rates.
        scaler: Scales the loss in fp16.

    Args:
        model: The model, on its device.
        config: How it learns.
        num_steps: Steps of the whole run.
        processes: Those that share each step.
        autocast: Gives the context in which the model computes.
        is_fp16: Whether gradients need scaling.
        options: How the model computes its objectives: what its ``forward`` takes.
        graphs: Makes the passes instead, as far as it can.
    """

    def __init__(
        self,
        model: Model,
        config: OptimConfig,
        num_steps: int,
        processes: Processes,
        autocast: Callable[[], AbstractContextManager],
        is_fp16: bool,
        options: Mapping[str, Any],
        graphs: PassGraphs | None = None,
    ) -> None:
        self.model, self.config, self.processes, self.autocast = model, config, processes, autocast
        self.options, self.graphs = options, graphs
        self.parallel = processes.wrap(model, leaves_some_alone=model.leaves_some_alone)
        self.optimizer = build_optimizer(parameter_groups(model, config), config)
        self.schedule = build_schedule(self.optimizer, config, num_steps)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=is_fp16)
        self._spare: ImageBatch | None = None

    def count(self, pieces: Sequence[ImageBatch]) -> list[int]:
        """Returns for each objective over how many tokens, patches or samples of these pieces its mean is taken."""
        names = self.model.config.objectives
        return [sum(objectives.num_averaged(name, piece, self.model.config) for piece in pieces) for name in names]

    def __call__(self, pieces: Sequence[ImageBatch], totals: Sequence[float]) -> dict[str, tuple[Tensor, int]]:
        """Makes one step on the mean losses over the whole batch.

        Args:
            pieces: This process's pieces of the batch, on the device. None at all if no pair of them can be used.
            totals: What ``count`` gives for the pieces of all processes together.

        Returns:
            For each metric its sum over this process's pieces, and over how many it was taken.
        """
        is_idle = not pieces
        if is_idle:  # the other processes wait for this one's gradients, which are zero
            if self._spare is None:
                raise UserError(f"Not one pair of the first batch can be used in process {self.processes.rank}.")
            pieces = [self._spare]
        self._spare = pieces[-1]
        sums: dict[str, tuple[Tensor, int]] = {}
        for number, (piece, of_pass) in enumerate(zip(pieces, self._passes(pieces, is_idle), strict=True), 1):
            counts = [0] * len(totals) if is_idle else self.count([piece])
            # The piece's share in the mean over the whole batch: a mean of means would weigh tokens differently. The
            # processes' gradients are averaged, hence the factor.
            shares = [
                self.processes.number * count / max(1, total) for count, total in zip(counts, totals, strict=True)
            ]
            with self._in_step(number == len(pieces)):
                if self.graphs is None:
                    results = self._run(partial(self.parallel, piece, **self.options), piece, shares, of_pass)
                else:
                    results = self.graphs(piece, shares, self._run)
            for (name, values), count in zip(results.items(), counts, strict=True):
                for metric, value in values.items():
                    before, count_before = sums.get(f"{name}_{metric}", (0, 0))
                    value = value * count if metric == "loss" else value
                    sums[f"{name}_{metric}"] = (before + value, count_before + count)
        if self.config.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=self.graphs is None)  # a graph adds to the gradients where they stand
        return {name: (value * 0, 0) for name, (value, _) in sums.items()} if is_idle else sums

    def _run(
        self,
        forward: Callable[[], dict[str, Any]],
        piece: ImageBatch,
        shares: Sequence[float] | Tensor,
        of_pass: Pass = ALONE,
    ) -> Results:
        """Makes a pass over a piece and adds the gradient of the sum of its losses, each times its share."""
        with self.autocast(), of_pass.dropout():
            results = objectives.losses(forward(), piece, self.model.config, of_pass.gather)
        losses = [loss.mean * share for loss, share in zip(results.values(), shares, strict=True)]
        self.scaler.scale(torch.stack(losses).sum()).backward()
        return {name: {"loss": loss.mean.detach(), **loss.sums} for name, loss in results.items()}

    def _passes(self, pieces: Sequence[ImageBatch], is_idle: bool) -> list[Pass]:
        if "global_alignment" not in self.model.config.objectives:
            return [ALONE] * len(pieces)
        return passes(self.model, pieces, is_idle, self.processes, self.autocast, self.options)

    def _in_step(self, is_last: bool) -> AbstractContextManager:
        """Returns the context of a pass: the processes share their gradients in the last one only."""
        return nullcontext() if is_last or self.parallel is self.model else self.parallel.no_sync()

    def state(self) -> dict:
        """Returns what ``restore`` needs."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict) -> None:
        """Goes on where ``state`` was taken."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
