"""What is fuzzed."""

from collections.abc import Callable

from fuzz.arrows import ArrowTarget
from fuzz.campaign import Target
from fuzz.checkpoints import CheckpointTarget, TrainingCheckpointTarget
from fuzz.configurations import CommandTarget, ConfigurationTarget, OfficialTarget
from fuzz.images import DicomTarget, ImageTarget, NiftiTarget

__all__ = ["TARGETS"]

TARGETS: dict[str, Callable[[], Target]] = {
    target.name: target
    for target in (
        ArrowTarget,
        ImageTarget,
        DicomTarget,
        NiftiTarget,
        CheckpointTarget,
        TrainingCheckpointTarget,
        ConfigurationTarget,
        CommandTarget,
        OfficialTarget,
    )
}
