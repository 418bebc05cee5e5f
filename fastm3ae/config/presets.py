"""Named configurations. Each docstring gives the command, the hardware that it is meant for, and what to expect."""

from collections.abc import Callable, Mapping
from typing import Literal, TypeVar, overload

from fastm3ae.config import (
    AlignmentConfig,
    DataConfig,
    FinetuneConfig,
    FusionConfig,
    ImageReconstructionConfig,
    M3AEConfig,
    MaskingConfig,
    MIMConfig,
    MPMAConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    TaskConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from fastm3ae.config.image_presets import IMAGE_PRESETS
from fastm3ae.errors import UserError, nearest

__all__ = ["FINETUNE_PRESETS", "PRESETS", "preset"]


def m3ae() -> PretrainConfig:
    """The original's official pre-training: ViT-B/16 at 288 px, RoBERTa-base, ROCO and MediCaT, 100,000 steps.

    Command: ``fastm3ae pretrain --preset m3ae --data.root data/pretrain_arrows``. Hardware: the original used 8 A100
    GPUs with 32 pairs each (here: put ``torchrun --nproc-per-node 8 -m`` before the command); one GPU makes the same
    step of 256 pairs in as many passes as its memory asks for. The towers start from OpenAI's CLIP and RoBERTa-base,
    fetched from the hub (or give local folders).
    """
    return PretrainConfig(
        output="runs/m3ae",
        model=M3AEConfig(
            vision=VisionConfig(weights="vit_base_patch16_clip_quickgelu_224.openai"),
            text=TextConfig(weights="roberta-base"),
        ),
    )


def m3ae_b32() -> PretrainConfig:
    """The same with CLIP ViT-B/32, a quarter of the patches: a quick first run on one GPU.

    Command: ``fastm3ae pretrain --preset m3ae-b32 --data.root data/pretrain_arrows``.
    """
    return PretrainConfig(
        output="runs/m3ae-b32",
        model=M3AEConfig(
            vision=VisionConfig(weights="vit_base_patch32_clip_quickgelu_224.openai", patch_size_px=32),
            text=TextConfig(weights="roberta-base"),
        ),
    )


# What both demonstrations share: the embedded corpus, and small parts that fit it.
DEMO_TEXT = TextConfig(
    kind="bert",
    width=128,
    num_layers=1,
    num_heads=4,
    mlp_width=512,
    max_positions=64,
    num_token_types=2,
    layer_norm_eps=1e-12,
    dropout_frac=0.0,
)
DEMO_FUSION = FusionConfig(width=128, num_layers=2, num_heads=4, dropout_frac=0.0)
DEMO_DATA = DataConfig(
    root="runs/demo-corpus",
    datasets=("demo",),
    tokenizer="runs/demo-corpus/tokenizer",
    max_text_tokens=48,
    draw_demo=True,
)
DEMO_OPTIM = OptimConfig(
    learning_rate=1e-3, head_lr_multiplier=1.0, fusion_lr_multiplier=1.0, schedule="cosine", clip_grad_norm=1.0
)


def demo() -> PretrainConfig:
    """A small model on the embedded synthetic corpus: watch M3AE learn, without any download.

    Command: ``fastm3ae pretrain --preset demo``. Hardware: two CPU cores, about 5 minutes. Expect in summary.json, on
    held-out pairs: masked words are predicted much better with the right image than with another one, matching pairs
    are told from false ones, and patches are rebuilt better than by their mean.
    """
    return PretrainConfig(
        output="runs/demo",
        model=M3AEConfig(
            vision=VisionConfig(image_size_px=96, patch_size_px=16, width=128, num_blocks=3),
            text=DEMO_TEXT,
            fusion=DEMO_FUSION,
            mim=MIMConfig(layer=1, decoder_width=128, decoder_num_layers=1, decoder_num_heads=4),
            init_std=0.05,
        ),
        data=DEMO_DATA,
        optim=DEMO_OPTIM,
        train=TrainConfig(
            num_steps=800,
            batch_size=32,
            num_workers=1,
            log_every_steps=10,
            validate_every_steps=400,
            save_every_steps=800,
        ),
    )


def mpma() -> PretrainConfig:
    """MPMA on MIMIC-CXR: ViT-B/16 at 224 px from MAE, Bio_ClinicalBERT, 200 epochs of 256 pairs.

    Command: ``fastm3ae pretrain --preset mpma --data.root data/arrows``. Hardware: one GPU of 80 GB or more, or several
    (put ``torchrun --nproc-per-node 8 -m`` before the command). The towers are fetched from the hub (or give local
    folders). The paper's own numbers are not known here: optimiser, batch and length are those of MRM (Zhou et al.
    2023), whose objectives are the nearest, and which numbers to expect is not known either.
    """
    return PretrainConfig(
        output="runs/mpma",
        model=MPMAConfig(
            vision=VisionConfig(
                kind="vit", weights="vit_base_patch16_224.mae", image_size_px=224, patch_size_px=16, num_blocks=12
            ),
            text=TextConfig(kind="bert", weights="emilyalsentzer/Bio_ClinicalBERT"),
        ),
        data=DataConfig(
            root="data/arrows",
            datasets=("mimic_cxr",),
            tokenizer="emilyalsentzer/Bio_ClinicalBERT",
            max_text_tokens=128,
            train_transform="imagenet",
            val_transform="imagenet",
        ),
        masking=MaskingConfig(token_frac=0.5),
        optim=OptimConfig(
            learning_rate=1.5e-4,
            head_lr_multiplier=1.0,
            fusion_lr_multiplier=1.0,
            weight_decay=0.05,
            beta2=0.95,
            schedule="cosine",
            warmup_frac=0.2,
        ),
        train=TrainConfig(num_steps=None, num_epochs=200),
    )


def mpma_demo() -> PretrainConfig:
    """A small MPMA on the embedded synthetic corpus, without any download.

    Command: ``fastm3ae pretrain --preset mpma-demo``. Hardware: two CPU cores, up to 5 minutes. Expect in summary.json,
    on held-out pairs: hidden words are predicted much better with the right image than with another one, an image
    finds its report among 64 far more often than by chance, and patches are rebuilt better than by their mean.
    """
    return PretrainConfig(
        output="runs/mpma-demo",
        model=MPMAConfig(
            vision=VisionConfig(kind="vit", image_size_px=96, patch_size_px=8, width=128, num_blocks=3),
            text=DEMO_TEXT,
            fusion=DEMO_FUSION,
            num_slots=16,
            image=ImageReconstructionConfig(decoder_width=64, decoder_num_layers=1, decoder_num_heads=2),
            alignment=AlignmentConfig(pool="mean", head_width=256, width=64),
            init_std=0.05,
        ),
        data=DEMO_DATA,
        masking=MaskingConfig(token_frac=0.5),
        optim=DEMO_OPTIM,
        train=TrainConfig(
            num_steps=500,
            batch_size=64,
            micro_batch=64,  # at once, or the towers would run twice
            num_workers=1,
            log_every_steps=10,
            validate_every_steps=250,
            save_every_steps=500,
        ),
    )


PRESETS: dict[str, Callable[[], PretrainConfig]] = {
    "m3ae": m3ae,
    "m3ae-b32": m3ae_b32,
    "demo": demo,
    "mpma": mpma,
    "mpma-demo": mpma_demo,
}


CLIP_B16 = VisionConfig(weights="vit_base_patch16_clip_quickgelu_224.openai", image_size_px=384)


def _official_task(
    name: str,
    dataset: str,
    task: TaskConfig,
    batch_size: int,
    num_epochs: int,
    head_lr_multiplier: float,
    max_text_tokens: int,
    train_transform: Literal["clip", "clip_resizedcrop"] = "clip_resizedcrop",
) -> FinetuneConfig:
    """Returns a run of the original's run_scripts/finetune_m3ae.sh."""
    return FinetuneConfig(
        output=f"runs/{name}",
        task=task,
        model=M3AEConfig(vision=CLIP_B16, text=TextConfig(weights="roberta-base")),
        data=DataConfig(
            root="data/finetune_arrows",
            datasets=(dataset,),
            max_text_tokens=max_text_tokens,
            train_transform=train_transform,
        ),
        optim=OptimConfig(learning_rate=5e-6, head_lr_multiplier=head_lr_multiplier, fusion_lr_multiplier=5.0),
        train=TrainConfig(num_steps=None, num_epochs=num_epochs, batch_size=batch_size, validate_every_epochs=1.0),
    )


def vqa_rad() -> FinetuneConfig:
    """Answer questions about images. The original's run on VQA-RAD: 50 epochs of batches of 64.

    Command: ``fastm3ae finetune vqa --preset vqa-rad --init-from runs/m3ae/checkpoints/best``. The original reports an
    accuracy of 77.0 %, of 67.2 % on open and 83.5 % on closed questions.
    """
    return _official_task("vqa-rad", "vqa_vqa_rad", TaskConfig(kind="vqa"), 64, 50, 50.0, 32, "clip")


def slake() -> FinetuneConfig:
    """Answer questions about images. The original's run on the English half of SLAKE: 15 epochs of batches of 32.

    Command: ``fastm3ae finetune vqa --preset slake --init-from runs/m3ae/checkpoints/best``. The original reports an
    accuracy of 83.3 %, of 80.3 % on open and 87.8 % on closed questions.
    """
    return _official_task("slake", "vqa_slack", TaskConfig(kind="vqa"), 32, 15, 50.0, 32)


def medvqa_2019() -> FinetuneConfig:
    """Answer questions about images. The original's run on three categories of MedVQA-2019: 10 epochs of batches of 32.

    Command: ``fastm3ae finetune vqa --preset medvqa-2019 --init-from runs/m3ae/checkpoints/best``. The original reports
    an accuracy of 79.9 %.
    """
    return _official_task("medvqa-2019", "vqa_medvqa_2019", TaskConfig(kind="vqa"), 32, 10, 50.0, 32)


def melinda() -> FinetuneConfig:
    """Tell classes of images with their texts. The original's run on MELINDA: 20 epochs of batches of 16.

    Command: ``fastm3ae finetune classification --preset melinda --init-from runs/m3ae/checkpoints/best``; the column of
    the classes is ``--task.label-column``. The original reports an accuracy of 78.5 % on ``p_meth_label``.
    """
    return _official_task(
        "melinda", "cls_melinda", TaskConfig(kind="classification", label_column="p_meth_label"), 16, 20, 10.0, 128
    )


def roco() -> FinetuneConfig:
    """Find texts by images and images by texts. The original's run on ROCO: 10 epochs of batches of 256.

    Command: ``fastm3ae finetune retrieval --preset roco --init-from runs/m3ae/checkpoints/best``. Among 2,000 pairs the
    original reports recalls at 1, 5 and 10 of 22.2, 52.5 and 66.7 % from text to image, and 22.9, 51.1 and 65.8 % from
    image to text.
    """
    return _official_task("roco", "irtr_roco", TaskConfig(kind="retrieval"), 256, 10, 5.0, 40)


FINETUNE_PRESETS: dict[str, dict[str, Callable[[], FinetuneConfig]]] = {
    "vqa": {"vqa-rad": vqa_rad, "slake": slake, "slack": slake, "medvqa-2019": medvqa_2019},
    "classification": {"melinda": melinda},
    "retrieval": {"roco": roco},
    **IMAGE_PRESETS,
}
"""By task; the first one is the default."""

AnyRun = TypeVar("AnyRun", bound=RunConfig)


@overload
def preset(name: str) -> PretrainConfig: ...


@overload
def preset(name: str, presets: Mapping[str, Callable[[], AnyRun]]) -> AnyRun: ...


def preset(name: str, presets: Mapping[str, Callable[[], RunConfig]] = PRESETS) -> RunConfig:
    """Returns the configuration of that name.

    Raises:
        UserError: There is none.
    """
    if name not in presets:
        raise UserError(f"There is no preset {name!r}, expected one of {', '.join(presets)}.{nearest(name, presets)}")
    return presets[name]()
