"""The configuration of a model: what a checkpoint's header holds, and all that building the model needs."""

from dataclasses import dataclass, field
from typing import Literal

from fastm3ae.config.ranges import MOST_CELLS, MOST_HEADS, MOST_LAYERS, MOST_ROWS, MOST_WIDTH, check_range
from fastm3ae.config.towers import TextConfig, VisionConfig
from fastm3ae.errors import UserError

__all__ = [
    "MPMA_PRETRAINING_OBJECTIVES",
    "PRETRAINING_OBJECTIVES",
    "AlignmentConfig",
    "FusionConfig",
    "ImageConfig",
    "ImageReconstructionConfig",
    "LossWeightsConfig",
    "M3AEConfig",
    "MIMConfig",
    "MPMAConfig",
    "ModelConfig",
]

MOST_STAGES = 8  # of a decoder, which doubles the grid in each
Objective = Literal["mlm", "mim", "itm", "vqa", "classification", "retrieval"]
MPMAObjective = Literal[
    "image_reconstruction", "report_reconstruction", "global_alignment", "local_alignment", "vqa", "classification"
]
ImageObjective = Literal["image_classification", "segmentation"]
PRETRAINING_OBJECTIVES: tuple[Objective, ...] = ("mlm", "mim", "itm")
MPMA_PRETRAINING_OBJECTIVES: tuple[MPMAObjective, ...] = (
    "image_reconstruction", "report_reconstruction", "global_alignment", "local_alignment",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """Co-attention: one stack of layers per modality, each with self-attention, cross-attention and an FFN."""

    width: int = 768
    """Width of a token in both streams."""
    num_layers: int = 6
    """Layers per stream."""
    num_heads: int = 12
    """Attention heads."""
    mlp_ratio: int = 4
    """Hidden width of the FFN over its width."""
    dropout_frac: float = 0.1
    """Dropout on attention and hidden states."""

    def __post_init__(self) -> None:
        check_range("model.fusion", self, 1, MOST_WIDTH, "width", "mlp_ratio")
        check_range("model.fusion", self, 1, MOST_LAYERS, "num_layers")
        check_range("model.fusion", self, 0, 1, "dropout_frac")


@dataclass(frozen=True, kw_only=True)
class MIMConfig:
    """Masked image modelling: how much is hidden, where the pixels are rebuilt from, and by which decoder."""

    patch_frac: float = 0.75
    """Fraction of the patches that is hidden from the vision tower."""
    layer: int = 3
    """The decoder reads the image features that enter this fusion layer (0-based); -1: those after the last."""
    decoder_width: int = 384
    """Width of a token in the decoder."""
    decoder_num_layers: int = 4
    """Transformer blocks of the decoder."""
    decoder_num_heads: int = 6
    """Attention heads of the decoder."""
    normalize_target: bool = True
    """Rebuild each patch after subtracting its mean and dividing by its standard deviation."""


@dataclass(frozen=True, kw_only=True)
class M3AEConfig:
    """The model of "Multi-Modal Masked Autoencoders for Medical Vision-and-Language Pre-Training" (MICCAI 2022)."""

    kind: Literal["m3ae"] = "m3ae"
    """Which model this is."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    mim: MIMConfig = field(default_factory=MIMConfig)
    objectives: tuple[Objective, ...] = PRETRAINING_OBJECTIVES
    """Which heads the model has. The training loss is the plain sum of their losses."""
    init_std: float = 0.02
    """Standard deviation of initial weights outside of the vision tower; 0.05 at width 128 acts as 0.02 does at 768."""
    num_answers: int = 0
    """Answers of the VQA head."""
    num_classes: int = 0
    """Classes of the classification head."""

    def __post_init__(self) -> None:
        vision, fusion = self.vision, self.fusion
        if vision.kind == "swin" and "mim" in self.objectives:
            raise UserError(
                'Swin cannot be masked: remove "mim" from model.objectives, or use model.vision.kind "clip".'
            )
        if "mim" in self.objectives and not -1 <= self.mim.layer < fusion.num_layers:
            raise UserError(
                f"model.mim.layer must be -1 (after the last fusion layer) or one of 0 to {fusion.num_layers - 1}, "
                f"got {self.mim.layer}."
            )
        if not 0 < self.mim.patch_frac < 1:
            raise UserError(f"model.mim.patch_frac must lie between 0 and 1, got {self.mim.patch_frac}.")
        _check_heads("model.fusion", fusion.width, fusion.num_heads)
        _check_heads("model.text", self.text.width, self.text.num_heads)
        _check_decoder("model.mim", self.mim, vision.num_patches)
        check_range("model", self, 0, 1, "init_std")
        _check_objectives(self)

    @property
    def image_size_px(self) -> int:
        """Height and width of the images that a batch holds."""
        return self.vision.image_size_px

    @property
    def has_texts(self) -> bool:
        """Whether there is a language tower."""
        return True

    @property
    def num_noise_patches(self) -> int:
        """For how many patches of an image a batch holds noise, which decides what is hidden."""
        return self.vision.num_patches if "mim" in self.objectives else 0

    @property
    def draws_false_images(self) -> bool:
        """Whether a batch holds false images."""
        return "itm" in self.objectives


@dataclass(frozen=True, kw_only=True)
class ImageReconstructionConfig:
    """How MPMA rebuilds hidden patches: by MAE's decoder, from what the vision tower makes of the visible ones."""

    patch_frac: float = 0.75
    """Fraction of the patches that is hidden from the vision tower. Source: MAE (He et al. 2022)."""
    decoder_width: int = 512
    """Width of a token in the decoder. Source: MAE."""
    decoder_num_layers: int = 4
    """Transformer blocks of the decoder. Our choice: half of MAE's."""
    decoder_num_heads: int = 16
    """Attention heads of the decoder. Source: MAE."""
    normalize_target: bool = True
    """Rebuild each patch after subtracting its mean and dividing by its standard deviation. Source: MAE."""
    target_scale: Literal[1, 2] = 1
    """2: the loader gives images of twice the tower's size, which sees the means of 2 x 2 pixels and rebuilds all.
    Source: MRM (Zhou et al. 2023) does so; that it is off is our choice."""


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """Global and local alignment: which features are compared, and how. The form is that of MGCA (Wang et al. 2022)."""

    temperature: float = 0.07
    """By what the similarities of images and reports are divided. Source: CLIP's and MGCA's start value."""
    learn_temperature: bool = False
    """Train the temperature from there, kept at 0.01 or above. Our choice: fixed, as in MGCA."""
    local_temperature: float = 0.1
    """By what the similarities of words and patches are divided. Source: MGCA."""
    view: Literal["masked", "full"] = "masked"
    """masked: the features of the visible patches and words, of the same pass. full: those of the whole image and
    report, which cost a second pass through the towers. Our choice."""
    pool: Literal["cls", "mean"] = "cls"
    """The feature of an image or a report: cls, the one of CLS (source: MGCA); mean, the mean over CLS and all visible
    patches or words."""
    head_width: int = 2048
    """Hidden width of the two-layer heads. Source: MGCA."""
    width: int = 128
    """Width of the compared features. Source: MGCA."""


@dataclass(frozen=True, kw_only=True)
class LossWeightsConfig:
    """MPMA's loss is the sum of its objectives' losses times these. Our choices; the logged losses include them."""

    image_reconstruction: float = 1.0
    """Weight of the pixels' mean square error."""
    report_reconstruction: float = 1.0
    """Weight of the masked tokens' cross entropy."""
    global_alignment: float = 1.0
    """Weight of the contrast between pairs."""
    local_alignment: float = 1.0
    """Weight of the contrast between the words, and between the patches, of one pair."""


@dataclass(frozen=True, kw_only=True)
class MPMAConfig:
    """MPMA (Zhang et al., TMM 2023, arXiv 2305.07920) as its abstract describes it.

    Paired masking, reconstruction of both, global and local alignment, memory-augmented cross-modal fusion. There is no
    public code: sizes, ratios and forms are choices of ours or of its neighbours, as each field says. How many words
    are hidden is ``PretrainConfig.masking``: half of them in the presets, whole words, as in MRM.
    """

    kind: Literal["mpma"] = "mpma"
    """Which model this is."""
    vision: VisionConfig = field(default_factory=lambda: VisionConfig(kind="vit", image_size_px=224, num_blocks=12))
    """Our choice: ViT-B/16 of timm at 224 px, as MAE and MRM."""
    text: TextConfig = field(
        default_factory=lambda: TextConfig(kind="bert", max_positions=512, num_token_types=2, layer_norm_eps=1e-12)
    )
    """Our choice: BERT-base, so that Bio_ClinicalBERT fits."""
    fusion: FusionConfig = field(default_factory=lambda: FusionConfig(num_layers=4))
    """The report's layers: self-attention, cross-attention to the visible patches and the memory, FFN. Four of them,
    each as M3AE's: our choice."""
    memory: Literal["slots", "topk", "none"] = "slots"
    """slots: learned keys and values beside the patches', in each layer (Cornia et al. 2020, "Meshed-Memory
    Transformer"). topk: one learned matrix that words and patches query before the fusion, the best entries counting
    (Chen et al. 2021, "R2Gen-CMN"). none: plain cross-attention. That slots are the default is our choice."""
    num_slots: int = 64
    """M, the slots of each layer. Our choice: Meshed-Memory has 40."""
    num_topk_slots: int = 2048
    """Rows of the matrix of "topk". Source: R2Gen-CMN."""
    num_topk_kept: int = 32
    """How many of them a head of a token reads. Source: R2Gen-CMN."""
    image: ImageReconstructionConfig = field(default_factory=ImageReconstructionConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    masking: Literal["paired", "separate"] = "paired"
    """paired: the report is rebuilt beside the visible patches of its image. separate: beside the whole image, which
    costs a second pass through the vision tower; the control, in which one of the two is masked at a time."""
    objectives: tuple[MPMAObjective, ...] = MPMA_PRETRAINING_OBJECTIVES
    """Which losses there are, and so which heads the model has. vqa and classification are for fine-tuning, alone."""
    loss_weights: LossWeightsConfig = field(default_factory=LossWeightsConfig)
    init_std: float = 0.02
    """Standard deviation of initial weights outside of the vision tower and the memory. Source: BERT."""
    num_answers: int = 0
    """Answers of the VQA head."""
    num_classes: int = 0
    """Classes of the classification head."""

    def __post_init__(self) -> None:
        if self.vision.kind == "swin":
            raise UserError('Swin cannot be masked: use model.vision.kind "vit" or "clip".')
        if not 0 < self.image.patch_frac < 1:
            raise UserError(f"model.image.patch_frac must lie between 0 and 1, got {self.image.patch_frac}.")
        if int(self.vision.num_patches * (1 - self.image.patch_frac)) < 1:
            raise UserError(
                f"model.image.patch_frac {self.image.patch_frac} leaves none of the {self.vision.num_patches} patches "
                "visible."
            )
        _check_heads("model.fusion", self.fusion.width, self.fusion.num_heads)
        _check_heads("model.text", self.text.width, self.text.num_heads)
        _check_decoder("model.image", self.image, self.vision.num_patches)
        check_range("model", self, 0, 1, "init_std")
        check_range("model", self, 0, MOST_ROWS, "num_slots", "num_topk_slots")
        check_range("model.alignment", self.alignment, 1, MOST_WIDTH, "head_width", "width")
        if self.memory == "slots" and self.num_slots < 1:
            raise UserError(f'model.num_slots must be at least 1, got {self.num_slots}; model.memory "none" has none.')
        if self.memory == "topk" and not 1 <= self.num_topk_kept <= self.num_topk_slots:
            raise UserError(
                f"model.num_topk_kept must be from 1 to model.num_topk_slots, "
                f"got {self.num_topk_kept} of {self.num_topk_slots}."
            )
        for name in ("temperature", "local_temperature"):
            if getattr(self.alignment, name) <= 0:
                raise UserError(f"model.alignment.{name} must be positive, got {getattr(self.alignment, name)}.")
        _check_objectives(self)
        tasks = [name for name in self.objectives if name not in MPMA_PRETRAINING_OBJECTIVES]
        if tasks and len(self.objectives) > 1:
            raise UserError(f"MPMA is trained for {tasks[0]} alone, got model.objectives {self.objectives}.")
        for name in () if tasks else self.objectives:
            if getattr(self.loss_weights, name) <= 0:
                raise UserError(
                    f"model.loss_weights.{name} must be positive, got {getattr(self.loss_weights, name)}; to train "
                    "without it, leave it out of model.objectives."
                )

    @property
    def image_size_px(self) -> int:
        """Height and width of the images that a batch holds."""
        return self.vision.image_size_px * self.image.target_scale

    @property
    def has_texts(self) -> bool:
        """Whether there is a language tower."""
        return True

    @property
    def num_noise_patches(self) -> int:
        """For how many patches of an image a batch holds noise, which decides what is hidden."""
        return self.vision.num_patches

    @property
    def draws_false_images(self) -> bool:
        """Whether a batch holds false images."""
        return False


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """A vision tower with a head of its own, for images without texts: what MPMA's uni-modal tasks are tried with."""

    kind: Literal["image"] = "image"
    """Which model this is."""
    vision: VisionConfig = field(default_factory=lambda: VisionConfig(kind="vit", image_size_px=224, num_blocks=12))
    objectives: tuple[ImageObjective, ...] = ("image_classification",)
    """Which head the model has: one of them."""
    num_classes: int = 1
    """Classes of image_classification, of which an image may have several."""
    pool: Literal["cls", "mean"] = "cls"
    """What a linear layer finds the classes from. cls: the feature of CLS; of a Swin, which has none, the mean. mean:
    the mean over all patches."""
    decoder_widths: tuple[int, ...] = (256, 128, 64, 32)
    """Segmentation: channels of the decoder's stages, each but the first on a grid of twice the height and width.
    Source: the form is SETR-PUP's, as in MGCA; the widths are our choice, half of MGCA's."""
    init_std: float = 0.02
    """Standard deviation of the classes' initial weights."""

    def __post_init__(self) -> None:
        if len(self.objectives) != 1:
            raise UserError(
                f"model.objectives of an image model must be image_classification or segmentation, got "
                f"{self.objectives}."
            )
        if "segmentation" in self.objectives and self.vision.kind == "swin":
            raise UserError('Segmentation needs a ViT: use model.vision.kind "vit" or "clip", not "swin".')
        check_range("model", self, 1, MOST_ROWS, "num_classes")
        check_range("model", self, 0, 1, "init_std")
        check_range("model", self, 1, MOST_WIDTH, "decoder_widths")
        if not 1 <= len(self.decoder_widths) <= MOST_STAGES:
            raise UserError(
                f"model.decoder_widths must be one to {MOST_STAGES} numbers, got {len(self.decoder_widths)} of them."
            )

    @property
    def image_size_px(self) -> int:
        """Height and width of the images that a batch holds."""
        return self.vision.image_size_px

    @property
    def has_texts(self) -> bool:
        """Whether there is a language tower."""
        return False


ModelConfig = M3AEConfig | MPMAConfig | ImageConfig


def _check_heads(name: str, width: int, num_heads: int) -> None:
    if not 0 < num_heads <= MOST_HEADS or width % num_heads:
        raise UserError(f"{name}: the width must be a multiple of the number of heads, got {width} and {num_heads}.")


def _check_decoder(name: str, config: MIMConfig | ImageReconstructionConfig, num_patches: int) -> None:
    width = config.decoder_width
    check_range(name, config, 1, MOST_WIDTH, "decoder_width")
    check_range(name, config, 1, MOST_LAYERS, "decoder_num_layers")
    _check_heads(f"{name}.decoder", width, config.decoder_num_heads)
    if width % 4:
        raise UserError(f"{name}.decoder_width must be a multiple of 4 (sine and cosine of two axes), got {width}.")
    if num_patches * width > MOST_CELLS:
        raise UserError(
            f"{name}.decoder_width must be at most {MOST_CELLS // num_patches} for {num_patches} patches, got {width}."
        )


def _check_objectives(model: ModelConfig) -> None:
    names = model.objectives
    check_range("model", model, 0, MOST_ROWS, "num_answers", "num_classes")
    if not names or len(set(names)) != len(names):
        raise UserError(f"model.objectives must name at least one objective, each once, got {names}.")
    for objective, size in (("vqa", "num_answers"), ("classification", "num_classes")):
        if objective in names and getattr(model, size) <= 0:
            raise UserError(f"model.{size} must be positive for the objective {objective}, got {getattr(model, size)}.")
