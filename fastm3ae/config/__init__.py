"""The configuration: frozen dataclasses. A unit stands in the field's name (``_px``, ``_frac``, ``_steps``).

``model.py`` is the part that a checkpoint's model is built from, with the towers' in ``towers.py``; ``train.py`` is how
it learns; ``run.py`` is what a command runs. ``presets.py`` and ``image_presets.py`` hold named configurations,
``files.py`` reads and writes them.
"""

from fastm3ae.config.model import (
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
from fastm3ae.config.run import (
    DataConfig,
    EvaluateConfig,
    FeaturesConfig,
    FinetuneConfig,
    MaskingConfig,
    PretrainConfig,
    RunConfig,
    TaskConfig,
)
from fastm3ae.config.towers import TextConfig, VisionConfig
from fastm3ae.config.train import OptimConfig, Step, TrainConfig

__all__ = [
    "MPMA_PRETRAINING_OBJECTIVES",
    "PRETRAINING_OBJECTIVES",
    "AlignmentConfig",
    "DataConfig",
    "EvaluateConfig",
    "FeaturesConfig",
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
    "Step",
    "TaskConfig",
    "TextConfig",
    "TrainConfig",
    "VisionConfig",
]
