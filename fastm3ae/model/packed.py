"""The passes over packed sequences: the towers and the fusion without padding, and only the rows that a plan names.

The weights are those of the modules that ``vision.py``, ``text.py`` and ``fusion.py`` build; their submodules work on
rows of tokens (S, D) as they do on batches.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertModel, PretrainedConfig, RobertaModel

from fastm3ae.kernels import gather_image_patches, gather_patches
from fastm3ae.model.attention import attend
from fastm3ae.model.fusion import CoAttentionFusion, CoAttentionLayer
from fastm3ae.model.plan import Plan, StreamPlan
from fastm3ae.model.rows import Layout
from fastm3ae.model.vision import encode_pixels

__all__ = [
    "Encoded",
    "Run",
    "attend_other",
    "attend_self",
    "call",
    "checkpointed",
    "co_attend",
    "encode_images",
    "encode_texts",
    "fuse",
    "fuse_on",
    "heads",
    "maybe_compiled",
]


# Runs a function of a layer and its arguments: ``call``, or something that checkpoints its activations.
Run = Callable[..., Any]


def call(function: Callable[..., Any], *arguments) -> Any:
    """Returns what the function returns.

    A layer whose weights are divided among processes gathers them around it: see ``fastm3ae.training.parallel``.
    """
    enter = getattr(arguments[0], "enter", None)
    return function(*arguments) if enter is None else enter(function, *arguments[1:])


def checkpointed(function: Callable[..., Any], *arguments) -> Any:
    """Returns what the function returns, and computes it again in the backward pass."""
    return call(partial(checkpoint, function, use_reentrant=False), *arguments)


def maybe_compiled(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    """Returns the function, or one graph that ``torch.compile`` makes of it."""
    return _compiled(function) if compiled else function


@cache  # a second wrapper would compile again
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True)


class Encoded(NamedTuple):
    """Packed sequences behind a tower, or behind one of its layers.

    Args:
        tokens_SD: The features.
        q_SHd: The queries of the last layer; None: of none, or of a Swin's.
        k_SHd: Its keys.
    """

    tokens_SD: Tensor
    q_SHd: Tensor | None
    k_SHd: Tensor | None


def encode_images(
    vision: VisionTransformer | SwinTransformer,
    image_BCHW: Tensor,
    false_image_FCHW: Tensor | None,
    keep_BK: Tensor | None,
    plan: Plan,
    run: Run = call,
) -> Encoded:
    """Encodes the images that the plan names, whole ones and visible patches together.

    Args:
        vision: The tower.
        image_BCHW: Normalised pixels.
        false_image_FCHW: The false images, where there are any.
        keep_BK: int64 indices of the visible patches, where the plan has any.
        plan: Which images.
        run: Runs a block.
    """
    images_NCHW = plan.true_images.of(image_BCHW)
    if len(plan.false_images):
        images_NCHW = torch.cat([images_NCHW, plan.false_images.of(false_image_FCHW)])
    if isinstance(vision, SwinTransformer):
        return Encoded(encode_pixels(vision, images_NCHW).flatten(0, 1), None, None)
    encoded = Encoded(_embed_images(vision, images_NCHW, image_BCHW, keep_BK, plan), None, None)
    for block in vision.blocks:
        encoded = run(_vision_block, block, encoded.tokens_SD, plan)
    return encoded._replace(tokens_SD=vision.norm(encoded.tokens_SD))


def _vision_block(block: Block, x_SD: Tensor, plan: Plan) -> Encoded:
    q, k, v = block.attn.qkv(block.norm1(x_SD)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(1)
    x_SD = x_SD + block.attn.proj(attend(q, k, v, plan.image_layout, plan.image_layout, runs=plan.image_runs))
    return Encoded(x_SD + block.mlp(block.norm2(x_SD)), q, k)


def _embed_images(
    vit: VisionTransformer, images_NCHW: Tensor, image_BCHW: Tensor, keep_BK: Tensor | None, plan: Plan
) -> Tensor:
    """Returns what the blocks read: whole images, then visible patches, each with CLS in front."""
    parts, patches_NND = [], None
    positions_LD, cls_D = vit.pos_embed[0], vit.cls_token[0, 0]
    if len(images_NCHW):
        patches_NND = vit.patch_embed(images_NCHW)
        cls_N1D = vit.cls_token.expand(len(patches_NND), -1, -1)
        parts.append((torch.cat([cls_N1D, patches_NND], dim=1) + vit.pos_embed).flatten(0, 1))
    if plan.num_visible:
        B = plan.num_visible
        if len(plan.true_images) == B:  # all are embedded already, and stand first
            visible_BLD = gather_patches(patches_NND[:B], keep_BK, positions_LD, cls_D)
        else:
            projection = vit.patch_embed.proj
            options = {"patch_size_px": projection.kernel_size[0], "dtype": image_BCHW.dtype}
            pixels_BKP = gather_image_patches(image_BCHW, keep_BK, **options)
            x_BKD = F.linear(pixels_BKP, projection.weight.flatten(1), projection.bias)
            cls_B1D = (cls_D + positions_LD[0]).expand(B, 1, -1)
            visible_BLD = torch.cat([cls_B1D, x_BKD + positions_LD[1:][keep_BK]], dim=1)
        parts.append(visible_BLD.flatten(0, 1))
    return vit.norm_pre(torch.cat(parts))


def encode_texts(text: RobertaModel | BertModel, plan: Plan, run: Run = call) -> Encoded:
    """Encodes the texts that the plan names. ``run`` runs a layer."""
    ids, positions = zip(*((group.ids_NT, _positions(text, group.ids_NT)) for group in plan.texts), strict=True)
    rows = plan.text_rows.tensor
    ids_1S = torch.cat([part.flatten() for part in ids]).index_select(0, rows)[None]
    positions_1S = torch.cat([part.flatten() for part in positions]).index_select(0, rows)[None]
    hidden_1SD = text.embeddings(input_ids=ids_1S, position_ids=positions_1S, token_type_ids=torch.zeros_like(ids_1S))
    encoded = Encoded(hidden_1SD[0], None, None)
    for layer in text.encoder.layer:
        encoded = run(_text_layer, layer, encoded.tokens_SD, plan.text_layout, text.config)
    return encoded


def _text_layer(layer: nn.Module, hidden_SD: Tensor, layout: Layout, config: PretrainedConfig) -> Encoded:
    attention = layer.attention.self
    q, k, v = (
        product(hidden_SD).unflatten(-1, (config.num_attention_heads, -1))
        for product in (attention.query, attention.key, attention.value)
    )
    dropout_frac = config.attention_probs_dropout_prob if layer.training else 0.0
    hidden_SD = layer.attention.output(attend(q, k, v, layout, layout, dropout_frac), hidden_SD)
    return Encoded(layer.output(layer.intermediate(hidden_SD), hidden_SD), q, k)


def _positions(text: RobertaModel | BertModel, ids_NT: Tensor) -> Tensor:
    """The numbers of the tokens' positions: BERT counts tokens, RoBERTa those that are not the padding token."""
    if isinstance(text, BertModel):
        return torch.arange(ids_NT.shape[1], device=ids_NT.device).expand_as(ids_NT)
    pad = text.config.pad_token_id
    is_counted_NT = ids_NT != pad
    return is_counted_NT.cumsum(dim=1) * is_counted_NT + pad


def fuse(
    fusion: CoAttentionFusion, text_SD: Tensor, image_SD: Tensor, plan: Plan, run: Run = call
) -> dict[str, dict[str, Tensor]]:
    """Fuses each objective's pairs as deep as it reads.

    Args:
        fusion: The layers.
        text_SD: The encoded texts, modality embedding included.
        image_SD: The encoded images, modality embedding included.
        plan: Which rows.
        run: Runs a layer.

    Returns:
        For each objective, under "text" and "image", the rows that it reads.
    """
    read = _read(plan, 0, text_SD, image_SD)
    if plan.layers:
        pair_text_SD, pair_image_SD = plan.pair_text_rows.of(text_SD), plan.pair_image_rows.of(image_SD)
        _run_layers(fusion, pair_text_SD, pair_image_SD, plan, 0, read, run)
    return read


def fuse_on(
    fusion: CoAttentionFusion, text_QD: Tensor, image_QD: Tensor, plan: Plan, run: Run = call
) -> dict[str, dict[str, Tensor]]:
    """Does as ``fuse``, but from what the first layer made of the pairs."""
    read, first = _read(plan, 1, text_QD, image_QD), plan.layers[0]
    text_SD, image_SD = text_QD[: first.text.num_whole], image_QD[: first.image.num_whole]
    _run_layers(fusion, text_SD, image_SD, plan, 1, read, run)
    return read


def _read(plan: Plan, depth: int, text_SD: Tensor, image_SD: Tensor) -> dict[str, dict[str, Tensor]]:
    """Returns for each objective what it reads at a depth."""
    streams = {"text": text_SD, "image": image_SD}
    return {
        name: {stream: taken.rows.of(streams[stream]) for stream, taken in of.items() if taken.depth == depth}
        for name, of in plan.taken.items()
    }


def _run_layers(
    fusion: CoAttentionFusion,
    text_SD: Tensor,
    image_SD: Tensor,
    plan: Plan,
    first: int,
    read: dict[str, dict[str, Tensor]],
    run: Run,
) -> None:
    """Runs the layers from number ``first`` on, and adds to ``read`` what is read behind each."""
    for number, layer in enumerate(plan.layers[first:], first):
        text_QD = run(co_attend, fusion.text_layers[number], text_SD, image_SD, layer.text)
        image_QD = run(co_attend, fusion.image_layers[number], image_SD, text_SD, layer.image)
        for name, rows in _read(plan, number + 1, text_QD, image_QD).items():
            read[name] |= rows
        text_SD, image_SD = text_QD[: layer.text.num_whole], image_QD[: layer.image.num_whole]


def co_attend(
    layer: CoAttentionLayer,
    x_SD: Tensor,
    other_SD: Tensor,
    stream: StreamPlan,
    memory: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Returns the rows that the plan wants of a stream's next features: (Q, D).

    Args:
        layer: The layer.
        x_SD: This stream's rows.
        other_SD: The other stream's rows.
        stream: Which rows are computed.
        memory: Keys and values that cross-attention sees besides the other stream's, (M, H, d) each.
    """
    if not stream.is_read:
        return x_SD[:0]
    key_SD = stream.key_rows.of(x_SD)
    if stream.is_whole:
        x_QD = attend_self(layer, key_SD, stream.queries, stream.keys)
    else:
        x_QD, width = stream.queries_of(x_SD), x_SD.shape[-1]
        weight, bias = layer.self_qkv.weight, layer.self_qkv.bias
        (q,) = heads(layer, F.linear(x_QD, weight[:width], bias[:width]), 1)
        k, v = heads(layer, F.linear(key_SD, weight[width:], bias[width:]), 2)
        x_QD = layer.add_self(x_QD, attend(q, k, v, stream.queries, stream.keys, layer.active_dropout_frac))
    (q,) = heads(layer, layer.cross_q(x_QD), 1)
    k, v = heads(layer, layer.cross_kv(stream.cross_key_rows.of(other_SD)), 2)
    return attend_other(layer, x_QD, q, k, v, stream, memory)


def attend_self(layer: CoAttentionLayer, x_SD: Tensor, queries: Layout, keys: Layout) -> Tensor:
    """Returns rows that are all queries and keys after self-attention, normalised."""
    q, k, v = heads(layer, layer.self_qkv(x_SD), 3)
    return layer.add_self(x_SD, attend(q, k, v, queries, keys, layer.active_dropout_frac))


def attend_other(
    layer: CoAttentionLayer,
    x_QD: Tensor,
    q_QHd: Tensor,
    k_SHd: Tensor,
    v_SHd: Tensor,
    stream: StreamPlan,
    memory: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Returns what ``co_attend`` does, from the queries after self-attention and the other stream's keys and values."""
    context_QD = attend(q_QHd, k_SHd, v_SHd, stream.queries, stream.cross_keys, layer.active_dropout_frac, memory)
    return layer.add_mlp(layer.add_cross(x_QD, context_QD))


def heads(layer: CoAttentionLayer, x_SX: Tensor, number: int) -> tuple[Tensor, ...]:
    """Divides so many products one beside the other into heads: (S, H, d) each."""
    return x_SX.unflatten(-1, (number, layer.num_heads, -1)).unbind(1)
