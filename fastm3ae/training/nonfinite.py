"""Steps whose losses or gradients are not finite: left out by the device, and found out when the log is read.

A gradient scaler checks the gradients of every step, and the optimiser leaves it out. In fp16 its scale is the one that
these gradients need, otherwise it is 1 and changes no bit. The host learns of it by the scale, which falls, but only
where it waits for the device anyway. All processes leave out the same steps, because they share their gradients.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastm3ae.data.batch import ImageBatch
from fastm3ae.errors import UserError
from fastm3ae.training.distributed import Processes

__all__ = ["NONFINITE_FILE", "Nonfinite"]

NONFINITE_FILE = "nonfinite.jsonl"
NEVER = 2**31 - 1  # so many steps until the scale grows are more than any run has


class Nonfinite:
    """Leaves steps out whose loss or gradients are not finite, and counts them.

    Steps by which fp16 finds its scale are left out as well, but not counted: those whose losses are finite, unless the
    scale has fallen below 1, where it is no cause any more.

    Attributes:
        scaler: Scales the loss, and checks the gradients.
        is_skipped: Whether the last step was left out: a scalar on the device, which is not waited for.
        num: How many steps were not finite, as far as they were read.
        in_a_row: How many of them follow one another, up to the last one that was read.
        since: The first of these.
        scale: The scale after the last step that was read.

    Args:
        device: Where the model computes.
        is_fp16: Whether gradients need scaling.
    """

    def __init__(self, device: torch.device, is_fp16: bool) -> None:
        self.is_fp16 = is_fp16
        options = {} if is_fp16 else {"init_scale": 1.0, "growth_interval": NEVER}
        self.scaler = torch.amp.GradScaler(device.type, **options)
        self._one = torch.ones((), device=device)
        self.scaler.scale(self._one)  # makes the scale, which must stand before a CUDA graph reads it
        self.is_skipped = self._one < 1
        self.num = self.in_a_row = self.since = 0
        self.scale = 1.0
        self._unread: list[_Step] = []

    def scaled(self, loss: Tensor) -> Tensor:
        """Returns the loss times the scale; one that is not finite gives no finite gradients, whatever its formula."""
        return self.scaler.scale(loss * (1 + 0 * loss.detach()))

    def end_step(self, pieces: Sequence[ImageBatch], losses: Sequence[Mapping[str, Tensor]]) -> None:
        """Must be called after the optimiser's step.

        Args:
            pieces: This process's pieces of the batch.
            losses: Of each of them every objective's loss, a scalar on the device.
        """
        before = self.scaler.scale(self._one)
        self.scaler.update()
        after = self.scaler.scale(self._one)
        if not self.is_fp16:
            self.scaler.update(new_scale=1.0)
        self.is_skipped = after < before
        values = torch.stack([before, after, *(loss.float() for of_piece in losses for loss in of_piece.values())])
        self._unread.append(_Step([piece.item_ids for piece in pieces], list(losses[0]), values))

    def read(self, step: int, processes: Processes, limit: int) -> list[dict[str, Any]]:
        """Counts the steps since the last call that were not finite, and returns what is known of them.

        Waits for the device. All processes must call this after the same step.

        Args:
            step: Number of the last step.
            processes: Those that made it.
            limit: Where ``in_a_row`` exceeds this, counting ends.

        Returns:
            For each step a dictionary of every process in which the loss of some piece was not finite, with these
            pieces; if only gradients were not, of every process with all pieces.
        """
        first = step - len(self._unread) + 1
        skipped = self._read_skipped(first)
        of_processes = processes.gather(skipped) if skipped else []
        lines = []
        for number in range(first, step + 1):
            if number not in skipped:
                self.in_a_row = 0
            elif of_step := _describe(number, [of[number] for of in of_processes]):
                lines += of_step
                self.num += 1
                self.in_a_row += 1
                self.since = number if self.in_a_row == 1 else self.since
                if self.in_a_row > limit:
                    break
        return lines

    def _read_skipped(self, first: int) -> dict[int, "_Skipped"]:
        """Returns what this process knows, by their numbers, of the steps since ``first`` that were left out."""
        unread, self._unread = self._unread, []
        values = iter(torch.cat([step.values for step in unread]).tolist() if unread else ())
        skipped = {}
        for number, step in enumerate(unread, first):
            before, self.scale = next(values), next(values)
            pieces = [_Piece({name: next(values) for name in step.objectives}, ids) for ids in step.item_ids]
            if self.scale < before:
                skipped[number] = _Skipped(self.scale, pieces)
        return skipped

    def values(self) -> dict[str, float]:
        """Returns what a line of the log says of all steps that were read, where there is anything to say."""
        counted = {"nonfinite_steps": self.num} if self.num else {}
        return counted | ({"loss_scale": self.scale} if self.is_fp16 else {})

    def too_many(self, run_folder: Path) -> UserError:
        """Returns what ends a run in this folder whose steps are not finite any more."""
        precision = ", or take train.precision bf16" if self.is_fp16 else ""
        return UserError(
            f"Losses or gradients were not finite in {self.in_a_row} steps in a row, from step {self.since} on, which "
            f"is more than train.max_nonfinite_steps; they changed no weight. {run_folder / NONFINITE_FILE} names "
            f"their items; if these are sound, lower optim.learning_rate or set optim.clip_grad_norm{precision}."
        )

    def state(self) -> dict[str, Any]:
        """Returns what ``restore`` needs; all steps must have been read."""
        return {
            "scaler": self.scaler.state_dict() if self.is_fp16 else {},
            "nonfinite": {"num": self.num, "in_a_row": self.in_a_row, "since": self.since},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state`` was taken."""
        if self.is_fp16 and state["scaler"]:  # there is none where a run is forced to go on in fp16
            self.scaler.load_state_dict(state["scaler"])
        counts = state["nonfinite"]
        self.num, self.in_a_row, self.since = counts["num"], counts["in_a_row"], counts["since"]


class _Step(NamedTuple):
    """A step of which nothing was read yet: the scale before it and after it, and the losses piece by piece."""

    item_ids: list[list[str]]
    objectives: list[str]
    values: Tensor


class _Piece(NamedTuple):
    losses: dict[str, float]
    item_ids: list[str]

    def is_finite(self) -> bool:
        return all(map(math.isfinite, self.losses.values()))

    def describe(self) -> dict[str, Any]:
        # JSON has no numbers that are not finite.
        losses = {name: loss if math.isfinite(loss) else str(loss) for name, loss in self.losses.items()}
        return {"losses": losses, "item_ids": self.item_ids}


class _Skipped(NamedTuple):
    """What one process knows of a step that was left out."""

    scale: float
    pieces: list[_Piece]


def _describe(step: int, of_processes: Sequence[_Skipped]) -> list[dict[str, Any]]:
    """Returns for each process that may be to blame what it knows; none if it was fp16's search for its scale."""
    suspects = [[piece for piece in skipped.pieces if not piece.is_finite()] for skipped in of_processes]
    if not any(suspects) and of_processes[0].scale < 1:
        suspects = [skipped.pieces for skipped in of_processes]
    return [
        {"step": step, "process": rank, "pieces": [piece.describe() for piece in pieces]}
        for rank, pieces in enumerate(suspects)
        if pieces
    ]
