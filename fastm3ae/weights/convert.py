"""Official M3AE checkpoints to ours and back.

One table of names says, for each of our tensors, from which official tensors it is made: by stacking several along the
first dimension (queries, keys and values), or by a reshape. Reading runs no code from the file.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastm3ae.config import M3AEConfig
from fastm3ae.config.files import from_dict
from fastm3ae.errors import UserError
from fastm3ae.model.heads import sincos_positions
from fastm3ae.official.translate import heads_and_fusion
from fastm3ae.weights.torchfile import check_state, load_torch

__all__ = [
    "OfficialCheckpoint",
    "config_from_official",
    "from_official",
    "official_names",
    "read_official",
    "to_official",
]

_CLIP_BLOCK = {
    "attn.qkv.": "attn.in_proj_",
    "attn.proj.": "attn.out_proj.",
    "norm1.": "ln_1.",
    "norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
_CLIP = {
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "patch_embed.proj.": "conv1.",
    "norm_pre.": "ln_pre.",
    "norm.": "ln_post.",
}
_FUSION_LAYER = {
    "self_qkv.": ("attention.self.query.", "attention.self.key.", "attention.self.value."),
    "self_out.": ("attention.output.dense.",),
    "self_norm.": ("attention.output.LayerNorm.",),
    "cross_q.": ("crossattention.self.query.",),
    "cross_kv.": ("crossattention.self.key.", "crossattention.self.value."),
    "cross_out.": ("crossattention.output.dense.",),
    "cross_norm.": ("crossattention.output.LayerNorm.",),
    "mlp_in.": ("intermediate.dense.",),
    "mlp_out.": ("output.dense.",),
    "mlp_norm.": ("output.LayerNorm.",),
}
_REST = {
    "text.": "language_encoder.",
    "text_proj.": "multi_modal_language_proj.",
    "image_proj.": "multi_modal_vision_proj.",
    "text_pooler.": "multi_modal_language_pooler.",
    "image_pooler.": "multi_modal_vision_pooler.",
    "modality_embeddings.": "modality_type_embeddings.",
    "mlm_head.dense.": "mlm_head.transform.dense.",
    "mlm_head.norm.": "mlm_head.transform.LayerNorm.",
    "mlm_head.decoder.bias": "mlm_head.bias",
    "mlm_head.decoder.weight": "mlm_head.decoder.weight",
    "mim_decoder.embed.": "mim_head.decoder_embed.",
    "mim_decoder.norm.": "mim_head.decoder_norm.",
    "mim_decoder.pixels.": "mim_head.decoder_pred.",
    "mim_decoder.mask_token": "mim_head.mask_token",
    "itm_head.": "itm_head.fc.",
    "vqa_head.": "vqa_head.",
    "classification_head.": "cls_head.",
    "retrieval_head.": "irtr_head.",
}
# In the original's state dict, but computed or never used by it.
_UNUSED = re.compile(
    r"vision_encoder\.(positional_embedding|token_embedding\.weight|ln_final\.(weight|bias))"
    r"|language_encoder\.embeddings\.position_ids"
    r"|mim_head\.decoder_pos_embed"
    r"|vision_encoder\.layers\.\d+\.blocks\.\d+\.(attn_mask|attn\.relative_position_index)"
)
# Classes of these packages stand in official checkpoints beside the weights (callbacks, the configuration). They are
# read as inert objects; any other class in a file is refused.
_INERT_PACKAGES = ("pytorch_lightning.", "lightning.", "sacred.", "omegaconf.", "torchmetrics.", "m3ae.", "argparse.",
                   "pathlib.", "collections.")  # fmt: skip


class OfficialCheckpoint(NamedTuple):
    """What an official checkpoint holds.

    Args:
        state: The state dict, under the official key names.
        config: The official configuration, or None when the file does not hold one.
    """

    state: dict[str, Tensor]
    config: dict[str, Any] | None


def official_names(name: str, vision_kind: str) -> tuple[str, ...]:
    """Returns the official names of the tensors that ours is made of, in the order of stacking.

    Args:
        name: One of our parameter names, such as "fusion.text_layers.0.self_qkv.weight".
        vision_kind: ``VisionConfig.kind``.
    """
    if match := re.fullmatch(r"fusion\.(text|image)_layers\.(\d+)\.(\w+\.)(\w+)", name):
        stream, layer, module, end = match.groups()
        official_stream = "language" if stream == "text" else "vision"
        return tuple(f"multi_modal_{official_stream}_layers.{layer}.{part}{end}" for part in _FUSION_LAYER[module])
    if match := re.fullmatch(r"(vision|mim_decoder)\.blocks\.(\d+)\.(.+)", name):
        part, block, rest = match.groups()
        prefix = "vision_encoder.visual.transformer" if part == "vision" else "mim_head.decoder"
        return (f"{prefix}.resblocks.{block}.{_rename(rest, _CLIP_BLOCK)}",)
    if name.startswith("vision."):
        rest = name.removeprefix("vision.")
        if vision_kind == "clip":
            return (f"vision_encoder.visual.{_rename(rest, _CLIP)}",)
        if match := re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", rest):
            # The original merges patches at the end of a stage, timm at the start of the next.
            rest = f"layers.{int(match[1]) - 1}.downsample.{match[2]}"
        return (f"vision_encoder.{rest}",)
    return (_rename(name, _REST),)


def _rename(name: str, table: Mapping[str, str]) -> str:
    for ours, official in table.items():
        if name.startswith(ours):
            return official + name.removeprefix(ours)
    raise KeyError(name)


def from_official(
    state: Mapping[str, Tensor], model: nn.Module, prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Renames an official state dict to the model's names.

    Args:
        state: Official state dict; also any other dictionary under official names, such as gradients.
        model: The model whose names are wanted. Tensors that it lacks are not converted.
        prefix: Only names that start with it are wanted: "vision.", where the rest of the model is none of M3AE.

    Returns:
        Our tensors, and the official ones that were not used.
    """
    ours, used = {}, set()
    for name, parameter in model.named_parameters():
        if not name.startswith(prefix):
            continue
        sources = official_names(name, model.config.vision.kind)
        if all(source in state for source in sources):
            stacked = torch.cat([state[source] for source in sources]) if len(sources) > 1 else state[sources[0]]
            # Only leading dimensions of size one differ: the CLS token (1, 1, D) and the positions (1, N + 1, D).
            ours[name] = stacked[(None,) * (parameter.dim() - stacked.dim())]
            used.update(sources)
    return ours, {name: tensor for name, tensor in state.items() if name not in used}


def unused_by_original(name: str) -> bool:
    """Says whether an official tensor is one that the original computes anew or never uses."""
    return _UNUSED.fullmatch(name) is not None


def to_official(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames tensors under our names (a state dict, or gradients) to the official names.

    A whole state dict also gets the original's fixed position tables, so that it has every tensor that the original
    uses. What the original carries without using it (CLIP's text tower) is not made up.

    Args:
        state: Tensors under our names.
        model: The model that they belong to.
    """
    official = {}
    kind = model.config.vision.kind
    for name, tensor in state.items():
        names = official_names(name, kind)
        if name in ("vision.cls_token", "vision.pos_embed"):
            tensor = tensor.reshape(-1) if name == "vision.cls_token" else tensor[0]
        official.update(zip(names, tensor.chunk(len(names)) if len(names) > 1 else (tensor,), strict=True))
    official = {name: tensor.contiguous() for name, tensor in official.items()}
    if state.keys() >= dict(model.named_parameters()).keys():
        config = model.config
        official["language_encoder.embeddings.position_ids"] = torch.arange(config.text.max_positions)[None]
        if "mim" in config.objectives:
            grid = config.vision.image_size_px // config.vision.patch_size_px
            table = torch.from_numpy(sincos_positions(config.mim.decoder_width, grid)).float()
            official["mim_head.decoder_pos_embed"] = table[None]
    return official


def config_from_official(
    config: Mapping[str, Any], state: Mapping[str, Tensor], text: Mapping[str, Any] | None = None
) -> M3AEConfig:
    """Returns our model configuration for an official configuration and state dict.

    Sizes are read off the tensors; what they don't show (heads of the fusion, dropout, losses) is in the
    configuration.

    Args:
        config: The official (sacred) configuration.
        state: The official state dict.
        text: The language tower's configuration as transformers writes it; None: its own rule for what tensors don't
            show (heads of width 64, dropout 0.1, the kind's layer-norm eps).
    """
    text = text or {}
    embeddings = "language_encoder.embeddings"
    vocab_size, text_width = state[f"{embeddings}.word_embeddings.weight"].shape
    max_positions = len(state[f"{embeddings}.position_embeddings.weight"])
    num_token_types = len(state[f"{embeddings}.token_type_embeddings.weight"])
    kind = text.get("model_type", "roberta" if num_token_types == 1 else "bert")
    tower = {
        "kind": kind,
        "vocab_size": vocab_size,
        "pad_token_id": text.get("pad_token_id", 1 if kind == "roberta" else 0),
        "width": text_width,
        "num_layers": _count(r"language_encoder\.encoder\.layer\.(\d+)\.", state),
        "num_heads": text.get("num_attention_heads", max(1, text_width // 64)),
        "mlp_width": len(state["language_encoder.encoder.layer.0.intermediate.dense.weight"]),
        "max_positions": max_positions,
        "num_token_types": num_token_types,
        "layer_norm_eps": text.get("layer_norm_eps", 1e-5 if kind == "roberta" else 1e-12),
        "dropout_frac": text.get("hidden_dropout_prob", 0.1),
    }
    vision = _vision_from_official(config["image_size"], state)
    return from_dict(M3AEConfig(), {"vision": vision, "text": tower, **heads_and_fusion(config)}, "model.")


def _vision_from_official(image_size_px: int, state: Mapping[str, Tensor]) -> dict[str, Any]:
    if "vision_encoder.visual.conv1.weight" in state:
        patches = state["vision_encoder.visual.conv1.weight"]
        num_blocks = _count(r"vision_encoder\.visual\.transformer\.resblocks\.(\d+)\.", state)
        return {
            "image_size_px": image_size_px,
            "patch_size_px": patches.shape[-1],
            "width": len(patches),
            "num_blocks": num_blocks,
        }
    patches = state["vision_encoder.patch_embed.proj.weight"]
    stages = range(_count(r"vision_encoder\.layers\.(\d+)\.", state))
    table = "vision_encoder.layers.{}.blocks.0.attn.relative_position_bias_table"
    return {
        "kind": "swin",
        "image_size_px": image_size_px,
        "patch_size_px": patches.shape[-1],
        "width": len(patches),
        "swin_num_blocks": [_count(rf"vision_encoder\.layers\.{i}\.blocks\.(\d+)\.", state) for i in stages],
        "swin_num_heads": [state[table.format(i)].shape[1] for i in stages],
    }


def _count(pattern: str, state: Mapping[str, Tensor]) -> int:
    return 1 + max(int(match[1]) for name in state if (match := re.match(pattern, name)))


def read_official(path: Path) -> OfficialCheckpoint:
    """Reads an official checkpoint (a pickle with "state_dict") without running any code from the file.

    Raises:
        UserError: The file is missing, is no checkpoint, claims more than its size, or holds objects of other packages
            than the original's.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such checkpoint file.")
    content = load_torch(path, _INERT_PACKAGES)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f'{path} is not an official M3AE checkpoint: expected a dictionary with a "state_dict".')
    state = content["state_dict"]
    check_state(state, path)
    config = content.get("hyper_parameters")
    config = config.get("config", config) if isinstance(config, dict) else None
    return OfficialCheckpoint(dict(state), config if isinstance(config, dict) and "loss_names" in config else None)
