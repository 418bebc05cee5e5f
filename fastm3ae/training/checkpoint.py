"""Checkpoints: a folder per saved step that appears only when it is whole, written while training goes on.

step_NNNNNN/model.safetensors      the weights, the model's configuration, and what it was trained for
step_NNNNNN/parts/*.safetensors    what the optimiser and the random generators hold; each process writes a part
step_NNNNNN/training_state.json    what else training needs to go on exactly
step_NNNNNN/checkpoint.json        the sizes and SHA-256 of all these, by which a damaged checkpoint is known
best/model.safetensors             the weights that validated best
*/tokenizer.json, ...              the tokenizer, as transformers saves it

The parts are written by torch.distributed.checkpoint, and can be read by any number of processes. Nothing is pickled:
reading a checkpoint runs no code from it.
"""

import contextlib
import copy
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import ModelConfig
from fastm3ae.errors import UserError
from fastm3ae.training.distributed import Processes
from fastm3ae.training.saved import MANIFEST_FILE, PARTS, STATE_FILE, causes_of, checkpoints, size_and_hash
from fastm3ae.weights.pretrained import WEIGHTS_FILE, save_weights

__all__ = ["BEST", "Checkpointer"]

BEST = "best"


class Checkpointer:
    """Writes a run's checkpoints in the background, so that training waits only while the state is copied.

    A failure to write (a full disk) is said at once and leaves the checkpoints before as they were. Training goes on,
    but not for long: ``save`` raises it if the one before had failed, too, or if the weights were to become the best
    ones, which no later checkpoint has; ``close``, if no later one was written.

    Args:
        folder: The run's checkpoint folder, which all processes see.
        processes: Those that train together; all of them call each method.
        keep: How many of the newest checkpoints stay.
        keep_every_steps: Those of a multiple of so many steps stay for good; None: none does.
        tokenizer: Is saved beside the weights.
        about: What is said of the run in their header.
        step: After which the run goes on, because later checkpoints are damaged: these are removed. None: it is new.
    """

    def __init__(
        self,
        folder: Path,
        processes: Processes,
        keep: int,
        keep_every_steps: int | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        about: Mapping[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        self.folder, self.processes, self.about = folder, processes, about or {}
        self.keep, self.keep_every_steps = keep, keep_every_steps
        # A copy, because a thread must not read what this process may be splitting texts with.
        self.tokenizer = copy.deepcopy(tokenizer)
        if processes.is_first:
            later = [path for other, path in checkpoints(folder) if step is not None and other > step]
            for leftover in (*folder.glob(".step_*"), *later):  # the former of processes that were killed
                shutil.rmtree(leftover)
            self._remove_stale()
        is_cuda = processes.device.type == "cuda"
        options = StagingOptions(
            use_pinned_memory=is_cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=is_cuda
        )
        self._stagers = [DefaultStager(options), DefaultStager(options)]  # each uses its memory again
        self._group = processes.new_host_group()  # its own, because writing goes on beside all else
        self._writing: Future[Any] | None = None
        self._is_written = threading.Event()
        self._failure: str | None = None
        self._must_end = False

    def save(
        self,
        step: int,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        parts: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        state: Mapping[str, Any],
        is_best: bool,
    ) -> None:
        """Copies the state, then writes it without being waited for; waits for a checkpoint that is still written.

        Args:
            step: Optimiser steps made so far.
            config: The model's configuration.
            weights: The model's whole state dict; only the first process's is read.
            parts: What training needs in tensors beside the weights, by name: the same in all processes, or divided
                among them.
            own: What this process needs in tensors, by names that no other gives.
            state: What else is needed, as JSON can say it; only the first process's is read.
            is_best: Whether the weights become the ``best`` ones, too.

        Raises:
            UserError: As ``close``: too much could not be written before.
        """
        self.wait()
        if self._must_end:
            self._give_up()
        folder = self._partial(step)
        weights = self._stagers[0].stage(dict(weights)) if self.processes.is_first else {}
        reached = {name: state[name] for name in ("step", "validated_step", "validation") if state.get(name)}

        def finish() -> None:
            save_weights(weights, config, folder, {**self.about, **reached})
            (folder / STATE_FILE).write_text(json.dumps(state))
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            self._publish(step, folder, is_best)

        future = dcp.async_save(
            _share_of(parts, self.processes) | dict(own),
            storage_writer=_Writer(folder / PARTS, finish),
            process_group=self._group,
            async_stager=self._stagers[1],
            no_dist=self._group is None,
        )
        self._is_written.clear()
        self._writing = future
        future.add_done_callback(partial(self._end, step, is_best))

    def wait(self) -> None:
        """Returns when the last checkpoint is written."""
        if self._writing is None:
            return
        self._is_written.wait()
        error = self._writing.exception()
        if error is not None and not _is_of_storage(error):
            raise error

    def close(self) -> None:
        """Waits for the last checkpoint.

        Raises:
            UserError: It could not be written; the first process says so, the others end in silence (SystemExit).
        """
        self.wait()
        for stager in self._stagers:
            stager.close()
        if self._failure is not None:
            self._give_up()

    def _give_up(self) -> None:
        raise UserError(self._failure) if self.processes.is_first else SystemExit(2)

    def _partial(self, step: int) -> Path:
        return self.folder / f".step_{step:06d}.partial"

    def _publish(self, step: int, folder: Path, is_best: bool) -> None:
        """Gives a checkpoint that is written its name, and takes away those that are not kept."""
        final = self.folder / f"step_{step:06d}"
        old = folder.with_suffix(".old")
        written = [WEIGHTS_FILE, STATE_FILE, *sorted(f"{PARTS}/{path.name}" for path in (folder / PARTS).iterdir())]
        manifest = {"step": step, "files": {name: size_and_hash(folder / name) for name in written}}
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in (*folder.rglob("*"), folder):
            _flush(path)
        if is_best:  # first: a run that is killed after it goes on from the checkpoint before, and finds it again
            for path in folder.iterdir():
                if path.name not in (STATE_FILE, MANIFEST_FILE, PARTS):
                    _link(path, self.folder / BEST / path.name)
        if final.exists():
            os.replace(final, old)
        os.replace(folder, final)
        _flush(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        self._remove_stale()

    def _remove_stale(self) -> None:
        """Removes the checkpoints that are not kept; if it is killed meanwhile, none is left as a damaged one."""
        every = self.keep_every_steps
        for path in [path for step, path in checkpoints(self.folder)[: -self.keep] if every is None or step % every]:
            removed = path.with_name(f".{path.name}.removed")
            with contextlib.suppress(OSError):  # it stays until the next time
                os.replace(path, removed)
            shutil.rmtree(removed, ignore_errors=True)

    def _end(self, step: int, is_best: bool, writing: Future[Any]) -> None:
        """Is called when a checkpoint is written, or could not be."""
        try:
            error, had_failed = writing.exception(), self._failure is not None
            self._failure = None
            if error is not None:
                self._must_end = is_best or had_failed
                cause = causes_of(error)[0]
                self._failure = (
                    f"The checkpoint of step {step} could not be written to {self.folder} "
                    f"({(str(cause) or repr(cause)).splitlines()[0]}); those before are as they were."
                )
                if self.processes.is_first:
                    shutil.rmtree(self._partial(step), ignore_errors=True)
                    with contextlib.suppress(OSError):  # the log is on that disk, too; what failed is raised in time
                        tqdm.write(f"warning: {self._failure}")
        finally:  # training waits for it
            self._is_written.set()


def _is_of_storage(error: BaseException) -> bool:
    """Whether it is a full disk or the like: an OSError, or what torch and safetensors make of it."""
    return all(isinstance(cause, (OSError, RuntimeError, SafetensorError)) for cause in causes_of(error))


class _Writer(HuggingFaceStorageWriter):
    """Writes each process's tensors to a file of its own, and then calls ``finish`` in the first process."""

    def __init__(self, folder: Path, finish: Callable[[], None]) -> None:
        super().__init__(path=str(folder), save_distributed=True)
        self._finish = finish

    def finish(self, metadata: Metadata, results: Any) -> None:
        """Is called when all processes have written all they have."""
        super().finish(metadata, results)
        self._finish()


def _share_of(parts: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Returns what this process copies and writes: of what all processes hold, every so-manieth tensor."""
    own = {name: tensor for name, tensor in parts.items() if isinstance(tensor, DTensor)}
    rest = [name for name in parts if name not in own]
    return own | {name: parts[name] for name in rest[processes.rank :: processes.number]}


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
