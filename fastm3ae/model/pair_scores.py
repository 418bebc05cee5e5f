"""Scores of many pairs of the same images and texts: what one side alone decides is computed once for each side.

That is the towers and, of the first fusion layer, self-attention with its norm, the queries of cross-attention, and the
keys and values that the other stream's cross-attention reads. Of each pair there remain cross-attention and
feed-forward network of that layer, the next layers, and of the last one what the poolers read. That is CLS, whose
single query is multiplied with the keys' weights instead of all tokens: (W_q x) . (W_k y) = (W_k^T W_q x) . y. The
scores are those of ``M3AE.retrieval`` but for the order of sums.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastm3ae.errors import UserError
from fastm3ae.model.fusion import CoAttentionLayer
from fastm3ae.model.m3ae import M3AE
from fastm3ae.model.packed import attend_other, attend_self, co_attend, encode_texts, fuse_on, heads
from fastm3ae.model.plan import Images, Plan, Read, Reads, StreamPlan, Texts, make_plan
from fastm3ae.model.reads import cls_features, cls_reads
from fastm3ae.model.rows import Index, Layout, send
from fastm3ae.model.vision import num_image_tokens

__all__ = ["PairScorer", "Side"]


@dataclass(frozen=True)
class Side:
    """Images, or texts, as far as the fusion comes with them alone.

    Args:
        layout: Where each stands.
        x_SD: Their tokens after the first layer's self-attention.
        q_SHd: Their queries of its cross-attention.
        k_SHd: The keys that the other stream's cross-attention reads there.
        v_SHd: The values.
    """

    layout: Layout
    x_SD: Tensor
    q_SHd: Tensor
    k_SHd: Tensor
    v_SHd: Tensor

    def __len__(self) -> int:
        return len(self.layout.lengths)

    def tokens_of(self, rows: Index) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns these rows of x, q, k and v."""
        return tuple(x.index_select(0, rows.tensor) for x in (self.x_SD, self.q_SHd, self.k_SHd, self.v_SHd))


class PairScorer:
    """Scores pairs of images and texts by a model's retrieval head.

    Args:
        model: The model, in evaluation mode, on the device that computes.
        autocast: Gives the context in which the towers and the fusion compute. The poolers and the head compute in the
            parameters' own type, because 16 bits would give many pairs the same score.
        pairs_per_pass: Pairs that are scored at a time; None: 8 on a CPU, where 4 to 16 take the same time, else 64.

    Raises:
        UserError: The model has no retrieval head.
        ValueError: The model is in training mode.
    """

    def __init__(
        self,
        model: M3AE,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        pairs_per_pass: int | None = None,
    ) -> None:
        if "retrieval" not in model.config.objectives:
            raise UserError(
                f'model.objectives must have "retrieval" for scores of pairs, got {", ".join(model.config.objectives)}.'
            )
        if model.training:
            raise ValueError("model must be in evaluation mode, got training mode")
        self.model, self.autocast, self.device = model, autocast, model.image_proj.weight.device
        self.pairs_per_pass = pairs_per_pass or (8 if self.device.type == "cpu" else 64)
        self.num_image_tokens = num_image_tokens(model.vision)
        self._plan = lru_cache(maxsize=64)(self._make_plan)

    @property
    def bytes_per_token(self) -> int:
        """How much memory a token of a ``Side`` takes: 4 features that stay, and some 12 while it is encoded."""
        weight = self.model.image_proj.weight
        return 16 * weight.shape[0] * weight.element_size()

    @torch.inference_mode()
    def encode_images(self, image_BCHW: Tensor) -> Side:
        """Encodes normalised images, on the model's device."""
        layout = Layout(np.full(len(image_BCHW), self.num_image_tokens))
        send([layout.ends], self.device)
        layers = self.model.fusion.image_layers, self.model.fusion.text_layers
        with self.autocast():
            return _side(self.model.encode_image(image_BCHW).flatten(0, 1), layout, *(of[0] for of in layers))

    @torch.inference_mode()
    def encode_texts(self, ids_BT: Tensor, num_tokens_B: np.ndarray) -> Side:
        """Encodes texts.

        Args:
            ids_BT: int64 token ids on the model's device, padded behind their end.
            num_tokens_B: How many tokens of each are not padding.
        """
        model, num_texts = self.model, len(ids_BT)
        texts = Texts("texts", ids_BT, num_tokens_B, np.arange(num_texts))
        reads = Reads(texts, Images(np.full(num_texts, -1)), text=Read(0))
        plan = make_plan({"texts": reads}, num_images=0, num_whole_tokens=0, num_visible_tokens=0, shares_texts=True)
        plan.send(self.device)
        with self.autocast():
            text_SD = model.text_proj(encode_texts(model.text, plan).tokens_SD) + model.modality_embeddings.weight[0]
            return _side(text_SD, plan.text_layout, model.fusion.text_layers[0], model.fusion.image_layers[0])

    @torch.inference_mode()
    def scores(
        self,
        images: Side,
        texts: Side,
        image_P: np.ndarray,
        text_P: np.ndarray,
        progress: Callable[[int], None] = lambda num_scored: None,
    ) -> Tensor:
        """Returns the scores of pairs: (P,).

        Args:
            images: Encoded images.
            texts: Encoded texts.
            image_P: The number of each pair's image among them.
            text_P: The number of its text.
            progress: Is told after each pass how many pairs it was of.
        """
        # Pairs whose texts are equally long are scored together: nothing is padded, and few plans serve for all.
        order_P = np.argsort(texts.layout.lengths[text_P], kind="stable")
        found = [self.model.retrieval_head.weight.new_empty(0)]
        for start in range(0, len(order_P), self.pairs_per_pass):
            chosen = order_P[start : start + self.pairs_per_pass]
            found.append(self._pass(images, texts, image_P[chosen], text_P[chosen]))
            progress(len(chosen))
        # Only now, because a copy to the device waits for it.
        return torch.cat(found).index_select(0, torch.from_numpy(np.argsort(order_P)).to(self.device))

    def _pass(self, images: Side, texts: Side, image_P: np.ndarray, text_P: np.ndarray) -> Tensor:
        model = self.model
        plan = self._plan(tuple(texts.layout.lengths[text_P]))
        text_rows, image_rows = Index(texts.layout.rows(text_P)), Index(images.layout.rows(image_P))
        send([text_rows, image_rows], self.device)
        text, image = texts.tokens_of(text_rows), images.tokens_of(image_rows)
        first = plan.layers[0]
        with self.autocast():
            text_QD = _cross(model.fusion.text_layers[0], text, image, first.text)
            image_QD = _cross(model.fusion.image_layers[0], image, text, first.image)
            read = fuse_on(model.fusion, text_QD, image_QD, plan, _run)["pairs"]
        dtype = model.retrieval_head.weight.dtype
        rows = {stream: x_QD.to(dtype) for stream, x_QD in read.items()}
        return model.retrieval_head(cls_features(model, rows))[:, 0]

    def _make_plan(self, text_lengths: tuple[int, ...]) -> Plan:
        """Plans the fusion of pairs whose texts have these lengths."""
        pair_P = np.arange(len(text_lengths))
        # All is encoded, so that each pair counts as having an image and a text of its own, whose ids do not matter.
        ids = torch.empty(len(pair_P), max(text_lengths), dtype=torch.int64, device="meta")
        texts = Texts("texts", ids, np.array(text_lengths), pair_P)
        plan = make_plan(
            {"pairs": cls_reads(texts, Images(pair_P), self.model.config)},
            num_images=len(pair_P),
            num_whole_tokens=self.num_image_tokens,
            num_visible_tokens=0,
            shares_texts=True,
        )
        plan.send(self.device)
        return plan


def _side(x_SD: Tensor, layout: Layout, layer: CoAttentionLayer, other_layer: CoAttentionLayer) -> Side:
    """Returns what the first layer of a stream makes of its tokens alone, and what that of the other one reads."""
    k_SHd, v_SHd = heads(other_layer, other_layer.cross_kv(x_SD), 2)
    x_SD = attend_self(layer, x_SD, layout, layout)
    (q_SHd,) = heads(layer, layer.cross_q(x_SD), 1)
    return Side(layout, x_SD, q_SHd, k_SHd, v_SHd)


def _cross(layer: CoAttentionLayer, own: tuple[Tensor, ...], other: tuple[Tensor, ...], stream: StreamPlan) -> Tensor:
    """Returns what the first layer of a stream makes of the pairs."""
    x_SD, q_SHd, _, _ = own
    _, _, k_SHd, v_SHd = other
    return attend_other(layer, stream.queries_of(x_SD), stream.queries_of(q_SHd), k_SHd, v_SHd, stream)


def _run(
    function: Callable[..., Tensor], layer: CoAttentionLayer, x_SD: Tensor, other_SD: Tensor, stream: StreamPlan
) -> Tensor:
    """Runs ``co_attend``; with one query for each pair, and texts of one length, in another order of products."""
    assert function is co_attend
    num_keys, num_cross_keys = set(stream.keys.lengths), set(stream.cross_keys.lengths)
    if set(stream.queries.lengths) != {1} or len(num_keys) > 1 or len(num_cross_keys) > 1:
        return co_attend(layer, x_SD, other_SD, stream)
    x_QD, width = stream.queries_of(x_SD), x_SD.shape[-1]
    q_weight, k_weight, v_weight = layer.self_qkv.weight.split(width)
    q_bias, _, v_bias = layer.self_qkv.bias.split(width)
    (q_QHd,) = heads(layer, F.linear(x_QD, q_weight, q_bias), 1)
    key_PSD = stream.key_rows.of(x_SD).unflatten(0, (-1, *num_keys))
    x_QD = layer.add_self(x_QD, _attend_one(q_QHd, key_PSD, k_weight, v_weight, v_bias))
    (k_weight, v_weight), (_, v_bias) = layer.cross_kv.weight.split(width), layer.cross_kv.bias.split(width)
    (q_QHd,) = heads(layer, layer.cross_q(x_QD), 1)
    key_PSD = stream.cross_key_rows.of(other_SD).unflatten(0, (-1, *num_cross_keys))
    return layer.add_mlp(layer.add_cross(x_QD, _attend_one(q_QHd, key_PSD, k_weight, v_weight, v_bias)))


def _attend_one(q_PHd: Tensor, y_PSD: Tensor, k_weight: Tensor, v_weight: Tensor, v_bias: Tensor) -> Tensor:
    """Returns what each sequence's one query gathers from its tokens' values, heads joined: (P, H * d).

    The keys' bias adds the same to all scores of a head, so that it changes nothing; the weights sum to 1, so that the
    values' bias is added as it is.
    """
    _, H, d = q_PHd.shape
    q_PHD = torch.einsum("phd,hdD->phD", q_PHd, k_weight.unflatten(0, (H, d)).to(q_PHd.dtype))
    y_P1SD = y_PSD[:, None].to(q_PHD.dtype)
    y_P1HD = F.scaled_dot_product_attention(q_PHD[:, None], y_P1SD, y_P1SD, scale=d**-0.5)
    return torch.einsum("phD,hdD->phd", y_P1HD[:, 0], v_weight.unflatten(0, (H, d)).to(q_PHd.dtype)).flatten(1) + v_bias
