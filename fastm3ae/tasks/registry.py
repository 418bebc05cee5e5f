"""The tasks by name."""

from collections.abc import Mapping
from typing import Any

from fastm3ae.config import FinetuneConfig
from fastm3ae.tasks.classification import ClassificationTask
from fastm3ae.tasks.image_classification import ImageClassificationTask
from fastm3ae.tasks.retrieval import RetrievalTask
from fastm3ae.tasks.segmentation import SegmentationTask
from fastm3ae.tasks.task import Task
from fastm3ae.tasks.vqa import VqaTask

__all__ = ["TASKS", "make_task"]

TASKS: Mapping[str, type[Task]] = {
    "vqa": VqaTask,
    "classification": ClassificationTask,
    "retrieval": RetrievalTask,
    "image_classification": ImageClassificationTask,
    "segmentation": SegmentationTask,
}


def make_task(config: FinetuneConfig, about: Mapping[str, Any] | None = None) -> Task:
    """Returns the task of a run.

    Args:
        config: The run.
        about: What a checkpoint that was trained for the task says of it; None: it is to be trained.
    """
    return TASKS[config.task.kind](config, about)
