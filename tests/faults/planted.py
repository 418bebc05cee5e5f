"""Faults of the program itself, that the campaign must find; each is planted into the processes that it starts."""

import shutil

import torch

from fastm3ae.training import run_folder
from fastm3ae.training.checkpoint import Checkpointer
from fastm3ae.training.saved import checkpoints

__all__ = ["forgets_the_random_state", "keeps_later_metrics", "removes_before_it_publishes"]


def forgets_the_random_state() -> None:
    """A resumed run draws its dropout from where a new one does."""
    torch.set_rng_state = lambda state: None


def keeps_later_metrics() -> None:
    """What was logged after the checkpoint is logged again."""
    run_folder._keep_lines = lambda path, is_kept: None


def removes_before_it_publishes() -> None:
    """While a checkpoint is written, there is none."""
    save = Checkpointer.save

    def remove_and_save(self: Checkpointer, *arguments, **options) -> None:
        self.wait()
        for _, path in checkpoints(self.folder):
            shutil.rmtree(path)
        save(self, *arguments, **options)

    Checkpointer.save = remove_and_save
