"""Where a model's weights come from and go to: hub names, local folders, checkpoints of ours and of the original."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, BertModel, PreTrainedTokenizerFast, RobertaModel

from fastm3ae.config import ModelConfig, RunConfig, TextConfig
from fastm3ae.configfile import from_dict, to_dict
from fastm3ae.convert import config_from_official, from_official, read_official, to_official, unused_by_original
from fastm3ae.data.text import load_tokenizer
from fastm3ae.errors import UserError
from fastm3ae.model.build import Model, build_model
from fastm3ae.model.heads import HEADS
from fastm3ae.model.vision import resize_bias_tables, resize_positions

__all__ = [
    "WEIGHTS_FILE",
    "LoadReport",
    "convert_checkpoint",
    "has_tokenizer",
    "init_model",
    "load_model",
    "load_tower_weights",
    "read_about",
    "read_tokenizer",
    "read_weights",
    "resolve",
    "resolve_text",
    "save_model",
    "save_weights",
]

AnyRun = TypeVar("AnyRun", bound=RunConfig)

WEIGHTS_FILE = "model.safetensors"
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


def read_tokenizer(config: RunConfig) -> PreTrainedTokenizerFast | None:
    """Returns a run's tokenizer; None if its model reads no texts."""
    return load_tokenizer(config.data.tokenizer) if config.model.has_texts else None


def resolve(config: AnyRun, tokenizer: PreTrainedTokenizerFast | None) -> AnyRun:
    """Fills in what the tokenizer and pretrained towers decide, and checks that data and model fit.

    Raises:
        UserError: The longest text would not fit the language tower.
    """
    if tokenizer is None:
        return config
    text = resolve_text(config.model.text, tokenizer)
    longest = text.max_positions - (2 if text.kind == "roberta" else 0)
    if config.data.max_text_tokens > longest:
        raise UserError(
            f"data.max_text_tokens is {config.data.max_text_tokens}, but the language tower takes at most {longest} "
            f"tokens (model.text.max_positions {text.max_positions})."
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))


def resolve_text(config: TextConfig, tokenizer: PreTrainedTokenizerFast) -> TextConfig:
    """Fills in what the tokenizer and, unless the tower starts at random, the pretrained tower's own files say.

    Raises:
        UserError: The weights can't be found, are of another architecture, or have too small a vocabulary.
    """
    if config.weights != "random":
        pretrained = _from_hub(AutoConfig.from_pretrained, config.weights, "model.text.weights")
        if pretrained.model_type not in ("roberta", "bert"):
            raise UserError(
                f"model.text.weights {config.weights!r} is of the type {pretrained.model_type!r}, "
                f"expected 'roberta' or 'bert'."
            )
        config = dataclasses.replace(
            config,
            kind=pretrained.model_type,
            vocab_size=pretrained.vocab_size,
            pad_token_id=pretrained.pad_token_id,
            width=pretrained.hidden_size,
            num_layers=pretrained.num_hidden_layers,
            num_heads=pretrained.num_attention_heads,
            mlp_width=pretrained.intermediate_size,
            max_positions=pretrained.max_position_embeddings,
            num_token_types=pretrained.type_vocab_size,
            layer_norm_eps=pretrained.layer_norm_eps,
        )
    vocab_size = len(tokenizer) if config.vocab_size is None else config.vocab_size
    pad_token_id = tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
    if vocab_size < len(tokenizer):
        raise UserError(
            f"The tokenizer has {len(tokenizer)} entries, but model.text.vocab_size is {vocab_size}: "
            f"use the tokenizer that belongs to the language tower."
        )
    if pad_token_id != tokenizer.pad_token_id:
        raise UserError(
            f"The tokenizer pads with the id {tokenizer.pad_token_id}, the language tower with {pad_token_id}: "
            f"use the tokenizer that belongs to the language tower."
        )
    return dataclasses.replace(config, vocab_size=vocab_size, pad_token_id=pad_token_id)


def load_tower_weights(model: Model) -> None:
    """Loads the pretrained towers that ``vision.weights`` and ``text.weights`` name; "random" leaves a tower alone.

    Raises:
        UserError: The weights can't be found or are of another architecture.
    """
    vision = model.config.vision
    if vision.weights != "random":
        _load_vision(model, vision.weights)
    if not model.config.has_texts:
        return
    text = model.config.text
    if text.weights != "random":
        tower = RobertaModel if text.kind == "roberta" else BertModel
        pretrained = _from_hub(tower.from_pretrained, text.weights, "model.text.weights")
        model.text.load_state_dict(pretrained.state_dict())


def _from_hub(load, name: str, key: str):
    try:
        return load(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key} {name!r} is neither a local folder with the model's files nor to be had from the Hugging Face hub "
            f"({str(error).splitlines()[0]}); 'random' starts from scratch."
        ) from error


def _load_vision(model: Model, name: str) -> None:
    path = Path(name).expanduser()
    if path.exists():
        state = read_tensors(path)
    else:
        try:
            state = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(
                f"model.vision.weights {name!r} is neither a local file or folder nor a timm model that can be had "
                f"({str(error).splitlines()[0]}); 'random' starts from scratch."
            ) from error
    if any(key.startswith("visual.") for key in state):  # OpenAI's CLIP, which official checkpoints hold too
        state, _ = from_official({f"vision_encoder.{key}": tensor for key, tensor in state.items()}, model, "vision.")
    else:
        state = {f"vision.{key}": tensor for key, tensor in state.items()}
    state = _resized(state, model)
    own = {key: tensor for key, tensor in model.state_dict().items() if key.startswith("vision.")}
    differences = _differences(own, state)
    if differences:
        raise UserError(f"model.vision.weights {name!r} is of another architecture: {_some(differences)}.")
    model.load_state_dict({key: state[key].float() for key in own}, strict=False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a state dict from a safetensors or torch file, or from the one in a folder, without running its code.

    Raises:
        UserError: There is no such file, or it holds no tensors.
    """
    if path.is_dir():
        names = (WEIGHTS_FILE, "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} holds no weights: expected one of {', '.join(names)}.")
        path = found[0]
    if path.suffix == ".safetensors":
        return _read_safetensors(path)[0]
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a broken file; its first line says what was wrong
        raise UserError(f"{path} is not a readable file of weights: {str(error).splitlines()[0]}") from error
    for key in ("state_dict", "model"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no state dict: expected a dictionary of tensors.")
    return content


def _read_safetensors(path: Path, with_tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns a file's tensors, if they are wanted, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()} if with_tensors else {}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error


def _config_of(metadata: Mapping[str, str], path: Path) -> ModelConfig:
    if "fastm3ae_config" not in metadata:
        raise UserError(f"{path} is not a fastm3ae checkpoint: its header holds no configuration.")
    return from_dict(RunConfig(), {"model": json.loads(metadata["fastm3ae_config"])}).model


def save_model(model: Model, folder: Path) -> None:
    """Writes weights and configuration to ``folder``/model.safetensors."""
    save_weights(model.state_dict(), model.config, folder)


def save_weights(
    state: Mapping[str, Tensor], config: ModelConfig, folder: Path, about: Mapping[str, Any] | None = None
) -> None:
    """Writes a model's state dict, its configuration and what else is to be said of it to folder/model.safetensors."""
    tensors = {key: tensor.detach().contiguous() for key, tensor in state.items()}
    metadata = {"format": "pt", "fastm3ae_config": json.dumps(to_dict(config))}
    if about:
        metadata["fastm3ae_about"] = json.dumps(about)
    save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)


def read_weights(path: Path) -> tuple[dict[str, Tensor], ModelConfig | None]:
    """Reads one of our checkpoints (its folder or file), or an official .ckpt.

    Returns:
        The state dict, under our names for one of ours and under the official ones for an official one, and the
        model's configuration, None where the file doesn't hold one.

    Raises:
        UserError: There is no such checkpoint, or it can't be read.
    """
    path = _weights_file(path)
    if path.suffix != ".safetensors":
        official = read_official(path)
        try:
            config = config_from_official(official.config, official.state) if official.config else None
        except KeyError as error:
            raise UserError(f"{path} is not a checkpoint of the original M3AE: it lacks {error}.") from error
        return official.state, config
    state, metadata = _read_safetensors(path)
    return state, _config_of(metadata, path)


def _weights_file(path: Path) -> Path:
    """Returns the file of a checkpoint, which may be its folder; a UserError tells where a run folder has some."""
    path = path.expanduser()
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if file.is_file():
        return file
    found = [below.parent for below in (*path.glob(f"*/{WEIGHTS_FILE}"), *path.glob(f"checkpoints/*/{WEIGHTS_FILE}"))]
    if found:
        raise UserError(f"{path} is no checkpoint, but holds some: {', '.join(map(str, sorted(found)))}.")
    raise UserError(f"{file}: there is no such checkpoint file.")


def read_about(path: Path) -> tuple[ModelConfig | None, dict[str, Any]]:
    """Returns a checkpoint's model configuration, and what else its run said of it: nothing for an official one.

    Raises:
        UserError: There is no such checkpoint, or it can't be read.
    """
    file = _weights_file(path)
    if file.suffix != ".safetensors":
        return read_weights(file)[1], {}
    _, metadata = _read_safetensors(file, with_tensors=False)
    return _config_of(metadata, file), json.loads(metadata.get("fastm3ae_about", "{}"))


def has_tokenizer(checkpoint: Path) -> bool:
    """Returns whether a checkpoint's folder holds its tokenizer."""
    return (checkpoint / "tokenizer_config.json").is_file()


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
        state, leftovers = from_official(state, model, "" if model.config.has_texts else "vision.")
        ignored = [name for name in leftovers if not unused_by_original(name)]
    state = _resized(state, model)
    own = model.state_dict()
    if other_labels:
        unlike = {n.split(".")[0] for n in own.keys() & state.keys() if own[n].shape != state[n].shape} & LABEL_HEADS
        ignored += [name for name in state if name.split(".")[0] in unlike]
        state = {name: tensor for name, tensor in state.items() if name.split(".")[0] not in unlike}
    new = {name.split(".")[0] for name in own if name.startswith(HEADS) and name not in state}
    if model.config.kind == "mpma":
        new |= MPMA_OPTIONAL & ({name.split(".")[0] for name in own} - {name.split(".")[0] for name in state})
    differences = _differences({n: t for n, t in own.items() if n.split(".")[0] not in new}, state)
    if differences:
        raise UserError(f"{path} is a checkpoint of another architecture: {_some(differences)}.")
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in own}, strict=False)
    if "retrieval_head" in new:
        model.init_retrieval_head()
    return LoadReport(sorted(new), ignored + [name for name in state if name not in own])


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


def _resized(state: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Returns the state with its position embeddings or bias tables resized to the model's image size."""
    state = dict(state)
    positions = state.get("vision.pos_embed")
    if positions is not None and model.config.vision.kind != "swin":
        state["vision.pos_embed"] = resize_positions(positions[0], model.vision.pos_embed.shape[1] - 1)[None]
    if model.config.vision.kind == "swin":
        windows = {
            name: (round(len(table) ** 0.5) + 1) // 2
            for name, table in model.state_dict().items()
            if name.endswith("relative_position_bias_table") and name in state
        }
        state = resize_bias_tables(state, windows)
    return state


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Returns, in words, which tensors are missing or have another shape, layers of the same kind counted once."""
    found: dict[str, str] = {}
    for name, tensor in own.items():
        kind = re.sub(r"\.\d+\.", ".*.", name)
        if name not in state:
            found.setdefault(kind, f"{name} is missing")
        elif state[name].shape != tensor.shape:
            found.setdefault(kind, f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
    return list(found.values())


def _some(differences: list[str]) -> str:
    more = f", and {len(differences) - 5} more" if len(differences) > 5 else ""
    return ", ".join(differences[:5]) + more
