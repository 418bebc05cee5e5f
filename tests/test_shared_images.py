"""An image that several pairs of a batch have is decoded and encoded once, and nothing else changes."""

import dataclasses

import pytest
import torch
from corpus import SIZE, TOKENIZER
from models import small_batch, small_model
from tasks_data import write_classes, write_vqa

from fastm3ae import objectives
from fastm3ae.config import DataConfig, FinetuneConfig, M3AEConfig, TaskConfig, VisionConfig
from fastm3ae.data.collate import BatchRequest
from fastm3ae.data.collate_pairs import ClassificationBatches, VqaBatches
from fastm3ae.data.datasets import ClassificationDataset, VqaDataset
from fastm3ae.data.images import make_transform
from fastm3ae.model.packed_step import plan_batch
from fastm3ae.tasks.registry import make_task

REQUEST = BatchRequest(0, 0, [4, 0, 5, 1, 7])  # of the images 2, 0, 2, 0, 3


def batches(folder, shares_images):
    dataset = VqaDataset([write_vqa(folder) / "vqa_made_train.arrow"])
    transform = make_transform("clip", SIZE)
    return VqaBatches(dataset, TOKENIZER, transform, max_text_tokens=32, shares_images=shares_images)


def test_a_batch_holds_each_image_once(tmp_path, decoded):
    shared, own = batches(tmp_path, True)[REQUEST], batches(tmp_path, False)[REQUEST]
    assert len(decoded) == 3 + 5
    assert shared.image_index_B.tolist() == shared.image_rows_B.tolist() == [0, 1, 0, 1, 2]
    assert own.image_index_B is None and own.image_rows_B.tolist() == [0, 1, 2, 3, 4]
    assert len(shared.image_BCHW) == 3 and torch.equal(shared.images(), own.images())
    assert shared.texts == own.texts and shared.pairs == own.pairs == REQUEST.pairs and len(shared) == 5


def test_the_next_batch_begins_anew(tmp_path, decoded):
    made = batches(tmp_path, True)
    assert len(made[REQUEST].image_BCHW) == len(made[REQUEST].image_BCHW) == 3
    assert len(decoded) == 6


def test_a_bad_image_is_bad_for_each_question(tmp_path):
    made = batches(tmp_path, True)
    image_bytes = made.dataset.table.image_bytes
    made.dataset.table.image_bytes = lambda row, *column: image_bytes(row, *column)[: 40 if row == 2 else None]
    batch = made[REQUEST]
    assert batch.pairs == [0, 1, 7] and [bad.row for bad in batch.bad_samples] == [2, 2]
    assert batch.image_rows_B.tolist() == [0, 0, 1]


@pytest.mark.parametrize("objective", ["vqa", "classification"])
@pytest.mark.parametrize("step", ["packed", "original"])
@pytest.mark.parametrize("vision", ["clip", "swin"])
def test_losses_and_gradients_are_the_same(objective, step, vision):
    """In float64; a Swin in evaluation mode, because it drops paths of each image by itself."""
    model = small_model(vision, objectives=(objective,))
    model.train(vision == "clip")
    batch = small_batch(model, objective, num=5)
    index = torch.tensor([1, 0, 1, 2, 0])
    shared = dataclasses.replace(batch, image_BCHW=batch.image_BCHW[:3], image_index_B=index, image_rows_B=None)
    own = dataclasses.replace(batch, image_BCHW=batch.image_BCHW[index])
    found = []
    for made in (shared, own):
        model.zero_grad()
        torch.manual_seed(0)
        result = objectives.losses(model(made, step=step), made, model.config)[objective]
        result.mean.backward()
        found.append([result.mean.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_each_image_is_encoded_once():
    model = small_model(objectives=("vqa",))
    batch = small_batch(model, "vqa", num=5)
    shared = dataclasses.replace(
        batch, image_BCHW=batch.image_BCHW[:2], image_index_B=torch.tensor([1, 0, 1, 1, 0]), image_rows_B=None
    )
    assert len(plan_batch(model, shared).true_images) == 2 and len(plan_batch(model, batch).true_images) == 5


@pytest.mark.parametrize(
    ("kind", "transform", "is_training", "is_shared"),
    [("clip", "clip", True, True), ("clip", "clip_resizedcrop", True, False), ("clip", "clip_resizedcrop", False, True),
     ("swin", "imagenet", True, False), ("swin", "imagenet", False, True)],
)  # fmt: skip
def test_when_images_are_shared(tmp_path, kind, transform, is_training, is_shared):
    write_classes(tmp_path)
    val_transform = "imagenet" if transform == "imagenet" else "clip"
    data = DataConfig(
        root=str(tmp_path), datasets=("cls_made",), train_transform=transform, val_transform=val_transform
    )
    vision = VisionConfig(kind=kind, patch_size_px=4 if kind == "swin" else 16)
    model = M3AEConfig(vision=vision, objectives=("itm",))
    config = FinetuneConfig(task=TaskConfig(kind="classification"), data=data, model=model)
    task = make_task(config)
    made = task._batches(config, task.dataset("train"), TOKENIZER, is_training)
    assert made.shares_images is is_shared


def test_captions_of_one_image_share_it(tmp_path, decoded):
    dataset = ClassificationDataset([write_classes(tmp_path) / "cls_made_train.arrow"], "i_meth")
    transform = make_transform("clip", SIZE)
    made = ClassificationBatches(dataset, TOKENIZER, transform, max_text_tokens=32, shares_images=True)
    assert len(made[BatchRequest(0, 0, range(16))].image_BCHW) == len(decoded) == 8
