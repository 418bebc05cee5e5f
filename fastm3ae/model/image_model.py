"""A vision tower with a head of its own, for images without texts: their classes, or which pixels are of a finding."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastm3ae.config import ImageConfig
from fastm3ae.data.batch import ImageBatch
from fastm3ae.model.freezing import Freezable
from fastm3ae.model.heads import init_weights, rows_of_block
from fastm3ae.model.packed import Run, call, checkpointed, maybe_compiled
from fastm3ae.model.vision import build_vision, clip_front, encode_pixels

__all__ = ["ImageModel", "MaskDecoder", "compute"]


class ImageModel(Freezable):
    """The tower of M3AE or MPMA and a linear layer, or a decoder.

    All images have the same number of tokens, so that there is no padding to be left out, and blocks run as they are.
    Only the last one computes less where the classes are found from CLS alone: the patches are then only keys and
    values, which is exact and saves most of it.

    Args:
        config: The model's configuration.
    """

    leaves_some_alone = False
    """There is no parameter that the objective does not read."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = build_vision(config.vision)
        if "segmentation" in config.objectives:
            self.segmentation_head = MaskDecoder(self.vision.num_features, config.decoder_widths)
        else:
            self.image_classification_head = nn.Linear(self.vision.num_features, config.num_classes)
            init_weights(self.image_classification_head, config.init_std)

    def forward(
        self, batch: ImageBatch, checkpoint_activations: bool = False, compiled: bool = False
    ) -> dict[str, Tensor]:
        """Returns by the objective's name the logits of the classes (B, C), or of the pixels (B, S, S).

        Args:
            batch: A batch on the model's device, images normalised.
            checkpoint_activations: Whether the activations within a ViT's blocks are computed again in the backward
                pass.
            compiled: Whether ``torch.compile`` makes one graph of the pass.
        """
        run = checkpointed if checkpoint_activations else call
        (objective,) = self.config.objectives
        return {objective: maybe_compiled(compute, compiled)(self, batch.image_BCHW, run)}


def compute(model: ImageModel, image_BCHW: Tensor, run: Run) -> Tensor:
    """Computes the logits of the model's objective."""
    config, vision = model.config, model.vision
    if config.vision.kind == "swin":
        return model.image_classification_head(encode_pixels(vision, image_BCHW).mean(dim=1))
    x_BLD = clip_front(vision, image_BCHW)
    *blocks, last = vision.blocks
    for block in blocks:
        x_BLD = run(block, x_BLD)
    if "image_classification" in config.objectives and config.pool == "cls":
        cls_B1 = torch.zeros(len(x_BLD), 1, dtype=torch.int64, device=x_BLD.device)
        return model.image_classification_head(vision.norm(run(rows_of_block, last, x_BLD, cls_B1))[:, 0])
    patches_BND = vision.norm(run(last, x_BLD)[:, 1:])
    if "image_classification" in config.objectives:
        return model.image_classification_head(patches_BND.mean(dim=1))
    return model.segmentation_head(patches_BND, config.image_size_px)


class MaskDecoder(nn.Module):
    """A logit for each pixel: 3 x 3 convolutions, each with norm and ReLU, on grids of 1, 2, 4, ... times the patches'.

    A product makes one channel of the last, which is interpolated to the image's size (bilinearly, as between stages).

    Args:
        input_width: Width of the patches' features.
        widths: Channels of each stage.

    Source: SETR-PUP (Zheng et al. 2021), as in MGCA's mgca/models/backbones/transformer_seg.py.
    Deviation: Group norm in the place of batch norm, so that the result depends neither on how a batch is cut into
        passes nor on statistics that processes would have to share; no linear layer before, and a product in the place
        of the last convolution.
    """

    def __init__(self, input_width: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(1, after), nn.ReLU())
            for before, after in pairwise((input_width, *widths))
        )
        self.pixels = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, patches_BND: Tensor, image_size_px: int) -> Tensor:
        """Returns the logits (B, S, S) from the features of a square grid of patches, row by row."""
        grid = round(patches_BND.shape[1] ** 0.5)
        x_BDhw = patches_BND.transpose(1, 2).unflatten(2, (grid, grid))
        for number, stage in enumerate(self.stages):
            x_BDhw = stage(F.interpolate(x_BDhw, scale_factor=2, mode="bilinear") if number else x_BDhw)
        return F.interpolate(self.pixels(x_BDhw), size=(image_size_px, image_size_px), mode="bilinear")[:, 0]
