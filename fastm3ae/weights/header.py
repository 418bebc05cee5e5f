"""What the header of one of our checkpoints says: of what model it is, and what its run tells of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastm3ae.config import ModelConfig, RunConfig
from fastm3ae.config.files import from_dict, parse_json
from fastm3ae.errors import UserError, first_line, is_text
from fastm3ae.model.build import build_model

__all__ = ["ABOUT", "CONFIG", "WEIGHTS_FILE", "about_of", "check_fits", "config_of", "read_safetensors", "weights_file"]

WEIGHTS_FILE = "model.safetensors"
CONFIG, ABOUT = "fastm3ae_config", "fastm3ae_about"  # keys of the header

# What a run tells of a checkpoint, and of which type; the configuration's fields are checked where it is read.
_ABOUT_TYPES = {"config": dict, "fingerprints": dict, "labels": list, "majority": dict, "weights_were_random": bool,
                "step": int, "validated_step": int, "validation": dict}  # fmt: skip
_SECTIONS = ("model", "data", "optim", "train", "task", "masking")
NEW_VALUES = 2**24
"""So many values a model may have beside those that its file has bytes for: heads that are new."""


def weights_file(path: Path) -> Path:
    """Returns the file of a checkpoint, which may be its folder; a UserError tells where a run folder has some."""
    path = path.expanduser()
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if file.is_file():
        return file
    found = [below.parent for below in (*path.glob(f"*/{WEIGHTS_FILE}"), *path.glob(f"checkpoints/*/{WEIGHTS_FILE}"))]
    if found:
        raise UserError(f"{path} is no checkpoint, but holds some: {', '.join(map(str, sorted(found)))}.")
    raise UserError(
        f"{file}: there is no such checkpoint file; expected {WEIGHTS_FILE} or its folder, or an official .ckpt."
    )


def read_safetensors(path: Path, with_tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns a file's tensors, if they are wanted, and its metadata.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()} if with_tensors else {}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {first_line(error)}") from error


def config_of(metadata: Mapping[str, str], path: Path) -> ModelConfig:
    """Returns the model's configuration.

    Args:
        metadata: The header of a checkpoint.
        path: The file, for the messages.

    Raises:
        UserError: It says none, or one that cannot be read.
    """
    if CONFIG not in metadata:
        raise UserError(f"{path} is not a fastm3ae checkpoint: its header holds no configuration.")
    try:
        config = from_dict(RunConfig(), {"model": _section(metadata[CONFIG])}).model
        if config.has_texts and None in (config.text.vocab_size, config.text.pad_token_id):
            raise ValueError("it does not say the size of the vocabulary and the padding's id")
    except (UserError, ValueError) as error:
        raise UserError(f"{path} is damaged in its configuration: {first_line(error)}") from error
    return config


def about_of(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Returns what the run tells of the checkpoint; nothing where it tells nothing.

    Args:
        metadata: The header of a checkpoint.
        path: The file, for the messages.

    Raises:
        UserError: It cannot be read, or something in it is of another type.
    """
    try:
        about = _section(metadata.get(ABOUT, "{}"))
        for name, kind in _ABOUT_TYPES.items():
            if not isinstance(about.get(name, kind()), kind):
                raise ValueError(f"{name} must be a {kind.__name__}")
        config = about.get("config", {})
        for name in _SECTIONS:
            if not isinstance(config.get(name, {}), dict):
                raise ValueError(f"config.{name} must be a dict")
        if not isinstance(config.get("data", {}).get("val_transform", ""), str):
            raise ValueError("config.data.val_transform must be a text")
        labels = about.get("labels", [])
        if not all(isinstance(label, str) and is_text(label) for label in labels):
            raise ValueError("the labels must be texts")
        if not all(type(label) is int and 0 <= label < len(labels) for label in about.get("majority", {}).values()):
            raise ValueError("the most frequent answers must be labels")
        if "task" in config and "labels" not in about:
            raise ValueError("the labels of the task are missing")
    except ValueError as error:
        raise UserError(f"{path} is damaged in what its run says of it: {first_line(error)}.") from error
    return about


def check_fits(config: ModelConfig, checkpoint: Path) -> None:
    """Checks that a model is none for which a file of weights is far too small, before it takes the memory.

    Args:
        config: The model, with the vocabulary resolved.
        checkpoint: Where the weights are: one of our checkpoints (its folder or file), or an official .ckpt.

    Raises:
        UserError: It is.
    """
    file = weights_file(checkpoint)
    with torch.device("meta"):
        num_values = sum(tensor.numel() for tensor in build_model(config).state_dict().values())
    if num_values > file.stat().st_size + NEW_VALUES:
        raise UserError(
            f"{file} is damaged: its configuration is of a model of {num_values} values, of which a file of "
            f"{file.stat().st_size} bytes can hold few."
        )


def _section(text: str) -> dict[str, Any]:
    """Returns a JSON object; a ValueError says what the text is instead."""
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError("expected an object of JSON")
    return content
