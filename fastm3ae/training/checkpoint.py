"""Checkpoints: a folder per step with the model's weights and the state that training needs to go on."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from fastm3ae.model.m3ae import M3AE
from fastm3ae.pretrained import save_model

__all__ = ["STATE_FILE", "save_checkpoint"]

STATE_FILE = "training_state.pt"


def save_checkpoint(folder: Path, step: int, model: M3AE, state: dict[str, Any], keep: int) -> Path:
    """Writes ``folder``/step_NNNNNN, which appears only when it is complete, and removes the oldest beyond ``keep``.

    Args:
        folder: The run's checkpoint folder.
        step: Optimiser steps made so far.
        model: The model.
        state: Optimiser, schedule, scaler, data position and random states: tensors and plain values.
        keep: How many of the newest checkpoints stay.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"step_{step:06d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(model, partial)
    torch.save(state, partial / STATE_FILE)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    for old in sorted(folder.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))[:-keep]:
        shutil.rmtree(old)
    return final
