"""What the tasks on images without texts have in common."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fastm3ae.config import ImageConfig
from fastm3ae.data.datasets import ImageDataset
from fastm3ae.tasks.labels import LabelledTask

__all__ = ["ImageTask"]


class ImageTask(LabelledTask):
    """A task on images without texts, whose labels are classes of which an image may have several."""

    def with_head(self, model: ImageConfig) -> ImageConfig:
        """Returns the model's configuration with this task's head."""
        return dataclasses.replace(model, objectives=(self.objective,), num_classes=len(self.labels))

    def unit(self, dataset: ImageDataset) -> str:
        """Returns "patient" where the data say whose each image is, else "image"."""
        return dataset.unit

    def _open(self, files: Sequence[Path]) -> ImageDataset:
        return ImageDataset(files, self.config.data.alpha)
