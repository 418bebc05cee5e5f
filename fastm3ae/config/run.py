"""What a command runs: pre-training, fine-tuning or an evaluation, on which data, and with what hidden.

Defaults are the original's pre-training run (run_scripts/pretrain_m3ae.sh).
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from fastm3ae.config.model import M3AEConfig, ModelConfig
from fastm3ae.config.ranges import check_finite
from fastm3ae.config.train import OptimConfig, TrainConfig
from fastm3ae.errors import UserError, shown

__all__ = [
    "DataConfig",
    "EvaluateConfig",
    "FeaturesConfig",
    "FinetuneConfig",
    "MaskingConfig",
    "PretrainConfig",
    "RunConfig",
    "TaskConfig",
]


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
class RunConfig:
    """What pre-training and fine-tuning have in common."""

    output: str = "runs/run"
    """The run folder; it must be new or empty, unless the run resumes."""
    resume: str | None = None
    """A checkpoint of a run to go on with, exactly; "auto": the newest whole one in ``output``, if there is one. What
    torchrun starts again after a failure (``--max-restarts``) goes on from what it has saved, whatever stands here."""
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
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be at least 0 and less than 2**63, got {shown(self.seed)}.")
        check_finite(self)
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
class SplitConfig:
    """A checkpoint, and how it reads a split."""

    checkpoint: str
    """A checkpoint: its folder or its .safetensors file."""
    split: str = "test"
    """Which files are read: {dataset}_{split}.arrow."""
    root: str | None = None
    """Folder of the data files; None: where they were in training."""
    datasets: tuple[str, ...] | None = None
    """Names of the data sets; None: those of the training."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:N"."""
    num_workers: int = 4
    """Processes that decode images and tokenize texts, at most the machine's cores; 0: none."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """What to do about an image that cannot be read: stop with its file and row, or skip the item and say so."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SplitConfig):
    """How well a checkpoint does its task on a split."""

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

    def __post_init__(self) -> None:
        for name in ("num_resamples", "batch_size", "max_images", "image_size_px", "num_preselected"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}.")
        if (self.task == "zero-shot") != (self.prompts is not None):
            raise UserError("prompts must name a file of prompts for the task zero-shot, and for no other.")


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(SplitConfig):
    """The features of a split's images and texts."""

    checkpoint: str
    """A checkpoint: its folder or its .safetensors file, or an official .ckpt that holds its configuration."""
    output: str = "features.parquet"
    """The file, which must not exist: .parquet, or .npz, for which all features must fit into memory."""
    text_column: str | None = None
    """The column of each image's texts; None: "questions" or "caption", where the files have one."""
    images_only: bool = False
    """Read no texts: each image once."""
    batch_size: int = 32
    """Items per pass, which the features do not depend on but for rounding."""
    precision: Literal["bf16", "fp16", "fp32"] = "fp32"
    """Autocast type on a GPU; a CPU always computes in fp32. The features are written in fp32."""

    def __post_init__(self) -> None:
        if not self.output.endswith((".parquet", ".npz")):
            raise UserError(f"output must end in .parquet or .npz, got {self.output}.")
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}.")
        if self.num_workers < 0:
            raise UserError(f"num_workers must not be negative, got {self.num_workers}.")
        if self.images_only and self.text_column is not None:
            raise UserError(f"images_only reads no texts, but text_column is {self.text_column}.")
