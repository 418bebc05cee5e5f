"""Parts of a checkpoint for programs that know nothing of fastm3ae: timm, transformers, and graphs of ``torch.export``.

Nothing is computed anew but in a graph: the towers are timm's and transformers' own modules.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models import save_for_hf
from torch import nn
from torch.export import Dim

from fastm3ae.config import ImageConfig, ModelConfig
from fastm3ae.data.images import normalization
from fastm3ae.data.text import load_tokenizer
from fastm3ae.errors import UserError
from fastm3ae.model.build import Model
from fastm3ae.model.embed import ImageEncoder, PairEncoder, TextEncoder
from fastm3ae.model.image_model import ImageModel
from fastm3ae.model.m3ae import M3AE
from fastm3ae.model.mpma import MPMA
from fastm3ae.model.vision import timm_model
from fastm3ae.weights.pretrained import data_of, load_model, read_about

__all__ = ["export_graph", "export_text", "export_vision"]

Part = Literal["image", "text", "pair"]

ENCODERS: dict[Part, type[nn.Module]] = {"image": ImageEncoder, "text": TextEncoder, "pair": PairEncoder}
FUSED = {"vision", "text", "image_proj", "text_proj", "modality_embeddings", "fusion", "image_pooler", "text_pooler"}
NEEDED: dict[Part, set[str]] = {"image": {"vision", "global_head"}, "text": {"text", "global_head"}, "pair": FUSED}
"""Parts of the model that an encoder reads; a graph would hold the weights of the others, too."""

INPUTS = "inputs.json"
"""The file beside a graph, in its archive, that says what its inputs are."""


def export_vision(checkpoint: Path, folder: Path) -> None:
    """Writes the vision tower as a folder of timm: ``timm.create_model("local-dir:FOLDER", pretrained=True)``.

    Its ``config.json`` tells architecture, sizes, and how images are resized, cut and normalised, which
    ``timm.data.create_transform`` follows. ``forward_features`` gives the tokens that ours gives; the call gives CLS of
    a ViT, and the mean over the patches of a Swin.

    Args:
        checkpoint: One of our checkpoints (its folder or file), or an official .ckpt that holds its configuration.
        folder: Must not exist.

    Raises:
        UserError: The checkpoint can't be read, or the folder exists.
    """
    _check_free(folder)
    model = load_model(checkpoint)
    mean, std = _normalization(checkpoint)
    size = model.config.vision.image_size_px
    name, sizes = timm_model(model.config.vision)
    inputs: dict[str, Any] = {"input_size": (3, size, size), "mean": mean, "std": std}
    inputs |= {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center", "license": None, "hf_hub_id": None}
    tower = timm.create_model(name, num_classes=0, pretrained_cfg_overlay=inputs, **sizes)
    tower.load_state_dict(model.vision.state_dict())
    save_for_hf(tower, str(folder), model_args=sizes, safe_serialization=True)


def export_text(checkpoint: Path, folder: Path) -> None:
    """Writes the language tower and its tokenizer as a folder of transformers: ``AutoModel.from_pretrained(FOLDER)``.

    Args:
        checkpoint: As of ``export_vision``.
        folder: Must not exist.

    Raises:
        UserError: The checkpoint can't be read or has no language tower, its tokenizer can't be found, or the folder
            exists.
    """
    _check_free(folder)
    model = _with_texts(load_model(checkpoint), checkpoint)
    tokenizer = deepcopy(load_tokenizer(data_of(read_about(checkpoint)[1], checkpoint).tokenizer))
    # So that a longer text is cut where the tokenizer is asked to, rather than a position looked up that is not there.
    tokenizer.model_max_length = model.config.text.max_tokens
    model.text.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def export_graph(checkpoint: Path, file: Path, part: Part) -> None:
    """Writes a part of the model as a graph, for any number of images and texts: ``torch.export.load(FILE)``.

    It takes normalised images (B, 3, S, S), or int64 token ids (B, T) and where they are padding (B, T, bool), or all
    three, and gives what ``fastm3ae.model.embed`` says, by name. The archive's extra file "inputs.json" says S, mean
    and standard deviation of images in [0, 1], the longest text and the padding's id. No Python of fastm3ae is needed.

    Args:
        checkpoint: As of ``export_vision``.
        file: Ends in .pt2, and must not exist.
        part: image, text, or pair: both, and the fusion of an M3AE.

    Raises:
        UserError: The checkpoint can't be read or has no such part, or the file exists or has another ending.
    """
    if file.suffix != ".pt2":
        raise UserError(f"{file} must end in .pt2, as torch.export wants it.")
    _check_free(file)
    model = load_model(checkpoint).eval()
    if part != "image":
        _with_texts(model, checkpoint)
    if part == "pair" and not isinstance(model, M3AE):
        raise UserError(
            f"{checkpoint} is of {model.config.kind}, whose fusion works on packed texts, which torch.export cannot "
            "write for any number of them: its parts are image and text."
        )
    for name in {name for name, _ in model.named_children()} - NEEDED[part]:
        delattr(model, name)
    examples, shapes = _examples(model.config, part)
    file.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        graph = torch.export.export(ENCODERS[part](model), tuple(examples), dynamic_shapes=tuple(shapes))
    torch.export.save(graph, file, extra_files={INPUTS: json.dumps(_inputs(model.config, part, checkpoint), indent=2)})


def _examples(config: ModelConfig, part: Part) -> tuple[list[torch.Tensor], list[dict[int, Dim]]]:
    """Returns example inputs, and which of their sizes may be others."""
    batch, size = Dim("batch"), config.image_size_px
    examples: list[torch.Tensor] = []
    shapes: list[dict[int, Dim]] = []
    if part != "text":
        examples, shapes = [torch.zeros(2, 3, size, size)], [{0: batch}]
    if not isinstance(config, ImageConfig) and part != "image":
        text = {0: batch, 1: Dim("num_tokens", min=2, max=config.text.max_tokens)}
        examples += [torch.full((2, 5), (config.text.pad_token_id or 0) + 1), torch.zeros(2, 5, dtype=torch.bool)]
        shapes += [text, text]
    return examples, shapes


def _inputs(config: ModelConfig, part: Part, checkpoint: Path) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    if part != "text":
        mean, std = _normalization(checkpoint)
        inputs |= {"image_size_px": config.image_size_px, "mean": mean, "std": std}
    if not isinstance(config, ImageConfig) and part != "image":
        inputs |= {"max_tokens": config.text.max_tokens, "pad_token_id": config.text.pad_token_id}
    return inputs


def _normalization(checkpoint: Path) -> list[tuple[float, ...]]:
    """Returns mean and standard deviation of the channels."""
    transform = data_of(read_about(checkpoint)[1], checkpoint).val_transform
    return [tuple(statistic.flatten().tolist()) for statistic in normalization(transform)]


def _with_texts(model: Model, checkpoint: Path) -> M3AE | MPMA:
    if isinstance(model, ImageModel):
        raise UserError(f"{checkpoint} has no language tower.")
    return model


def _check_free(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists: choose another name.")
