"""M3AE: one model, and for each objective the pass that gives what its loss reads.

Source: Chen et al., "Multi-Modal Masked Autoencoders for Medical Vision-and-Language Pre-Training" (MICCAI 2022);
official file m3ae/modules/m3ae_module.py.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastm3ae.config import M3AEConfig, Step
from fastm3ae.data.batch import ImageTextBatch, PretrainBatch, RetrievalBatch
from fastm3ae.masking import hidden_patches, split_patches
from fastm3ae.model.freezing import Freezable
from fastm3ae.model.fusion import CoAttentionFusion
from fastm3ae.model.heads import AnswerHead, MIMDecoder, MIMOutputs, MLMHead, MLMOutputs, Pooler, init_weights
from fastm3ae.model.packed_step import run_packed
from fastm3ae.model.text import build_text, encode_tokens
from fastm3ae.model.vision import build_vision, encode_pixels

__all__ = ["M3AE"]


class M3AE(Freezable):
    """Vision tower, language tower, projections, co-attention fusion, poolers, and a head for each objective.

    Images are normalised pixels (float), of size ``config.vision.image_size_px``.

    Args:
        config: The model's configuration, with the vocabulary resolved (``fastm3ae.model.pretrained.resolve_text``).
    """

    def __init__(self, config: M3AEConfig) -> None:
        super().__init__()
        self.config = config
        width, objectives = config.fusion.width, config.objectives
        self.vision = build_vision(config.vision)
        self.text = build_text(config.text, config.init_std)
        self.image_proj = nn.Linear(self.vision.num_features, width)
        self.text_proj = nn.Linear(config.text.width, width)
        self.modality_embeddings = nn.Embedding(2, width)
        self.fusion = CoAttentionFusion(config.fusion)
        self.image_pooler = Pooler(width)
        self.text_pooler = Pooler(width)
        if "mlm" in objectives:
            self.mlm_head = MLMHead(width, config.text.vocab_size)
        if "mim" in objectives:
            vision = config.vision
            self.mim_decoder = MIMDecoder(config.mim, width, vision.num_patches, vision.patch_size_px)
        if "itm" in objectives or "retrieval" in objectives:
            self.itm_head = nn.Linear(2 * width, 2)
        if "vqa" in objectives:
            self.vqa_head = AnswerHead(2 * width, config.num_answers)
        if "classification" in objectives:
            self.classification_head = AnswerHead(2 * width, config.num_classes)
        if "retrieval" in objectives:
            self.retrieval_head = nn.Linear(2 * width, 1)
        for name, module in self.named_children():
            if name not in ("vision", "text"):
                module.apply(partial(init_weights, std=config.init_std))
        if "mim" in objectives:
            nn.init.normal_(self.mim_decoder.mask_token, std=config.init_std)
            for block in self.mim_decoder.blocks:
                nn.init.xavier_uniform_(block.attn.qkv.weight)  # the original's initialisation misses in_proj_weight
        if "retrieval" in objectives:
            self.init_retrieval_head()

    @property
    def leaves_some_alone(self) -> bool:
        """Whether there are parameters that no objective reads, which then have no gradient.

        What reads the pooled features reads the whole trunk; else some of the last layers and poolers are left alone.
        """
        return not {"itm", "vqa", "classification", "retrieval"} & set(self.config.objectives)

    def init_retrieval_head(self) -> None:
        """Starts the retrieval head from the matching row of the ITM head, which is frozen.

        Deviation: in the original both share storage until the model moves to a GPU; here they are two tensors.
        """
        with torch.no_grad():
            self.retrieval_head.weight.copy_(self.itm_head.weight[1:])
            self.retrieval_head.bias.copy_(self.itm_head.bias[1:])
        self.itm_head.requires_grad_(False)

    def encode_text(self, ids_BT: Tensor, is_padding_BT: Tensor) -> Tensor:
        """Returns a text's features before fusion, modality embedding included: (B, T, D)."""
        return self._project_text(encode_tokens(self.text, ids_BT, is_padding_BT))

    def _project_text(self, hidden_BTD: Tensor) -> Tensor:
        return self.text_proj(hidden_BTD) + self.modality_embeddings.weight[0]

    def encode_image(self, image_BCHW: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Returns an image's features before fusion, modality embedding included: (B, L, D).

        Args:
            image_BCHW: Normalised pixels.
            keep_BK: int64 indices of the visible patches; None: all patches are visible.
        """
        return self._project_image(encode_pixels(self.vision, image_BCHW, keep_BK))

    def _project_image(self, hidden_BLD: Tensor) -> Tensor:
        return self.image_proj(hidden_BLD) + self.modality_embeddings.weight[1]

    def pool(self, text_BTD: Tensor, image_BLD: Tensor) -> Tensor:
        """Returns the pooled features (B, 2 D) of what the last fusion layer gives.

        The image is pooled from CLS, or from the mean over all tokens where the tower (Swin) has no CLS.
        """
        if self.config.vision.kind == "swin":
            image_BLD = image_BLD.mean(dim=1, keepdim=True)
        return torch.cat([self.text_pooler(text_BTD), self.image_pooler(image_BLD)], dim=-1)

    def cls_features(self, image_BCHW: Tensor, ids_BT: Tensor, is_padding_BT: Tensor) -> Tensor:
        """Returns the pooled features (B, 2 D) of unmasked images and texts."""
        hidden_BTD = encode_tokens(self.text, ids_BT, is_padding_BT)
        return self.fused(hidden_BTD, encode_pixels(self.vision, image_BCHW), is_padding_BT)

    def fused(self, hidden_BTD: Tensor, hidden_BLD: Tensor, is_padding_BT: Tensor) -> Tensor:
        """Returns the pooled features (B, 2 D) of what the towers make of unmasked texts and images."""
        states = self.fusion(self._project_text(hidden_BTD), self._project_image(hidden_BLD), is_padding_BT)
        return self.pool(states.text[-1], states.image[-1])

    def mlm(self, batch: PretrainBatch) -> MLMOutputs:
        """Predicts the masked tokens from the masked text and the whole image.

        The loss is made here, within the pass, because its logits are never there as a whole.
        """
        return self.mlm_outputs(self._masked_tokens(batch), batch)

    def mlm_outputs(self, tokens_MD: Tensor, batch: PretrainBatch) -> MLMOutputs:
        """Returns the loss at the masked tokens, given their features."""
        return self.mlm_head.loss(tokens_MD, batch.masked_labels_M)

    def mlm_logits(self, batch: PretrainBatch) -> Tensor:
        """Returns the logits (M, V) of the masked tokens, for those who want to see the predictions."""
        return self.mlm_head(self._masked_tokens(batch))

    def _masked_tokens(self, batch: PretrainBatch) -> Tensor:
        text_BTD = self.encode_text(batch.mlm_ids_BT, batch.is_padding_BT)
        states = self.fusion(text_BTD, self.encode_image(batch.image_BCHW), batch.is_padding_BT)
        return states.text[-1].flatten(0, 1)[batch.masked_index_M]

    def mim(self, batch: PretrainBatch) -> MIMOutputs:
        """Rebuilds the pixels from the visible patches and the unmasked text, fused up to the layer that MIM reads."""
        keep_BK, restore_BN, is_hidden_BN = split_patches(batch.patch_noise_BN, self.config.mim.patch_frac)
        text_BTD = self.encode_text(batch.text_ids_BT, batch.is_padding_BT)
        image_BLD = self.encode_image(batch.image_BCHW, keep_BK)
        layer = self.config.mim.layer
        states = self.fusion(text_BTD, image_BLD, batch.is_padding_BT, num_layers=None if layer == -1 else layer)
        return MIMOutputs(self.mim_decoder(states.image[-1], restore_BN), is_hidden_BN)

    def mim_outputs_of_hidden(self, image_BLD: Tensor, restore_BN: Tensor) -> MIMOutputs:
        """Rebuilds the hidden patches alone from the features of CLS and the visible ones."""
        hidden_BU = hidden_patches(restore_BN, image_BLD.shape[1] - 1)
        return MIMOutputs(self.mim_decoder(image_BLD, restore_BN, hidden_BU), hidden_BU)

    def itm(self, batch: PretrainBatch) -> Tensor:
        """Returns the logits (B, 2) of "image and text belong together" (index 1), half of the images being false."""
        image_BCHW = torch.cat([batch.image_BCHW, batch.false_image_FCHW])[batch.itm_index_B]
        return self.itm_head(self.cls_features(image_BCHW, batch.text_ids_BT, batch.is_padding_BT))

    def vqa(self, batch: ImageTextBatch) -> Tensor:
        """Returns the logits (B, num_answers) of the answers."""
        return self.vqa_head(self.cls_features(batch.images(), batch.text_ids_BT, batch.is_padding_BT))

    def classification(self, batch: ImageTextBatch) -> Tensor:
        """Returns the logits (B, num_classes) of the classes."""
        return self.classification_head(self.cls_features(batch.images(), batch.text_ids_BT, batch.is_padding_BT))

    def retrieval(self, batch: RetrievalBatch) -> Tensor:
        """Returns the scores (B, 1 + R) of each image with its own text and with R false texts."""
        ids_BRT, is_padding_BRT, _ = batch.candidates()
        num_texts = ids_BRT.shape[1]
        # The vision tower has no dropout, so encoding an image once is what encoding it for each text gives.
        image_BLD = self.encode_image(batch.image_BCHW).repeat_interleave(num_texts, dim=0)
        text_BTD = self.encode_text(ids_BRT.flatten(0, 1), is_padding_BRT.flatten(0, 1))
        states = self.fusion(text_BTD, image_BLD, is_padding_BRT.flatten(0, 1))
        return self.retrieval_head(self.pool(states.text[-1], states.image[-1])).view(-1, num_texts)

    def forward(self, batch: ImageTextBatch, step: Step = "packed", **options: bool) -> dict[str, Any]:
        """Runs the passes of the model's objectives: in one packed pass, or one after another.

        Both give the same losses and gradients. The packed pass computes no row that no loss reads, and no padding.

        Args:
            batch: A batch on the model's device, images normalised.
            step: Which.
            **options: Those of the packed pass, see ``fastm3ae.model.packed_step.run_packed``.

        Returns:
            For each objective in ``config.objectives``, by name, what ``fastm3ae.objectives`` makes its loss of.
        """
        if step == "original":
            return {objective: getattr(self, objective)(batch) for objective in self.config.objectives}
        return run_packed(self, batch, **options)
