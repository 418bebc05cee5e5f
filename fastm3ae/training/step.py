"""One optimiser step: passes over the pieces of a batch, whose gradients add up to those of the batch as a whole."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastm3ae import objectives
from fastm3ae.config import OptimConfig
from fastm3ae.data.batch import ImageBatch
from fastm3ae.errors import UserError
from fastm3ae.training.contrast import Pass, passes
from fastm3ae.training.distributed import Processes
from fastm3ae.training.graphs import PassGraphs, Results
from fastm3ae.training.nonfinite import Nonfinite
from fastm3ae.training.optim import build_optimizer, build_schedule, parameter_groups
from fastm3ae.training.parallel import Copy
from fastm3ae.training.saved import part_sizes, read_parts

__all__ = ["OptimizerStep"]

ALONE = Pass()
OPTIMIZER = "optimizer."
"""How the names of the optimiser's saved tensors begin."""


class OptimizerStep:
    """Makes steps on a model.

    Attributes:
        optimizer: The optimiser.
        schedule: Its learning rates.
        nonfinite: Leaves out steps that are not finite, and scales the loss in fp16.

    Args:
        parallel: How the processes hold the model.
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
        parallel: Copy,
        config: OptimConfig,
        num_steps: int,
        processes: Processes,
        autocast: Callable[[], AbstractContextManager],
        is_fp16: bool,
        options: Mapping[str, Any],
        graphs: PassGraphs | None = None,
    ) -> None:
        self.model, self.config, self.processes, self.autocast = parallel.model, config, processes, autocast
        self.parallel, self.options, self.graphs = parallel, options, graphs
        self.optimizer = build_optimizer(parameter_groups(self.model, config), config)
        self.schedule = build_schedule(self.optimizer, config, num_steps)
        self.nonfinite = Nonfinite(processes.device, is_fp16)
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
        num_own = len(pieces)
        if pieces:
            self._spare = pieces[-1]
        if self._spare is None:
            raise UserError(f"Not one pair of the first batch can be used in process {self.processes.rank}.")
        # The other processes wait for this one's gradients, and where weights are gathered for each of its passes.
        pieces = [*pieces, *[self._spare] * (self.parallel.num_passes - num_own)]
        sums: dict[str, tuple[Tensor, int]] = {}
        losses = []
        for number, (piece, of_pass) in enumerate(zip(pieces, self._passes(pieces, num_own), strict=True), 1):
            is_own = number <= num_own
            counts = self.count([piece]) if is_own else [0] * len(totals)
            # The piece's share in the mean over the whole batch: a mean of means would weigh tokens differently. The
            # processes' gradients are averaged, hence the factor.
            shares = [
                self.processes.number * count / max(1, total) for count, total in zip(counts, totals, strict=True)
            ]
            with self.parallel.in_pass(is_last=number == len(pieces)):
                if self.graphs is None:
                    results = self._run(partial(self.parallel.forward, piece, **self.options), piece, shares, of_pass)
                else:
                    results = self.graphs(piece, shares, self._run)
            losses.append({name: values["loss"] for name, values in results.items()})
            for (name, values), count in zip(results.items(), counts, strict=True):
                for metric, value in values.items():
                    before, count_before = sums.get(f"{name}_{metric}", (0, 0))
                    value = value * count if metric == "loss" or not is_own else value
                    sums[f"{name}_{metric}"] = (before + value, count_before + count)
        scaler = self.nonfinite.scaler
        scaler.unscale_(self.optimizer)  # sooner than within the optimiser's step, which would write gradients twice
        if self.config.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm)
        scaler.step(self.optimizer)
        self.nonfinite.end_step(pieces, losses)
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=self.graphs is None)  # a graph adds to the gradients where they stand
        return sums

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
        self.nonfinite.scaled(torch.stack(losses).sum()).backward()
        return {name: {"loss": loss.mean.detach(), **loss.sums} for name, loss in results.items()}

    def _passes(self, pieces: Sequence[ImageBatch], num_own: int) -> list[Pass]:
        if "global_alignment" not in self.model.config.objectives:
            return [ALONE] * len(pieces)
        return passes(self.model, pieces, num_own, self.processes, self.autocast, self.options)

    def state(self) -> dict[str, Any]:
        """Returns what ``restore`` needs beside ``parts``, as JSON can say it."""
        return {
            "parameters": self._names(),
            "learning_rates": [group["lr"] for group in self.optimizer.param_groups],
            "schedule": self.schedule.state_dict(),
            **self.nonfinite.state(),
        }

    def parts(self) -> dict[str, Tensor]:
        """Returns the optimiser's tensors, by the names of the parameters and of what is kept of each."""
        return {
            f"{OPTIMIZER}{name}.{key}": tensor
            for group in self.optimizer.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
            for key, tensor in self.optimizer.state.get(parameter, {}).items()
        }

    def restore(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        """Goes on where ``state`` and ``parts`` were saved, by whatever number of processes.

        Raises:
            ValueError: They are not of this model.
        """
        if state["parameters"] != self._names():
            raise ValueError("the model has other parameters")
        parameters = dict(zip(self._names(), self._parameters(), strict=True))
        saved: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
        for part, size in part_sizes(checkpoint).items():
            if part.startswith(OPTIMIZER):
                name, _, key = part.removeprefix(OPTIMIZER).rpartition(".")
                if len(size) and size != parameters[name].shape:
                    raise ValueError(f"{name} is {tuple(parameters[name].shape)}, was {tuple(size)}")
                saved[name][key] = torch.empty_like(parameters[name]) if len(size) else torch.empty(())
        read_parts(checkpoint, {f"{OPTIMIZER}{name}.{key}": x for name, of in saved.items() for key, x in of.items()})
        groups = self.optimizer.state_dict()["param_groups"]
        for group, learning_rate in zip(groups, state["learning_rates"], strict=True):
            group["lr"] = learning_rate
        # A parameter that never had a gradient has no state.
        numbered = {number: of for number, of in enumerate(saved.values()) if of}
        self.optimizer.load_state_dict({"state": numbered, "param_groups": groups})
        self.schedule.load_state_dict(state["schedule"])
        self.nonfinite.restore(state)

    def _names(self) -> list[str]:
        return [name for group in self.optimizer.param_groups for name in group["names"]]

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
