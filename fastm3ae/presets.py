"""Named configurations. Each docstring gives the command, the hardware that it is meant for, and what to expect."""

from collections.abc import Callable

from fastm3ae.config import (
    AlignmentConfig,
    DataConfig,
    FusionConfig,
    ImageReconstructionConfig,
    M3AEConfig,
    MaskingConfig,
    MIMConfig,
    MPMAConfig,
    OptimConfig,
    PretrainConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from fastm3ae.errors import UserError, nearest

__all__ = ["PRESETS", "preset"]


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
            text=TextConfig(
                kind="bert",
                width=128,
                num_layers=1,
                num_heads=4,
                mlp_width=512,
                max_positions=64,
                num_token_types=2,
                layer_norm_eps=1e-12,
                dropout_frac=0.0,
            ),
            fusion=FusionConfig(width=128, num_layers=2, num_heads=4, dropout_frac=0.0),
            mim=MIMConfig(layer=1, decoder_width=128, decoder_num_layers=1, decoder_num_heads=4),
            init_std=0.05,
        ),
        data=DataConfig(
            root="runs/demo-corpus",
            datasets=("demo",),
            tokenizer="runs/demo-corpus/tokenizer",
            max_text_tokens=48,
            draw_demo=True,
        ),
        optim=OptimConfig(
            learning_rate=1e-3, head_lr_multiplier=1.0, fusion_lr_multiplier=1.0, schedule="cosine", clip_grad_norm=1.0
        ),
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
            text=TextConfig(
                kind="bert",
                width=128,
                num_layers=1,
                num_heads=4,
                mlp_width=512,
                max_positions=64,
                num_token_types=2,
                layer_norm_eps=1e-12,
                dropout_frac=0.0,
            ),
            fusion=FusionConfig(width=128, num_layers=2, num_heads=4, dropout_frac=0.0),
            num_slots=16,
            image=ImageReconstructionConfig(decoder_width=64, decoder_num_layers=1, decoder_num_heads=2),
            alignment=AlignmentConfig(pool="mean", head_width=256, width=64),
            init_std=0.05,
        ),
        data=DataConfig(
            root="runs/demo-corpus",
            datasets=("demo",),
            tokenizer="runs/demo-corpus/tokenizer",
            max_text_tokens=48,
            draw_demo=True,
        ),
        masking=MaskingConfig(token_frac=0.5),
        optim=OptimConfig(
            learning_rate=1e-3, head_lr_multiplier=1.0, fusion_lr_multiplier=1.0, schedule="cosine", clip_grad_norm=1.0
        ),
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


def preset(name: str) -> PretrainConfig:
    """Returns the configuration of that name.

    Raises:
        UserError: There is none.
    """
    if name not in PRESETS:
        raise UserError(f"There is no preset {name!r}, expected one of {', '.join(PRESETS)}.{nearest(name, PRESETS)}")
    return PRESETS[name]()
