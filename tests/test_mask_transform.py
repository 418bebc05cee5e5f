"""An image and its mask become squares alike, alone and in batches."""

import dataclasses

import numpy as np
import pytest
import torch
from image_models import png, radiograph, write_radiographs
from PIL import Image

from fastm3ae.config import FinetuneConfig, ImageConfig, TaskConfig, VisionConfig
from fastm3ae.data.arrow import SEGMENTATION_COLUMNS, write_pairs
from fastm3ae.data.collate import BatchRequest
from fastm3ae.data.collate_images import LabelBatches, MaskBatches
from fastm3ae.data.datasets import ImageDataset
from fastm3ae.data.images import make_mask_transform, make_transform, normalization
from fastm3ae.errors import UserError
from fastm3ae.tasks.registry import make_task


def blob(height, width):
    """A white ellipse beside the middle, as an image and as its mask."""
    y, x = np.mgrid[:height, :width]
    inside = ((y - 0.4 * height) / (0.2 * height)) ** 2 + ((x - 0.6 * width) / (0.25 * width)) ** 2 < 1
    return Image.fromarray((inside * 255).astype(np.uint8))


def centre(weights_HW):
    weights = weights_HW.double() / weights_HW.sum()
    grid = torch.arange(len(weights), dtype=torch.float64)
    return torch.stack([(weights.sum(1) * grid).sum(), (weights.sum(0) * grid).sum()])


@pytest.mark.parametrize("name", ["clip", "imagenet", "clip_resizedcrop", "imagenet_resizedcrop"])
@pytest.mark.parametrize("size", [(200, 300), (300, 200), (230, 230), (80, 120)])
def test_image_and_mask_stay_aligned(name, size):
    transform, centres = make_mask_transform(name, 64), set()
    for seed in range(6):
        torch.manual_seed(seed)
        image, mask = transform(blob(*size), blob(*size))
        assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
        assert mask.shape == (64, 64) and mask.dtype == torch.bool
        assert torch.dist(centre(image[0]), centre(mask)) < 0.25  # half a pixel would be a shift of one of the two
        assert ((image[0] > 127) == mask).float().mean() > 0.97
        centres.add(tuple(centre(mask).tolist()))
    assert (len(centres) > 1) == name.endswith("resizedcrop")


def test_nothing_is_cut_away_and_masks_are_mirrored_with_their_images():
    mask = np.zeros((30, 50), np.uint8)
    mask[:2], mask[:, -3:] = 255, 255
    mask[12:17, 20:31] = 255
    image = Image.fromarray(mask)
    plain = make_mask_transform("clip", 24)
    _, seen = plain(image, image)
    assert seen[0].all() and seen[:, -1].all()
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    assert torch.equal(plain(mirrored, mirrored)[1], seen.flip(0, 1))


def test_augmentations_for_images_alone_are_refused():
    with pytest.raises(UserError, match="clip_randaug is not for masks"):
        make_mask_transform("clip_randaug", 8)
    with pytest.raises(UserError, match="must be one of"):
        make_mask_transform("flip", 8)


def test_resized_crops_are_the_same_whatever_the_normalisation():
    squares = []
    for name in ("clip_resizedcrop", "imagenet_resizedcrop"):
        torch.manual_seed(5)
        squares.append(make_transform(name, 24)(blob(60, 40)))
    assert torch.equal(*squares)
    assert torch.equal(normalization("imagenet_resizedcrop")[0], normalization("imagenet")[0])
    assert not torch.equal(normalization("imagenet_resizedcrop")[0], normalization("clip_resizedcrop")[0])


def test_batches_of_labels(tmp_path):
    write_radiographs(tmp_path, sizes={"train": 6})
    batches = LabelBatches(ImageDataset([tmp_path / "made_train.arrow"]), make_transform("clip", 16), seed=3)
    batch = batches[BatchRequest(0, 0, [4, 1, 3], [0, 1])]
    assert batch.item_ids == ["train/4.png", "train/1.png"] and batch.pairs == [4, 1] and len(batch) == 2
    assert batch.groups == ["train 2", "train 0"]
    assert torch.equal(batch.label_BC, torch.from_numpy(batches.dataset.labels[[4, 1]]))
    assert batch.image_BCHW.shape == (2, 3, 16, 16)
    assert torch.equal(batch.image_BCHW[1], make_transform("clip", 16)(batches.dataset.image(1)))
    assert batch.to("cpu").groups == batch.groups


def test_batches_of_masks_draw_anew_each_epoch_and_leave_bad_ones_out(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(3):
        pixels, labels, mask = radiograph(rng)
        row = {"image": png(pixels), "labels": labels, "image_id": str(i), "split": "train"}
        rows.append(row | {"mask": png(mask[:5] if i == 1 else mask)})
    facts = {"classes": {"labels": ["left", "right"]}}
    write_pairs(tmp_path / "a.arrow", rows, SEGMENTATION_COLUMNS, facts)
    dataset = ImageDataset([tmp_path / "a.arrow"])
    assert dataset.unit == "image" and dataset.groups == ["0", "1", "2"]
    batches = MaskBatches(dataset, make_mask_transform("clip_resizedcrop", 24), seed=3)
    first, again, second = (batches[BatchRequest(epoch, 0, [0, 1, 2])] for epoch in (0, 0, 1))
    assert first.item_ids == ["0", "2"] and [bad.image_id for bad in first.bad_samples] == ["1"]
    assert torch.equal(first.mask_BHW, again.mask_BHW) and torch.equal(first.image_BCHW, again.image_BCHW)
    assert not torch.equal(first.image_BCHW, second.image_BCHW)
    nothing = batches[BatchRequest(0, 0, [1])]
    assert len(nothing) == 0 and len(nothing.bad_samples) == 1


def test_a_fraction_of_the_images_is_the_seeds_and_holds_a_smaller_one(tmp_path):
    write_radiographs(tmp_path, sizes={"train": 40, "val": 4})

    def drawn(frac, seed=0):
        config = FinetuneConfig(
            task=TaskConfig(kind="image_classification", train_frac=frac),
            model=ImageConfig(vision=VisionConfig(kind="vit", image_size_px=16, patch_size_px=8, width=64)),
            seed=seed,
        )
        config = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, root=str(tmp_path), datasets=("made",)),
            train=dataclasses.replace(config.train, batch_size=1, device="cpu"),
        )
        loader = make_task(config).loader(config, None, "train")
        return {name for pieces in loader.epoch(0) for batch in pieces for name in batch.item_ids}

    tenth, half, whole = (drawn(frac) for frac in (0.1, 0.5, 1))
    assert (len(tenth), len(half), len(whole)) == (4, 20, 40) and tenth < half < whole
    assert drawn(0.1) == tenth != drawn(0.1, seed=1) and len(drawn(0.001)) == 1
