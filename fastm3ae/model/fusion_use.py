"""What MPMA's words attend to: the weights of the fusion's cross-attention, and the rows of a top-k memory.

w[i, j] = softmax_j(q[i] . k[j] / sqrt(d)) over [slots ; patches], slots first. The model's attention never writes its
weights, so that they are made again from the queries and keys of an ordinary pass.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastm3ae.data.batch import PretrainBatch
from fastm3ae.model.mpma import MPMA, MPMAPlan
from fastm3ae.model.rows import send

__all__ = ["FusionUse"]


class FusionUse:
    """Keeps the queries and keys of the one pass of report_reconstruction that is made in its context.

    Args:
        model: A model with report_reconstruction.
        batch: What it will be given.
    """

    def __init__(self, model: MPMA, batch: PretrainBatch) -> None:
        self.fusion, self.plan = model.fusion, MPMAPlan(batch, model.config).fusion
        send(self.plan.indices(), batch.image_BCHW.device)
        self._outputs: defaultdict[nn.Module, list[Tensor]] = defaultdict(list)
        self._watched = [product for layer in self.fusion.layers for product in (layer.cross_q, layer.cross_kv)]
        if self.fusion.topk is not None:
            self._watched += [self.fusion.topk.q, self.fusion.topk.kv]

    def __enter__(self) -> "FusionUse":
        self._handles = [module.register_forward_hook(self._keep) for module in self._watched]
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, module: nn.Module, arguments: tuple, output: Tensor) -> None:
        self._outputs[module].append(output.detach())

    def cross_weights(self) -> list[list[Tensor]]:
        """Returns for each layer and each pair (H, Q, M + K): of its hidden words to the slots, then to the patches.

        All layers are asked about the same words, those that are to be predicted. K patches stand in the order in which
        the fusion has them: the visible ones as they were kept, or all in image order.
        """
        return [self._weights_of(number) for number in range(len(self.fusion.layers))]

    def _weights_of(self, number: int) -> list[Tensor]:
        layer, plan, last = self.fusion.layers[number], self.plan.layers[number], self.plan.layers[-1]
        (q_SD,), (kv_SD,) = self._outputs[layer.cross_q], self._outputs[layer.cross_kv]
        # The layers before the last one compute all words.
        q_QHd = (q_SD if plan is last else last.tail.of(q_SD)).unflatten(-1, (layer.num_heads, -1))
        k_BKHd = kv_SD.unflatten(-1, (2, layer.num_heads, -1))[:, 0].unflatten(0, (len(plan.cross_keys.lengths), -1))
        if self.fusion.slots is not None:
            keys_MHd, _ = self.fusion.slots[number]()
            k_BKHd = torch.cat([keys_MHd.detach().to(k_BKHd.dtype).expand(len(k_BKHd), -1, -1, -1), k_BKHd], dim=1)
        num_words_B = last.queries.lengths.tolist()
        q_BQHd = pad_sequence(q_QHd.split(num_words_B), batch_first=True)
        scores_BHQK = torch.einsum("bqhd,bkhd->bhqk", _in_sum_dtype(q_BQHd), _in_sum_dtype(k_BKHd))
        weights_BHQK = (scores_BHQK * q_QHd.shape[-1] ** -0.5).softmax(dim=-1)
        return [weights_HQK[:, :num] for weights_HQK, num in zip(weights_BHQK, num_words_B, strict=True)]

    def slot_weights(self) -> list[Tensor]:
        """Returns for each layer (Q, M), mean over heads: what the hidden words of all pairs give to the slots."""
        num_slots = 0 if self.fusion.slots is None else len(self.fusion.slots[0].keys)
        return [torch.cat([of[..., :num_slots].mean(dim=0) for of in pairs]) for pairs in self.cross_weights()]

    def kept_rows(self) -> tuple[Tensor, Tensor]:
        """Returns (M,) for the words and for the patches: by which fraction of their heads each row of topk is kept."""
        topk = self.fusion.topk
        k_MHd = self._outputs[topk.kv][0].unflatten(-1, (2, topk.num_heads, -1))[:, 0]

        def kept_frac(q_SD: Tensor) -> Tensor:
            q_SHd = q_SD.unflatten(-1, (topk.num_heads, -1))
            num_M = 0
            for q_Sd, k_Md in zip(q_SHd.unbind(1), k_MHd.unbind(1), strict=True):  # the scores of all would be many
                index_Sk = (_in_sum_dtype(q_Sd) @ _in_sum_dtype(k_Md).T).topk(topk.num_kept, dim=-1).indices
                num_M += index_Sk.flatten().bincount(minlength=len(k_MHd))
            return num_M / (len(q_SHd) * topk.num_heads)

        of_words, of_patches = self._outputs[topk.q]
        return kept_frac(of_words), kept_frac(of_patches)


def _in_sum_dtype(x: Tensor) -> Tensor:
    """In the type in which the ops make their sums."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
