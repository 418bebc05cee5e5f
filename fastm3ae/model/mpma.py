"""MPMA: image and report of a pair are masked in the same pass, rebuilt, and aligned.

Vision tower on the visible patches alone, language tower on the masked report, both without padding. Four objectives
read what the towers make: the image is rebuilt from the visible patches by MAE's decoder; the report from its visible
words, the visible patches and a memory by ``MemoryFusion``; images and reports, and words and patches, are aligned.

Fine-tuned for questions or classes it sees the whole image and the whole text. The text's tokens pass the same fusion
reading all patches, and CLS of what comes out and CLS of the image are pooled for the head, as M3AE pools its two
streams. This design is ours: of the paper's downstream models we know no more than that there are multi-modal ones.

Source: Zhang et al., "Multi-task Paired Masking with Alignment Modeling for Medical Vision-Language Pre-training" (IEEE
TMM 2023, arXiv 2305.07920), as its abstract describes it. There is no public code; ``MPMAConfig`` says of every choice
whose it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastm3ae.config import MPMAConfig
from fastm3ae.data.batch import ImageTextBatch, PretrainBatch
from fastm3ae.masking import hidden_patches, num_kept_patches, split_patches
from fastm3ae.model.alignment import GlobalFeatures, GlobalHead, LocalHead, cls_attention
from fastm3ae.model.freezing import Freezable
from fastm3ae.model.heads import AnswerHead, MIMDecoder, MIMOutputs, MLMHead, MLMOutputs, Pooler, init_weights
from fastm3ae.model.memory_fusion import FusionPlan, MemoryFusion
from fastm3ae.model.packed import Encoded, Run, call, checkpointed, encode_images, encode_texts, maybe_compiled
from fastm3ae.model.plan import Images, Plan, Read, Reads, Texts, make_plan
from fastm3ae.model.rows import Index, Layout, send
from fastm3ae.model.text import build_text
from fastm3ae.model.vision import build_vision

__all__ = ["MPMA", "MPMAPlan", "Sides", "compute"]

TASKS = ("vqa", "classification")


class MPMA(Freezable):
    """Two towers, the fusion, and a head for each objective.

    Args:
        config: The model's configuration, with the vocabulary resolved (``fastm3ae.weights.towers.resolve_text``).
    """

    def __init__(self, config: MPMAConfig) -> None:
        super().__init__()
        self.config = config
        objectives, vision, width = config.objectives, config.vision, config.fusion.width
        self.vision = build_vision(vision)
        self.text = build_text(config.text, config.init_std)
        towers = self.vision.num_features, config.text.width
        is_task = self.is_of_task
        is_fused = is_task or "report_reconstruction" in objectives
        if is_fused:
            self.image_proj = nn.Linear(towers[0], width)
            self.text_proj = nn.Linear(towers[1], width)
        if "report_reconstruction" in objectives:
            self.mlm_head = MLMHead(width, config.text.vocab_size)
        if "image_reconstruction" in objectives:
            patch_size_px = vision.patch_size_px * config.image.target_scale
            self.mim_decoder = MIMDecoder(config.image, towers[0], vision.num_patches, patch_size_px, nn.GELU)
            nn.init.normal_(self.mim_decoder.mask_token, std=config.init_std)
        if "global_alignment" in objectives:
            self.global_head = GlobalHead(*towers, config.alignment)
        if "local_alignment" in objectives:
            self.local_head = LocalHead(*towers, config.alignment)
        if is_task:
            self.image_pooler = Pooler(width)
            self.text_pooler = Pooler(width)
        if "vqa" in objectives:
            self.vqa_head = AnswerHead(2 * width, config.num_answers)
        if "classification" in objectives:
            self.classification_head = AnswerHead(2 * width, config.num_classes)
        for name, module in self.named_children():
            if name not in ("vision", "text"):
                module.apply(partial(init_weights, std=config.init_std))
        if is_fused:
            self.fusion = MemoryFusion(config)

    @property
    def leaves_some_alone(self) -> bool:
        """Whether there are parameters that no objective reads: the language tower's, if only images are rebuilt."""
        return self.config.objectives == ("image_reconstruction",)

    def forward(
        self,
        batch: ImageTextBatch,
        only: Sequence[str] | None = None,
        checkpoint_activations: bool = False,
        compiled: bool = False,
    ) -> dict[str, Any]:
        """Encodes both sides once and runs the heads.

        Args:
            batch: A batch on the model's device, images normalised.
            only: Run only the heads of these objectives. The towers do the same whatever is asked for, so that dropout
                draws the same.
            checkpoint_activations: As of ``fastm3ae.model.packed_step.run_packed``.
            compiled: Likewise.

        Returns:
            For each objective, by name, what ``fastm3ae.objectives`` makes its loss of.
        """
        plan = MPMAPlan(batch, self.config)
        plan.send(batch.image_BCHW.device)
        names = self.config.objectives if only is None else tuple(only)
        return maybe_compiled(compute, compiled)(
            self, batch, plan, names, checkpointed if checkpoint_activations else call
        )

    def embed(self, batch: ImageTextBatch) -> GlobalFeatures:
        """Returns the features of the whole, unmasked images and reports, for retrieval."""
        plan = MPMAPlan(batch, self.config, whole="alignment")
        plan.send(batch.image_BCHW.device)
        return self._global_alignment(self._encode(batch, plan)["alignment"], batch, plan, call)

    @property
    def is_of_task(self) -> bool:
        """Whether it is fine-tuned for questions or classes, and fuses whole images and texts."""
        return self.config.objectives[0] in TASKS

    def fused(self, hidden_BTD: Tensor, hidden_BLD: Tensor, batch: ImageTextBatch) -> Tensor:
        """Returns the pooled features (B, 2 D) of what the towers make of unmasked texts and images; for a task."""
        plan = MPMAPlan(batch, self.config)
        plan.send(hidden_BLD.device)
        sides = (Encoded(x, None, None) for x in (hidden_BLD, hidden_BTD[~batch.is_padding_BT]))
        return self._pooled(Sides(*sides, None), plan, call)

    def mlm_logits(self, batch: PretrainBatch) -> Tensor:
        """Returns the logits (M, V) of the hidden words, for those who want to see the predictions."""
        plan = MPMAPlan(batch, self.config)
        plan.send(batch.image_BCHW.device)
        return self.mlm_head(self._fused_tokens(self._encode(batch, plan)["report_reconstruction"], plan, call))

    def fuse_whole(self, batch: ImageTextBatch) -> Tensor:
        """Returns all tokens of the whole, unmasked texts beside their whole images, one text after another: (S, D)."""
        plan = MPMAPlan(batch, self.config, whole="fusion")
        plan.send(batch.image_BCHW.device)
        return self._fused_tokens(self._encode(batch, plan)["fusion"], plan, call)

    def _encode(self, batch: ImageTextBatch, plan: "MPMAPlan", run: Run = call) -> dict[str, "Sides"]:
        image_BCHW, config = batch.image_BCHW, self.config
        if config.image.target_scale > 1:
            image_BCHW = F.avg_pool2d(image_BCHW, config.image.target_scale)
        keep_BK = restore_BN = None
        if plan.towers.num_visible:
            keep_BK, restore_BN, _ = split_patches(batch.patch_noise_BN, config.image.patch_frac)
        image = encode_images(self.vision, image_BCHW, None, keep_BK, plan.towers, run)
        text = encode_texts(self.text, plan.towers, run) if plan.towers.texts else None
        sides = {}
        for name, taken in plan.towers.taken.items():
            image_BLX = Encoded(*(taken["image"].rows.of(x).unflatten(0, (len(batch), -1)) for x in image))
            text_SX = Encoded(*(taken["text"].rows.of(x) for x in text)) if "text" in taken else None
            sides[name] = Sides(image_BLX, text_SX, restore_BN)
        return sides

    def _image_reconstruction(self, sides: "Sides", batch: PretrainBatch, plan: "MPMAPlan", run: Run) -> MIMOutputs:
        image_BLD = sides.image.tokens_SD
        hidden_BU = hidden_patches(sides.restore_BN, image_BLD.shape[1] - 1)
        return MIMOutputs(self.mim_decoder(image_BLD, sides.restore_BN, hidden_BU), hidden_BU)

    def _report_reconstruction(self, sides: "Sides", batch: PretrainBatch, plan: "MPMAPlan", run: Run) -> MLMOutputs:
        return self.mlm_head.loss(self._fused_tokens(sides, plan, run), batch.masked_labels_M)

    def _fused_tokens(self, sides: "Sides", plan: "MPMAPlan", run: Run) -> Tensor:
        patches_SD = self.image_proj(sides.image.tokens_SD[:, 1:].flatten(0, 1))
        return self.fusion(self.text_proj(sides.text.tokens_SD), patches_SD, plan.fusion.layers, run)

    def _vqa(self, sides: "Sides", batch: ImageTextBatch, plan: "MPMAPlan", run: Run) -> Tensor:
        return self.vqa_head(self._pooled(sides, plan, run))

    def _classification(self, sides: "Sides", batch: ImageTextBatch, plan: "MPMAPlan", run: Run) -> Tensor:
        return self.classification_head(self._pooled(sides, plan, run))

    def _pooled(self, sides: "Sides", plan: "MPMAPlan", run: Run) -> Tensor:
        """Returns the pooled features of the texts and the images: (B, 2 D)."""
        image_BLD = self.image_proj(sides.image.tokens_SD)
        patches_SD, text_SD = image_BLD[:, 1:].flatten(0, 1), self.text_proj(sides.text.tokens_SD)
        text_B1D = self.fusion(text_SD, patches_SD, plan.fusion.layers, run)[:, None]
        return torch.cat([self.text_pooler(text_B1D), self.image_pooler(image_BLD)], dim=-1)

    def _global_alignment(self, sides: "Sides", batch: ImageTextBatch, plan: "MPMAPlan", run: Run) -> GlobalFeatures:
        cls_BD = sides.text.tokens_SD.index_select(0, plan.first_rows.tensor)
        if self.config.alignment.pool == "cls":
            return self.global_head(sides.image.tokens_SD[:, 0], cls_BD)
        words_BWD, is_absent_BW = plan.words_of(sides.text.tokens_SD)
        words_BD = words_BWD.masked_fill(is_absent_BW[..., None], 0).sum(dim=1)
        num_words_B1 = (~is_absent_BW).sum(dim=1, keepdim=True)
        return self.global_head(sides.image.tokens_SD.mean(dim=1), (cls_BD + words_BD) / (1 + num_words_B1))

    def _local_alignment(self, sides: "Sides", batch: PretrainBatch, plan: "MPMAPlan", run: Run) -> Tensor:
        image, text = sides.image, sides.text
        words_BWD, is_absent_BW = plan.words_of(text.tokens_SD)
        q_BHd = text.q_SHd.index_select(0, plan.first_rows.tensor)
        word_weights_BW = cls_attention(q_BHd, plan.words_of(text.k_SHd)[0], is_absent_BW)
        patch_weights_BK = cls_attention(image.q_SHd[:, 0], image.k_SHd[:, 1:])
        return self.local_head(words_BWD, is_absent_BW, word_weights_BW, image.tokens_SD[:, 1:], patch_weights_BK)


def compute(model: MPMA, batch: ImageTextBatch, plan: "MPMAPlan", names: Sequence[str], run: Run) -> dict[str, Any]:
    """Computes what the plan says, without asking the device for anything: one graph for ``torch.compile``."""
    encoded = model._encode(batch, plan, run)
    return {name: getattr(model, f"_{name}")(encoded[_side_of(name)], batch, plan, run) for name in names}


@dataclass(frozen=True)
class Sides:
    """What an objective reads of the towers.

    Args:
        image: CLS and (visible) patches of the images: (B, L, ...) each.
        text: Tokens of the reports, one report after another; None: nothing.
        restore_BN: For each patch its place in "kept patches, then hidden patches"; None: no patch is hidden.
    """

    image: Encoded
    text: Encoded | None
    restore_BN: Tensor | None


def _side_of(objective: str) -> str:
    """The alignments read the same, and so do the tasks."""
    if objective in TASKS:
        return "task"
    return "alignment" if objective.endswith("alignment") else objective


class MPMAPlan:
    """A batch's way through the model: index arithmetic on the host.

    Attributes:
        towers: What is encoded. Nothing is encoded twice.
        first_rows: At which row each text begins.
        fusion: What the fusion computes; None: nothing is fused.

    Args:
        batch: The batch; one of pre-training where a side of it is to be masked.
        config: The model's configuration.
        whole: Whole images and reports are encoded, and nothing else: for alignment, or for a fusion of which every
            token is read; None: what the objectives read.
    """

    def __init__(
        self, batch: ImageTextBatch, config: MPMAConfig, whole: Literal["alignment", "fusion"] | None = None
    ) -> None:
        num_patches = config.vision.num_patches
        num_kept = num_kept_patches(num_patches, config.image.patch_frac)
        is_full = whole == "alignment" or config.alignment.view == "full"
        sides = [whole] if whole is not None else list(dict.fromkeys(map(_side_of, config.objectives)))
        self.towers: Plan = make_plan(
            {side: _reads(side, batch, config, is_full) for side in sides},
            num_images=len(batch.image_BCHW),
            num_whole_tokens=1 + num_patches,
            num_visible_tokens=1 + num_kept,
            shares_texts=True,
        )
        texts, num_layers = Layout(batch.num_tokens_B), config.fusion.num_layers
        starts_B = texts.ends.array[:-1]
        self.first_rows = Index(starts_B)
        self._indices = [*self.towers.indices(), self.first_rows]
        self.fusion: FusionPlan | None = None
        if "fusion" in sides:
            images, all_rows = Layout(np.full(len(batch), num_patches)), np.arange(texts.num_tokens)
            self.fusion = FusionPlan(texts, images, all_rows, batch.num_tokens_B, num_layers)
        elif "task" in sides:
            images = Layout(np.full(len(batch), num_patches))
            self.fusion = FusionPlan(texts, images, starts_B, np.ones(len(batch), np.int64), num_layers)
        elif "report_reconstruction" in sides:
            images = Layout(np.full(len(batch), num_kept if config.masking == "paired" else num_patches))
            pair_M, position_M = _hidden_positions(batch)
            num_hidden_B = np.bincount(pair_M, minlength=len(batch))
            self.fusion = FusionPlan(texts, images, starts_B[pair_M] + position_M, num_hidden_B, num_layers)
        if self.fusion is not None:
            self._indices += self.fusion.indices()
        if "alignment" in sides:
            self._plan_words(batch, starts_B, is_full)

    def _plan_words(self, batch: ImageTextBatch, starts_B: np.ndarray, is_full: bool) -> None:
        """Finds the words that are aligned: no CLS, no SEP, and none that is hidden."""
        position_T = np.arange(batch.text_ids_BT.shape[1])
        is_word_BT = (position_T > 0) & (position_T < batch.num_tokens_B[:, None] - 1)
        if not is_full:
            is_word_BT[_hidden_positions(batch)] = False
        num_words_B = is_word_BT.sum(axis=1)
        self._num_columns = max(1, int(num_words_B.max(initial=0)))
        position_BW = np.argsort(~is_word_BT, axis=1, kind="stable")[:, : self._num_columns]
        is_there_BW = np.arange(self._num_columns) < num_words_B[:, None]
        self._words = Index((starts_B[:, None] + position_BW * is_there_BW).ravel())  # CLS stands in for absent ones
        self._num_words = Index(num_words_B)
        self._indices += [self._words, self._num_words]

    def send(self, device: torch.device) -> None:
        """Copies what the device needs at once."""
        send(self._indices, device)

    def words_of(self, x_SX: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rows of the words that are aligned, (B, W, ...), and where there is none, (B, W)."""
        x_BWX = x_SX.index_select(0, self._words.tensor).unflatten(0, (-1, self._num_columns))
        column_W = torch.arange(self._num_columns, device=x_SX.device)
        return x_BWX, column_W >= self._num_words.tensor[:, None]


def _reads(side: str, batch: ImageTextBatch, config: MPMAConfig, is_full: bool) -> Reads:
    """Returns what a side sees, and that it reads all of it; ``is_full``: alignment sees everything."""
    sees_all = side in ("task", "fusion") or (side == "alignment" and is_full)
    sees_image = sees_all or (side == "report_reconstruction" and config.masking == "separate")
    pairs, everything = np.arange(len(batch)), Read(0)
    ids_BT = batch.text_ids_BT if sees_all else batch.mlm_ids_BT
    texts = Texts("full" if sees_all else "masked", ids_BT, batch.num_tokens_B, pairs)
    text = None if side == "image_reconstruction" else everything
    images = Images(batch.image_rows_B, visible_only=not sees_image)
    return Reads(texts, images, text=text, image=everything)


def _hidden_positions(batch: PretrainBatch) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pair of each hidden token, and its position in the report."""
    return np.divmod(batch.masked_rows_M, batch.text_ids_BT.shape[1])
