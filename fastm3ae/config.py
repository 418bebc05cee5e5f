"""The configuration: frozen dataclasses. A unit stands in the field's name (``_px``, ``_frac``, ``_steps``).

Defaults are the original's pre-training run (run_scripts/pretrain_m3ae.sh); ``presets.py`` holds named configurations,
``model_config.py`` the part that a checkpoint's model is built from.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from fastm3ae.errors import UserError
from fastm3ae.model_config import (
    MPMA_PRETRAINING_OBJECTIVES,
    PRETRAINING_OBJECTIVES,
    AlignmentConfig,
    FusionConfig,
    ImageConfig,
    ImageReconstructionConfig,
    LossWeightsConfig,
    M3AEConfig,
    MIMConfig,
    ModelConfig,
    MPMAConfig,
)
from fastm3ae.tower_config import TextConfig, VisionConfig

__all__ = [
    "MPMA_PRETRAINING_OBJECTIVES",
    "PRETRAINING_OBJECTIVES",
    "AlignmentConfig",
    "DataConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "FusionConfig",
    "ImageConfig",
    "ImageReconstructionConfig",
    "LossWeightsConfig",
    "M3AEConfig",
    "MIMConfig",
    "MPMAConfig",
    "MaskingConfig",
    "ModelConfig",
    "OptimConfig",
    "PretrainConfig",
    "RunConfig",
    "TaskConfig",
    "TextConfig",
    "TrainConfig",
    "VisionConfig",
]

Step = Literal["packed", "original"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which arrow files are read, and how their images and texts become model inputs."""

    root: str = "data/pretrain_arrows"
    """Folder with the files {dataset}_{split}.arrow, as ``fastm3ae prepare`` and the original write them."""
    datasets: tuple[str, ...] = ("medicat", "roco")
    """Names of the data sets; their files are joined."""
    tokenizer: str = "roberta-base"
    """Hub name or local folder of the tokenizer."""
    max_text_tokens: int = 64
    """Texts are cut to this many tokens, CLS and SEP included."""
    train_transform: Literal["clip", "clip_resizedcrop", "clip_randaug", "imagenet", "imagenet_resizedcrop"] = "clip"
    """How a training image becomes a square: see ``fastm3ae.data.images``."""
    val_transform: Literal["clip", "imagenet"] = "clip"
    """The same for validation; no augmentation."""
    alpha: Literal["composite", "official"] = "composite"
    """composite: transparent images are laid on black. official: their alpha is dropped, as in the original."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """What to do about an image that cannot be read: stop with its file and row, or skip the pair and count it."""
    itm_negatives: Literal["data", "batch"] = "data"
    """Where image-text matching takes its false images from. data: the whole data set, as in the original. batch: the
    other pairs of the same pass, so that no false image is decoded or encoded: a changed objective, not exact."""
    draw_demo: bool = False
    """Draw the embedded synthetic corpus into ``root`` first, unless it is there."""

    def __post_init__(self) -> None:
        if self.max_text_tokens < 3:
            raise UserError(f"data.max_text_tokens must be at least 3 (CLS, a word, SEP), got {self.max_text_tokens}.")
        if not self.datasets:
            raise UserError("data.datasets must name at least one data set.")
        if self.train_transform.startswith("imagenet") != (self.val_transform == "imagenet"):
            raise UserError(
                "data.train_transform and data.val_transform must normalise alike: imagenet for both or none."
            )


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Which words are hidden from the language tower in masked language modelling."""

    token_frac: float = 0.15
    """Fraction of the text tokens that masked language modelling hides."""
    words: Literal["whole_word", "official", "token"] = "whole_word"
    """whole_word: whole words of the text, at least one. official: the original's rule for them, whose budget counts
    padding and which hides single tokens with RoBERTa's vocabulary and nothing at all in some texts. token: each token
    by itself, with probability token_frac (the original's ``whole_word_masking=False``)."""

    def __post_init__(self) -> None:
        if not 0 < self.token_frac < 1:
            raise UserError(f"masking.token_frac must lie between 0 and 1, got {self.token_frac}.")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW in the original's six parameter groups, warm-up, and a polynomial or cosine decay."""

    learning_rate: float = 1e-5
    """Peak learning rate of the towers and the modality embeddings."""
    head_lr_multiplier: float = 5.0
    """The heads learn so many times faster."""
    fusion_lr_multiplier: float = 5.0
    """The projections, fusion layers and poolers learn so many times faster."""
    weight_decay: float = 0.01
    """Weight decay of the decayed groups."""
    beta1: float = 0.9
    """Decay of the gradients' running mean."""
    beta2: float = 0.98
    """Decay of the squared gradients' running mean."""
    eps: float = 1e-8
    """Added to the root of the squared gradients' running mean."""
    schedule: Literal["polynomial", "cosine"] = "polynomial"
    """Shape of the decay after the warm-up."""
    warmup_frac: float = 0.1
    """Fraction of all steps over which the learning rate rises from 0."""
    warmup_steps: int | None = None
    """The same as a number of steps; None: use warmup_frac."""
    decay_power: float = 1.0
    """Power of the polynomial decay; 1 is linear."""
    end_learning_rate: float = 0.0
    """Where the polynomial decay ends, for every group."""
    clip_grad_norm: float | None = None
    """Scale gradients down to this total norm; None: no clipping, as the original."""
    adamw: Literal["torch", "official"] = "torch"
    """torch: torch.optim.AdamW, fused. official: the arithmetic of the original's AdamW."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_frac <= 1:
            raise UserError(f"optim.warmup_frac must lie between 0 and 1, got {self.warmup_frac}.")
        if self.end_learning_rate >= self.learning_rate:
            raise UserError(
                f"optim.end_learning_rate must be below optim.learning_rate, "
                f"got {self.end_learning_rate} and {self.learning_rate}."
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: how long, how large, how precise, how often."""

    num_steps: int | None = 100_000
    """Optimiser steps; None: as many as num_epochs needs."""
    num_epochs: int | None = None
    """Stop after so many passes over the data, if that comes first."""
    batch_size: int = 256
    """Image-text pairs per optimiser step, over all processes and passes together."""
    micro_batch: int | Literal["auto"] = "auto"
    """Pairs per process and forward pass, at most; the gradients of several passes are added up. auto: on a GPU the
    most that its memory holds, found by trying and halving; on a CPU 32. The result differs by rounding and dropout.
    With several passes a step, global alignment runs the towers once more, to contrast each pair with all others."""
    step: Step = "packed"
    """packed: one pass for all objectives, without padding and without what no loss reads. original: a pass for each
    objective, as in the original. Both give the same losses and gradients; dropout draws other numbers."""
    share_texts: bool = False
    """Not exact while the language tower has dropout: encode a text once for all objectives of the packed step that see
    it unmasked, so that they see the same dropout."""
    checkpoint_activations: bool = False
    """Exact: the packed step keeps only what its layers start from and computes the rest again in the backward pass,
    which takes less memory and more time."""
    compiled: bool = False
    """Exact: compile the packed step with torch.compile, which takes some minutes at the start."""
    cuda_graphs: bool = False
    """Exact: on one GPU, record the packed step of M3AE once and replay it, which saves the time in which the GPU waits
    for the next kernel to be started. Batches are filled up to the size of a bucket, by some percent."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Autocast type on a GPU (fp16 with a gradient scaler); a CPU always computes in fp32."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:N"."""
    num_workers: int = 8
    """Processes that decode images and tokenize texts, at most the machine's cores; 0: none. No effect on results."""
    log_every_steps: int = 10
    """How often losses go to metrics.jsonl and TensorBoard."""
    validate_every_steps: int = 5_000
    """How often the validation split is evaluated; always at the end."""
    validate_every_epochs: float | None = None
    """The same in passes over the data; None: use validate_every_steps."""
    max_val_batches: int | None = None
    """Validate on at most so many batches; None: the whole split."""
    num_pictures: int = 8
    """Validation pairs drawn into each picture; 0: no pictures."""
    save_every_steps: int = 5_000
    """How often a checkpoint is written; always at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept, beside the one that validated best."""
    patience: int | None = None
    """Stop early after so many validations in a row of which none was the best so far; None: never."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""

    def __post_init__(self) -> None:
        counts = ("num_steps", "num_epochs", "batch_size", "micro_batch", "log_every_steps", "validate_every_steps",
                  "max_val_batches", "save_every_steps", "keep_checkpoints", "patience")  # fmt: skip
        for name in counts:
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise UserError(f"train.{name} must be at least 1, got {value}.")
        if self.num_steps is None and self.num_epochs is None:
            raise UserError("train.num_steps or train.num_epochs must say when training ends; both are None.")
        if self.validate_every_epochs is not None and self.validate_every_epochs <= 0:
            raise UserError(f"train.validate_every_epochs must be positive, got {self.validate_every_epochs}.")
        for name in ("share_texts", "checkpoint_activations", "compiled", "cuda_graphs"):
            if self.step == "original" and getattr(self, name):
                raise UserError(f"train.{name} is an option of train.step packed only.")
        if self.compiled and self.checkpoint_activations:
            raise UserError("train.compiled and train.checkpoint_activations exclude each other.")
        if self.cuda_graphs and self.checkpoint_activations:
            raise UserError("train.cuda_graphs and train.checkpoint_activations exclude each other.")
        for name in ("num_workers", "num_pictures"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} must not be negative, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What pre-training and fine-tuning have in common."""

    output: str = "runs/run"
    """The run folder; it must be new or empty, unless the run resumes."""
    resume: str | None = None
    """A checkpoint of a run to go on with, exactly; "auto": the newest whole one in ``output``, if there is one."""
    force_resume: bool = False
    """Go on although the configuration or the data differ from the checkpoint's."""
    init_from: str | None = None
    """A checkpoint to start from: one of ours, or an official .ckpt. Position embeddings are resized."""
    seed: int = 0
    """Seed of the initial weights, the order of the data, every mask and dropout."""
    model: ModelConfig = field(default_factory=M3AEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"seed must not be negative, got {self.seed}.")
        if self.model.kind != "m3ae" and self.train.step != "packed":
            raise UserError(
                f"train.step must be packed for {self.model.kind.upper()}, which has no original's step, "
                f"got {self.train.step}."
            )
        for name in ("share_texts", "cuda_graphs"):
            if self.model.kind != "m3ae" and getattr(self.train, name):
                raise UserError(f"train.{name} is an option of M3AE only.")

    def step_options(self) -> dict[str, Any]:
        """Returns what the model's forward pass is told."""
        if self.train.step == "original":
            return {"step": "original"}
        names = ["checkpoint_activations", "compiled"] + (["share_texts"] if self.model.kind == "m3ae" else [])
        return {name: getattr(self.train, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """One pre-training run."""

    output: str = "runs/pretrain"
    """The run folder; it must be new or empty, unless the run resumes."""
    masking: MaskingConfig = field(default_factory=MaskingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model.has_texts:
            raise UserError("Pre-training is for images with texts: model.kind must be m3ae or mpma, got image.")
        if "global_alignment" in self.model.objectives and self.train.batch_size == 1:
            raise UserError(
                "train.batch_size is 1, but global_alignment tells a pair from the batch's others: take at least 2, or "
                "leave it out of model.objectives."
            )


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What a model is fine-tuned for, and on which part of the data."""

    kind: Literal["vqa", "classification", "retrieval", "image_classification", "segmentation"] = "vqa"
    """vqa: choose the answer to a question about an image. classification: of an image with its text. retrieval: find
    the text to an image and the image to a text. image_classification: find the classes of an image, and segmentation:
    which of its pixels belong to a finding, both without texts: then the model's kind is "image", and no tokenizer is
    loaded."""
    label_column: str = "p_meth_label"
    """Classification: the column of the classes."""
    num_false_texts: int = 15
    """Retrieval: how many drawn texts an image's own is told from, in training."""
    num_recall_images: int | None = 200
    """Retrieval: over how many images recall is measured at each validation; None: all. Testing takes all."""
    train_frac: float = 1.0
    """Train on this fraction of the training images, drawn by the seed; a larger fraction holds those of a smaller."""
    freeze_towers: bool = False
    """Leave the weights of the towers as they are; of image_classification this makes a linear probe."""
    test: bool = True
    """Evaluate the weights that validated best on the test split at the end, where there is its file."""

    def __post_init__(self) -> None:
        if not 0 < self.train_frac <= 1:
            raise UserError(f"task.train_frac must be above 0 and at most 1, got {self.train_frac}.")
        for name in ("num_false_texts", "num_recall_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"task.{name} must be at least 1, got {value}.")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """One fine-tuning run. Model and tokenizer are those of the checkpoint that it starts from."""

    output: str = "runs/finetune"
    """The run folder; it must be new or empty, unless the run resumes."""
    task: TaskConfig = field(default_factory=TaskConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        without_texts = self.task.kind in ("image_classification", "segmentation")
        if without_texts == self.model.has_texts:
            needed = "be image" if without_texts else "have texts (m3ae, mpma)"
            raise UserError(f"For task.kind {self.task.kind} model.kind must {needed}, got {self.model.kind}.")
        if self.train.cuda_graphs:
            raise UserError("train.cuda_graphs is for pre-training; fine-tuning has train.compiled.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How well a checkpoint does its task on a split."""

    checkpoint: str
    """A checkpoint: its folder or its .safetensors file."""
    task: Literal["auto", "retrieval", "zero-shot"] = "auto"
    """auto: what the checkpoint was fine-tuned for. Of one that was only pre-trained, by its image-text matching (M3AE)
    or its global alignment (MPMA), retrieval: find texts by images and images by texts; zero-shot: tell classes of
    images without texts by ``prompts``."""
    prompts: str | None = None
    """zero-shot: a YAML file with texts for each class: a list, or lists "positive" and "negative"."""
    preselect_with: str | None = None
    """Retrieval: an MPMA checkpoint by whose alignment the pairs are chosen that the fusion scores; others rank below
    them. Not exact; None: all pairs are scored."""
    num_preselected: int = 64
    """Retrieval with ``preselect_with``: so many texts of each image, and so many images of each text."""
    split: str = "test"
    """Which files are read: {dataset}_{split}.arrow."""
    root: str | None = None
    """Folder of the data files; None: where they were in training."""
    datasets: tuple[str, ...] | None = None
    """Names of the data sets; None: those of the training."""
    tokenizer: str | None = None
    """Hub name or local folder; None: the one in the checkpoint's folder, or else that of the training."""
    image_size_px: int | None = None
    """Height and width of the images; None: as in training. Position embeddings are resized."""
    max_text_tokens: int | None = None
    """Texts are cut to this many tokens; None: as in training."""
    output: str = "evaluation"
    """Folder of the results; files of an earlier evaluation are replaced."""
    max_images: int | None = None
    """Retrieval: among the first so many images and their texts; None: all."""
    num_resamples: int = 1000
    """Resamples of the bootstrap that gives the intervals."""
    batch_size: int = 32
    """Items per pass."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Autocast type on a GPU; a CPU always computes in fp32."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:N"."""
    num_workers: int = 4
    """Processes that decode images and tokenize texts, at most the machine's cores; 0: none."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """What to do about an image that cannot be read: stop with its file and row, or skip the item and say so."""

    def __post_init__(self) -> None:
        for name in ("num_resamples", "batch_size", "max_images", "image_size_px", "num_preselected"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}.")
        if (self.task == "zero-shot") != (self.prompts is not None):
            raise UserError("prompts must name a file of prompts for the task zero-shot, and for no other.")
