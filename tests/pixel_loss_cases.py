"""Inputs for the tests of the masked pixel loss."""

from dataclasses import dataclass

import pytest
import torch

from fastm3ae.data.images import normalization

MEAN, STD = normalization("clip")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass(frozen=True)
class Case:
    batch_size: int
    height_px: int
    width_px: int
    patch_size_px: int
    normalize_target: bool = True

    def inputs(self, dtype=torch.float32, device="cpu", hidden_frac=0.75):
        """pred, image and is_hidden; an image of patches with unlike means and contrasts, as radiographs have."""
        torch.manual_seed(0)
        B, p = self.batch_size, self.patch_size_px
        rows, columns = self.height_px // p, self.width_px // p
        image_dtype = torch.promote_types(dtype, torch.float32)
        image = torch.randn(B, 3, rows, p, columns, p, dtype=image_dtype)
        image = image * torch.rand(B, 3, rows, 1, columns, 1) + torch.randn(B, 3, rows, 1, columns, 1)
        pred = torch.randn(B, rows * columns, p * p * 3, dtype=image_dtype).to(dtype)
        is_hidden = torch.rand(B, rows * columns) < hidden_frac
        image = image.reshape(B, 3, self.height_px, self.width_px)
        return pred.to(device), image.to(device), is_hidden.to(device)

    def levels(self, device="cpu"):
        """A uint8 image, and the mean and standard deviation of its channels."""
        torch.manual_seed(1)
        image = torch.randint(256, (self.batch_size, 3, self.height_px, self.width_px), dtype=torch.uint8)
        return image.to(device), {"mean": MEAN.to(device), "std": STD.to(device)}

    @property
    def options(self):
        return {"patch_size_px": self.patch_size_px, "normalize_target": self.normalize_target}


CASES = {
    "one_patch_of_one_pixel": Case(1, 1, 1, 1),
    "one_patch": Case(1, 4, 4, 4),
    "odd": Case(3, 9, 15, 3),
    "prime": Case(7, 55, 33, 11),
    "wide": Case(2, 16, 96, 8),
    "no_samples": Case(0, 8, 8, 4),
    "patch_8": Case(3, 24, 40, 8),
    "patch_32": Case(2, 96, 96, 32),
    "patch_40": Case(1, 80, 40, 40),
    "official": Case(4, 288, 288, 16),
    "official_raw_pixels": Case(4, 288, 288, 16, normalize_target=False),
}


ODD = CASES["odd"]


def loss_and_grad(loss_function, pred, *inputs, **options):
    pred = pred.detach().requires_grad_()
    loss = loss_function(pred, *inputs, **options)
    (grad,) = torch.autograd.grad(loss, pred)
    return loss.detach(), grad
