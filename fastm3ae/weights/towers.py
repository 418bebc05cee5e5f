"""Pretrained towers: what their own files say of them, and their weights, from the hub, timm or a local folder."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import timm
from torch import Tensor
from transformers import AutoConfig, BertModel, PreTrainedTokenizerFast, RobertaModel

from fastm3ae.config import ImageConfig, RunConfig, TextConfig
from fastm3ae.data.text import hub_says, load_tokenizer
from fastm3ae.errors import UserError
from fastm3ae.model.build import Model
from fastm3ae.model.image_model import ImageModel
from fastm3ae.weights.convert import from_official
from fastm3ae.weights.fit import differences, resized
from fastm3ae.weights.header import WEIGHTS_FILE, read_safetensors
from fastm3ae.weights.torchfile import check_state, load_torch

__all__ = ["load_tower_weights", "read_tensors", "read_tokenizer", "resolve", "resolve_text"]

AnyRun = TypeVar("AnyRun", bound=RunConfig)


def read_tokenizer(config: RunConfig) -> PreTrainedTokenizerFast | None:
    """Returns a run's tokenizer; None if its model reads no texts."""
    return load_tokenizer(config.data.tokenizer) if config.model.has_texts else None


def resolve(config: AnyRun, tokenizer: PreTrainedTokenizerFast | None) -> AnyRun:
    """Fills in what the tokenizer and pretrained towers decide, and checks that data and model fit.

    Raises:
        UserError: The longest text would not fit the language tower.
    """
    if tokenizer is None or isinstance(config.model, ImageConfig):
        return config
    text = resolve_text(config.model.text, tokenizer)
    if config.data.max_text_tokens > text.max_tokens:
        raise UserError(
            f"data.max_text_tokens is {config.data.max_text_tokens}, but the language tower takes at most "
            f"{text.max_tokens} tokens (model.text.max_positions {text.max_positions})."
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))


def resolve_text(config: TextConfig, tokenizer: PreTrainedTokenizerFast) -> TextConfig:
    """Fills in what the tokenizer and, unless the tower starts at random, the pretrained tower's own files say.

    Raises:
        UserError: The weights can't be found, are of another architecture, or have too small a vocabulary.
    """
    if config.weights != "random":
        pretrained = _from_hub(
            partial(AutoConfig.from_pretrained, trust_remote_code=False), config.weights, "model.text.weights"
        )
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
    if isinstance(model, ImageModel):
        return
    text = model.config.text
    if text.weights != "random":
        tower = RobertaModel if text.kind == "roberta" else BertModel
        pretrained = _from_hub(tower.from_pretrained, text.weights, "model.text.weights")
        model.text.load_state_dict(pretrained.state_dict())


def _from_hub(load: Callable[[str], Any], name: str, key: str) -> Any:
    try:
        return load(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key} {name!r} is neither a local folder with the model's files nor to be had from the Hugging Face hub "
            f"({hub_says(error)}); 'random' starts from scratch."
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
                f"({hub_says(error)}); 'random' starts from scratch."
            ) from error
    if any(key.startswith("visual.") for key in state):  # OpenAI's CLIP, which official checkpoints hold too
        state, _ = from_official({f"vision_encoder.{key}": tensor for key, tensor in state.items()}, model, "vision.")
    else:
        state = {f"vision.{key}": tensor for key, tensor in state.items()}
    state = resized(state, model)
    own = {key: tensor for key, tensor in model.state_dict().items() if key.startswith("vision.")}
    wrong = differences(own, state)
    if wrong:
        raise UserError(f"model.vision.weights {name!r} is of another architecture: {wrong}.")
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
        return read_safetensors(path)[0]
    content = load_torch(path)
    for key in ("state_dict", "model"):
        content = content.get(key, content) if isinstance(content, dict) else content
    check_state(content, path)
    return content
