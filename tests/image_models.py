"""Small image models, their batches, and a corpus of made-up radiographs that the tests of these share."""

import io

import numpy as np
import torch
from PIL import Image

from fastm3ae.config import ImageConfig, VisionConfig
from fastm3ae.data.arrow import IMAGE_LABEL_COLUMNS, PATIENT_COLUMN, SEGMENTATION_COLUMNS, write_pairs
from fastm3ae.data.batch import LabelBatch, MaskBatch
from fastm3ae.model.image_model import ImageModel

TOWERS = {
    "vit": VisionConfig(kind="vit", image_size_px=64, patch_size_px=16, width=64, num_blocks=2),
    "clip": VisionConfig(kind="clip", image_size_px=64, patch_size_px=16, width=64, num_blocks=2),
    "swin": VisionConfig(
        kind="swin", image_size_px=64, patch_size_px=4, width=16, swin_num_blocks=(2, 2), swin_num_heads=(1, 2),
        swin_drop_path_frac=0.0,
    ),
}  # fmt: skip
CLASSES = ("left", "right")


def small_config(vision="vit", objective="image_classification", **changes):
    sizes = {"num_classes": 3, "decoder_widths": (12, 10)} | changes
    return ImageConfig(vision=TOWERS[vision], objectives=(objective,), **sizes)


def small_model(*args, seed=0, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    return ImageModel(small_config(*args, **changes)).to(dtype)


def small_batch(config, num=5, seed=0, dtype=torch.float64):
    """Floating-point images with labels or masks, as the objective wants them; the first mask is empty."""
    generator = torch.Generator().manual_seed(seed)
    size, ids = config.image_size_px, [str(number) for number in range(num)]
    image_BCHW = torch.randn(num, 3, size, size, generator=generator, dtype=dtype)
    common = {"image_BCHW": image_BCHW, "item_ids": ids, "bad_samples": [], "pairs": list(range(num)), "groups": ids}
    if "image_classification" in config.objectives:
        label_BC = torch.randint(0, 2, (num, config.num_classes), generator=generator, dtype=torch.int8)
        return LabelBatch(**common, label_BC=label_BC)
    mask_BHW = torch.rand(num, size, size, generator=generator) < 0.3
    mask_BHW[0] = False
    return MaskBatch(**common, mask_BHW=mask_BHW)


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def radiograph(rng, height=36, width=48):
    """A noisy image with a bright square in its left half, its right half, both or neither; the labels and the mask."""
    labels = rng.integers(0, 2, 2)
    pixels, mask = rng.integers(0, 60, (height, width)), np.zeros((height, width), bool)
    for side in np.flatnonzero(labels):
        top, left = rng.integers(2, height - 18), side * width // 2 + rng.integers(1, 7)
        mask[top : top + 16, left : left + 16] = True
    return np.where(mask, pixels + 180, pixels), labels.tolist(), mask * 255


def write_radiographs(folder, name="made", classes=CLASSES, has_masks=False, sizes=None, patients=True):
    """Arrow files of images that can be told apart, some of two images of a patient."""
    for number, (split, num) in enumerate((sizes or {"train": 48, "val": 16, "test": 20}).items()):
        rng, rows = np.random.default_rng(number), []
        for i in range(num):
            pixels, labels, mask = radiograph(rng)
            row = {"image": png(pixels), "labels": labels, "image_id": f"{split}/{i}.png", "split": split}
            rows.append(row | {"mask": png(mask), "patient": f"{split} {i // 2}"})
        columns = SEGMENTATION_COLUMNS if has_masks else IMAGE_LABEL_COLUMNS
        columns = columns | (PATIENT_COLUMN if patients else {})
        write_pairs(folder / f"{name}_{split}.arrow", rows, columns, {"classes": {"labels": list(classes)}})
