"""What words attend to: the weights of the fusion's cross-attention, and the rows of MPMA's top-k memory.

w[i, j] = softmax_j(q[i] . k[j] / sqrt(d)), over the image's tokens in M3AE, over [slots ; patches] in MPMA. The models'
attention never writes its weights, so that they are made again from the queries and keys of an ordinary pass.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastm3ae.data.batch import ImageTextBatch
from fastm3ae.model.m3ae import M3AE
from fastm3ae.model.memory_fusion import TopKMemory
from fastm3ae.model.mpma import MPMA, MPMAPlan
from fastm3ae.model.rows import send

__all__ = ["FusionUse", "co_attention_weights"]

Self = TypeVar("Self", bound="_Watched")


class _Watched:
    """Keeps what modules give in its context.

    Args:
        modules: Those whose outputs are kept, in the order in which they come.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._watched = modules
        self._outputs: defaultdict[nn.Module, list[Tensor]] = defaultdict(list)

    def __enter__(self: Self) -> Self:
        self._handles = [module.register_forward_hook(self._keep) for module in self._watched]
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, module: nn.Module, arguments: tuple, output: Tensor) -> None:
        self._outputs[module].append(output.detach())

    def outputs(self, module: nn.Module) -> list[Tensor]:
        """Returns what a module gave."""
        return self._outputs[module]


def co_attention_weights(model: M3AE, batch: ImageTextBatch, layer: int) -> list[Tensor]:
    """Returns for each pair (H, T, L): of its tokens to the image's, in the readable pass over whole images and texts.

    Args:
        model: The model, in evaluation mode.
        batch: The pairs, on the model's device, images normalised.
        layer: Which layer of the text stream, from 0.
    """
    stream = model.fusion.text_layers[layer]
    with _Watched([stream.cross_q, stream.cross_kv]) as watched:
        model.cls_features(batch.images(), batch.text_ids_BT, batch.is_padding_BT)
    (q_BTD,), (kv_BLD,) = watched.outputs(stream.cross_q), watched.outputs(stream.cross_kv)
    q_BTHd = q_BTD.unflatten(-1, (stream.num_heads, -1))
    k_BLHd = kv_BLD.unflatten(-1, (2, stream.num_heads, -1)).select(2, 0)
    weights_BHTL = _softmax_weights(q_BTHd, k_BLHd)
    return [weights_HTL[:, :num] for weights_HTL, num in zip(weights_BHTL, batch.num_tokens_B.tolist(), strict=True)]


class FusionUse(_Watched):
    """Keeps the queries and keys of the one pass of MPMA that is made in its context.

    Args:
        model: A model with report_reconstruction, whose pass this is; or, if ``is_whole``, any model with a fusion.
        batch: What it will be given.
        is_whole: Whether the pass is ``fuse_whole``, in which all words are asked about, not only the hidden ones.
    """

    def __init__(self, model: MPMA, batch: ImageTextBatch, is_whole: bool = False) -> None:
        self.fusion = model.fusion
        self.plan = MPMAPlan(batch, model.config, whole="fusion" if is_whole else None).fusion
        send(self.plan.indices(), batch.image_BCHW.device)
        products = [product for layer in self.fusion.layers for product in (layer.cross_q, layer.cross_kv)]
        topk = self.fusion.topk
        super().__init__(products if topk is None else [*products, topk.q, topk.kv])

    def cross_weights(self) -> list[list[Tensor]]:
        """Returns for each layer and each pair (H, Q, M + K): of its words to the slots, then to the patches.

        All layers are asked about the same words: those that are to be predicted, or all. K patches stand in the order
        in which the fusion has them: the visible ones as they were kept, or all in image order.
        """
        return [self._weights_of(number) for number in range(len(self.fusion.layers))]

    def _weights_of(self, number: int) -> list[Tensor]:
        layer, plan, last = self.fusion.layers[number], self.plan.layers[number], self.plan.layers[-1]
        (q_SD,), (kv_SD,) = self.outputs(layer.cross_q), self.outputs(layer.cross_kv)
        # The layers before the last one compute all words.
        q_QHd = (q_SD if plan is last else last.tail.of(q_SD)).unflatten(-1, (layer.num_heads, -1))
        k_BKHd = kv_SD.unflatten(-1, (2, layer.num_heads, -1))[:, 0].unflatten(0, (len(plan.cross_keys.lengths), -1))
        if self.fusion.slots is not None:
            keys_MHd, _ = self.fusion.slots[number]()
            k_BKHd = torch.cat([keys_MHd.detach().to(k_BKHd.dtype).expand(len(k_BKHd), -1, -1, -1), k_BKHd], dim=1)
        num_words_B = last.queries.lengths.tolist()
        weights_BHQK = _softmax_weights(pad_sequence(q_QHd.split(num_words_B), batch_first=True), k_BKHd)
        return [weights_HQK[:, :num] for weights_HQK, num in zip(weights_BHQK, num_words_B, strict=True)]

    def slot_weights(self) -> list[Tensor]:
        """Returns for each layer (Q, M), mean over heads: what the words of all pairs give to the slots."""
        num_slots = 0 if self.fusion.slots is None else len(self.fusion.slots[0].keys)
        return [torch.cat([of[..., :num_slots].mean(dim=0) for of in pairs]) for pairs in self.cross_weights()]

    def kept_rows(self) -> tuple[Tensor, Tensor]:
        """Returns (M,) for the words and for the patches: by which fraction of their heads each row of topk is kept."""
        topk, k_MHd = self.fusion.topk, self._topk_keys()

        def kept_frac(q_SD: Tensor) -> Tensor:
            num_M = 0
            for _, index_Sk in _kept(topk, q_SD, k_MHd):
                num_M += index_Sk.flatten().bincount(minlength=len(k_MHd))
            return num_M / (len(q_SD) * topk.num_heads)

        of_words, of_patches = self.outputs(topk.q)
        return kept_frac(of_words), kept_frac(of_patches)

    def topk_weights(self) -> list[Tensor]:
        """Returns for each pair (T, M), mean over heads: what its tokens give to each row of topk."""
        topk, k_MHd = self.fusion.topk, self._topk_keys()
        of_words, _ = self.outputs(topk.q)
        weights_SM = torch.zeros(len(of_words), len(k_MHd), dtype=_sum_dtype(of_words), device=of_words.device)
        for score_Sk, index_Sk in _kept(topk, of_words, k_MHd):
            weight_Sk = (score_Sk * k_MHd.shape[-1] ** -0.5).softmax(dim=-1)
            weights_SM.scatter_add_(1, index_Sk, weight_Sk / topk.num_heads)
        return list(weights_SM.split(self.plan.layers[0].queries.lengths.tolist()))

    def _topk_keys(self) -> Tensor:
        topk = self.fusion.topk
        return self.outputs(topk.kv)[0].unflatten(-1, (2, topk.num_heads, -1))[:, 0]


def _kept(topk: TopKMemory, q_SD: Tensor, k_MHd: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields for each head the products q . k with the rows that it keeps, and which rows these are: (S, k) each."""
    q_SHd = q_SD.unflatten(-1, (topk.num_heads, -1))
    for q_Sd, k_Md in zip(q_SHd.unbind(1), k_MHd.unbind(1), strict=True):  # the scores of all would be many
        yield (q_Sd.to(_sum_dtype(q_Sd)) @ k_Md.to(_sum_dtype(k_Md)).T).topk(topk.num_kept, dim=-1)


def _softmax_weights(q_BQHd: Tensor, k_BKHd: Tensor) -> Tensor:
    """Returns softmax(q . k / sqrt(d)) over the keys: (B, H, Q, K)."""
    scores_BHQK = torch.einsum("bqhd,bkhd->bhqk", q_BQHd.to(_sum_dtype(q_BQHd)), k_BKHd.to(_sum_dtype(k_BKHd)))
    return (scores_BHQK * q_BQHd.shape[-1] ** -0.5).softmax(dim=-1)


def _sum_dtype(x: Tensor) -> torch.dtype:
    """Returns the type in which the ops make their sums."""
    return torch.promote_types(x.dtype, torch.float32)
