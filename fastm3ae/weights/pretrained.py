"""Where a model's weights come from and go to: hub names, local folders, checkpoints of ours and of the original."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastm3ae.config import DataConfig, ModelConfig
from fastm3ae.config.files import from_dict, to_dict
from fastm3ae.errors import UserError, first_line
from fastm3ae.model.build import Model, build_model
from fastm3ae.model.heads import HEADS
from fastm3ae.model.m3ae import M3AE
from fastm3ae.weights.convert import config_from_official, from_official, read_official, to_official, unused_by_original
from fastm3ae.weights.fit import differences, resized
from fastm3ae.weights.header import (
    ABOUT,
    CONFIG,
    WEIGHTS_FILE,
    about_of,
    check_fits,
    config_of,
    read_safetensors,
    weights_file,
)

__all__ = [
    "WEIGHTS_FILE",
    "LoadReport",
    "convert_checkpoint",
    "data_of",
    "init_model",
    "load_model",
    "own_tokenizer",
    "read_about",
    "read_weights",
    "save_model",
    "save_weights",
]

# What an MPMA has only if an objective reads it, besides the heads.
MPMA_OPTIONAL = {"image_proj", "text_proj", "fusion", "image_pooler", "text_pooler"}

LABEL_HEADS = {"vqa_head", "classification_head", "image_classification_head"}


class LoadReport(NamedTuple):
    """What a checkpoint did not cover.

    Args:
        new: Parts of the model that only some objectives have, and the checkpoint has not; they keep their initial
            weights.
        ignored: Tensors of the checkpoint that the model has no place for.
    """

    new: list[str]
    ignored: list[str]


def save_model(model: Model, folder: Path) -> None:
    """Writes weights and configuration to ``folder``/model.safetensors."""
    save_weights(model.state_dict(), model.config, folder)


def save_weights(
    state: Mapping[str, Tensor], config: ModelConfig, folder: Path, about: Mapping[str, Any] | None = None
) -> None:
    """Writes a model's state dict, its configuration and what else is to be said of it to folder/model.safetensors."""
    tensors = {key: tensor.detach().contiguous() for key, tensor in state.items()}
    metadata = {"format": "pt", CONFIG: json.dumps(to_dict(config))}
    if about:
        metadata[ABOUT] = json.dumps(about)
    save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)


def read_weights(path: Path) -> tuple[dict[str, Tensor], ModelConfig | None]:
    """Reads one of our checkpoints (its folder or file), or an official .ckpt.

    Returns:
        The state dict, under our names for one of ours and under the official ones for an official one, and the
        model's configuration, None where the file doesn't hold one.

    Raises:
        UserError: There is no such checkpoint, or it can't be read.
    """
    path = weights_file(path)
    if path.suffix != ".safetensors":
        official = read_official(path)
        try:
            config = config_from_official(official.config, official.state) if official.config else None
        except KeyError as error:
            raise UserError(f"{path} is not a checkpoint of the original M3AE: it lacks {error}.") from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:  # whatever stands in the file, is read
            raise UserError(f"{path} is not a checkpoint of the original M3AE: {first_line(error)}.") from error
        return official.state, config
    state, metadata = read_safetensors(path)
    return state, config_of(metadata, path)


def read_about(path: Path) -> tuple[ModelConfig | None, dict[str, Any]]:
    """Returns a checkpoint's model configuration, and what else its run said of it: nothing for an official one.

    Raises:
        UserError: There is no such checkpoint, or it can't be read.
    """
    file = weights_file(path)
    if file.suffix != ".safetensors":
        return read_weights(file)[1], {}
    _, metadata = read_safetensors(file, with_tensors=False)
    return config_of(metadata, file), about_of(metadata, file)


def own_tokenizer(data: DataConfig, checkpoint: Path) -> DataConfig:
    """Returns how inputs are made, with the tokenizer of a checkpoint's folder, if it has one."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    is_there = (folder / "tokenizer_config.json").is_file()
    return dataclasses.replace(data, tokenizer=str(folder)) if is_there else data


def data_of(about: Mapping[str, Any], checkpoint: Path) -> DataConfig:
    """Returns how a checkpoint's inputs are made, as far as its run says so; else as the original makes them.

    Args:
        about: What the run says (``read_about``).
        checkpoint: Where it stands; the tokenizer is that of its folder, if there is one.
    """
    return own_tokenizer(from_dict(DataConfig(), about.get("config", {}).get("data", {})), checkpoint)


def load_model(path: Path) -> Model:
    """Builds the model that a checkpoint was made of, with its weights.

    Args:
        path: One of our checkpoints (its folder or file), or an official .ckpt that holds its configuration.

    Raises:
        UserError: The checkpoint can't be read, or does not say its configuration.
    """
    _, config = read_weights(path)
    if config is None:
        raise UserError(f"{path} does not hold its configuration: build the model and use init_model.")
    check_fits(config, path)
    model = build_model(config)
    init_model(model, path)
    return model


def init_model(model: Model, path: Path, *, other_labels: bool = False) -> LoadReport:
    """Starts a model from a checkpoint. Heads may differ; position embeddings are resized; the rest must agree.

    MPMA may also find no fusion in the checkpoint, or no poolers, which it has for tasks alone. An image model takes
    the vision tower, and its head if there is the same.

    Args:
        model: The model.
        path: One of our checkpoints (its folder or file), or an official .ckpt.
        other_labels: Whether the checkpoint may have another number of labels; the head of these then starts anew.

    Raises:
        UserError: The checkpoint can't be read, or is of another architecture (what differs is said).
    """
    state, _ = read_weights(path)
    ignored: list[str] = []
    if not any(name.startswith("vision.") for name in state):
        if model.config.kind == "mpma":
            raise UserError(f"{path} is a checkpoint of the original M3AE, from which MPMA cannot start.")
        try:
            state, leftovers = from_official(state, model, "" if model.config.has_texts else "vision.")
        except RuntimeError as error:  # tensors that should be stacked are not alike
            raise UserError(f"{path} is a checkpoint of another architecture: {first_line(error)}.") from error
        ignored = [name for name in leftovers if not unused_by_original(name)]
    state = resized(state, model)
    own = model.state_dict()
    if other_labels:
        unlike = {n.split(".")[0] for n in own.keys() & state.keys() if own[n].shape != state[n].shape} & LABEL_HEADS
        ignored += [name for name in state if name.split(".")[0] in unlike]
        state = {name: tensor for name, tensor in state.items() if name.split(".")[0] not in unlike}
    new = {name.split(".")[0] for name in own if name.startswith(HEADS) and name not in state}
    if model.config.kind == "mpma":
        new |= MPMA_OPTIONAL & ({name.split(".")[0] for name in own} - {name.split(".")[0] for name in state})
    wrong = differences({n: t for n, t in own.items() if n.split(".")[0] not in new}, state)
    if wrong:
        raise UserError(f"{path} is a checkpoint of another architecture: {wrong}.")
    # Of a head that is not whole nothing is taken.
    taken = {name: tensor for name, tensor in state.items() if name in own and name.split(".")[0] not in new}
    model.load_state_dict(taken, strict=False)
    if isinstance(model, M3AE) and "retrieval_head" in new:
        model.init_retrieval_head()
    return LoadReport(sorted(new), ignored + [name for name in state if name not in taken])


def convert_checkpoint(source: Path, target: Path) -> None:
    """Writes a checkpoint under the official key names (``target`` ends in .ckpt) or as one of ours (a folder).

    Raises:
        UserError: The source can't be read, or the target exists.
    """
    if target.exists():
        raise UserError(f"{target} exists: choose another name.")
    model = load_model(source)
    if model.config.kind != "m3ae":
        raise UserError(f"{source} is a checkpoint of {model.config.kind}, which the original M3AE does not have.")
    if target.suffix == ".ckpt":
        torch.save({"state_dict": to_official(model.state_dict(), model)}, target)
    else:
        target.mkdir(parents=True)
        save_model(model, target)
