"""Checkpoints: a folder per saved step that appears only when it is whole, written while training goes on.

step_NNNNNN/model.safetensors    the weights, the model's configuration, and what it was trained for
step_NNNNNN/training_state.pt    what training needs to go on exactly
step_NNNNNN/checkpoint.json      the sizes and SHA-256 of both, by which a damaged checkpoint is known
best/model.safetensors           the weights that validated best
*/tokenizer.json, ...            the tokenizer, as transformers saves it
"""

import contextlib
import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import ModelConfig
from fastm3ae.errors import UserError
from fastm3ae.model.build import Model
from fastm3ae.pretrained import WEIGHTS_FILE, save_weights

__all__ = ["BEST", "Checkpointer", "checkpoints", "damage", "load_training_state", "newest_whole"]

STATE_FILE, MANIFEST_FILE, BEST = "training_state.pt", "checkpoint.json", "best"


class Checkpointer:
    """Writes a run's checkpoints in a thread, so that training waits only while the state is copied.

    A failure to write (a full disk) is said at once and leaves the checkpoints before as they were; training goes on,
    and ``close`` raises it if no later checkpoint was written.

    Args:
        folder: The run's checkpoint folder.
        keep: How many of the newest checkpoints stay.
        tokenizer: Is saved beside the weights.
        about: What is said of the run in their header.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        tokenizer: PreTrainedTokenizerFast | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.keep, self.about = folder, keep, about
        # A copy, because a thread must not read what this process may be splitting texts with.
        self.tokenizer = copy.deepcopy(tokenizer)
        for leftover in folder.glob(".step_*"):  # of a process that was killed while it wrote
            shutil.rmtree(leftover)
        self._copy: dict[str, Any] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._failure: str | None = None

    def save(self, step: int, model: Model, state: dict[str, Any], is_best: bool) -> None:
        """Copies the state, then writes it without being waited for; waits for a checkpoint that is still written.

        Args:
            step: Optimiser steps made so far.
            model: The model.
            state: What training needs beside the weights: nested dictionaries and lists of tensors and plain values.
            is_best: Whether the weights become the ``best`` ones, too.
        """
        self.wait()
        # The same memory each time: fresh pages cost more than the copy.
        self._copy = copy_to_host({"weights": model.state_dict(), "state": state}, self._copy)
        if next(model.parameters()).is_cuda:
            torch.cuda.synchronize()  # the copies are under way until then
        self._writing = self._thread.submit(self._write, step, model.config, self._copy, is_best)

    def wait(self) -> None:
        """Returns when the last checkpoint is written."""
        if self._writing is not None:
            self._writing.result()

    def close(self) -> None:
        """Waits for the last checkpoint.

        Raises:
            UserError: It could not be written.
        """
        self.wait()
        self._thread.shutdown()
        if self._failure is not None:
            raise UserError(self._failure)

    def _write(self, step: int, config: ModelConfig, state: dict[str, Any], is_best: bool) -> None:
        final = self.folder / f"step_{step:06d}"
        partial, old = (self.folder / f".{final.name}.{end}" for end in ("partial", "old"))
        try:
            partial.mkdir(parents=True)
            save_weights(state["weights"], config, partial, self.about)
            torch.save(state["state"], partial / STATE_FILE)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(partial)
            files = {name: _describe(partial / name) for name in (WEIGHTS_FILE, STATE_FILE)}
            (partial / MANIFEST_FILE).write_text(json.dumps({"step": step, "files": files}, indent=2) + "\n")
            for path in (*partial.iterdir(), partial):
                _flush(path)
            if final.exists():
                os.replace(final, old)
            os.replace(partial, final)
            _flush(self.folder)
            if is_best:
                for path in final.iterdir():
                    if path.name not in (STATE_FILE, MANIFEST_FILE):
                        _link(path, self.folder / BEST / path.name)
            self._failure = None
            stale = [path for _, path in checkpoints(self.folder)[: -self.keep]]
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:
            # A full disk is an OSError, or what torch and safetensors make of it.
            self._failure = (
                f"The checkpoint of step {step} could not be written to {self.folder} "
                f"({str(error).splitlines()[0]}); those before are as they were."
            )
            tqdm.write(f"warning: {self._failure}")
            stale = [partial]
        for path in (*stale, old):
            shutil.rmtree(path, ignore_errors=True)


def copy_to_host(value: Any, memory: Any = None) -> Any:
    """Returns nested dictionaries, lists and tuples with every tensor copied to the CPU.

    Args:
        value: What is copied; plain values are kept. Copies from a GPU may still be under way afterwards.
        memory: An earlier result, whose tensors are overwritten where they fit.
    """
    if isinstance(value, Tensor):
        fits = isinstance(memory, Tensor) and memory.shape == value.shape and memory.dtype == value.dtype
        host = memory if fits else torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return host.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        memory = memory if isinstance(memory, dict) else {}
        return {key: copy_to_host(item, memory.get(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        memory = memory if isinstance(memory, (list, tuple)) and len(memory) == len(value) else [None] * len(value)
        return type(value)(copy_to_host(*pair) for pair in zip(value, memory, strict=True))
    return value


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Returns the steps and folders of a run's checkpoints, oldest first."""
    found = ((path.name.removeprefix("step_"), path) for path in folder.glob("step_*"))
    return sorted((int(step), path) for step, path in found if step.isdigit())


def damage(checkpoint: Path) -> str | None:
    """Returns what is wrong with a checkpoint's files, None if they are as they were written."""
    try:
        files = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
        for name, written in files.items():
            size = (checkpoint / name).stat().st_size
            if size != written["bytes"]:
                return f"{name} has {size} of {written['bytes']} bytes"
            if _describe(checkpoint / name) != written:
                return f"{name} has another content than was written"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_FILE} is damaged"
    return None


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """Returns a run's newest checkpoint that is whole, and a note on each damaged one that is newer.

    Raises:
        UserError: There are checkpoints, but none is whole.
    """
    notes = []
    for _, path in reversed(checkpoints(folder)):
        fault = damage(path)
        if fault is None:
            return path, notes
        notes.append(f"{path} is damaged and passed over: {fault}.")
    if notes:
        raise UserError(f"No checkpoint in {folder} is whole: {' '.join(notes)}")
    return None, notes


def load_training_state(checkpoint: Path) -> dict[str, Any]:
    """Returns the state that was saved beside the weights, on the CPU; ``damage`` must have found none."""
    return torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in _blocks(file):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _blocks(file: Any, size: int = 2**20) -> Iterator[bytes]:
    return iter(lambda: file.read(size), b"")


def _flush(path: Path) -> None:
    """Makes sure that a file or folder survives a power failure, where the system can."""
    if path.is_dir() and os.name == "nt":  # Windows cannot flush folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(source: Path, target: Path) -> None:
    """Puts ``source`` in the place of ``target`` at once, without a copy where the file system can."""
    partial = target.with_name(f".{target.name}")
    target.parent.mkdir(exist_ok=True)
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    os.replace(partial, target)
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()  # both were the same file already, which a replacement leaves alone
