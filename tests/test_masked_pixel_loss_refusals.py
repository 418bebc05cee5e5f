"""What the masked pixel loss refuses, and with which words."""

import pytest
import torch
from pixel_loss_cases import CASES, MEAN, ODD, STD, loss_and_grad

from fastm3ae import _C
from fastm3ae.kernels import masked_pixel_loss
from fastm3ae.kernels.masked_pixel_loss import launch_masked_pixel_loss_cuda


def test_a_patch_that_does_not_exist_is_refused():
    pred, image, _ = ODD.inputs()
    for wrong in (-1, 15, 2**40):
        index = torch.tensor([[0, 1], [2, 3], [4, wrong]])
        with pytest.raises(IndexError, match=f"hidden must be patches from 0 to 14, got {wrong}"):
            masked_pixel_loss(pred[:, :2], image, index, **ODD.options)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [ODD, CASES["patch_8"]])
def test_a_patch_that_does_not_exist_gives_nan_on_a_gpu(case):
    pred, image, _ = case.inputs(device="cuda")
    for wrong in (-1, 15, 2**40):
        index = torch.tensor([[0, 1], [2, 3], [4, wrong]], device="cuda")
        loss, grad = loss_and_grad(masked_pixel_loss, pred[:, :2], image, index, **case.options)
        assert loss.isnan() and grad[2, 1].isnan().all() and grad[:2].isfinite().all() and grad[2, 0].isfinite().all()
        with torch.autograd.set_detect_anomaly(True), pytest.raises(IndexError, match=f"from 0 to 14, got {wrong}"):
            masked_pixel_loss(pred[:, :2], image, index, **case.options)


def test_cuda_tensors_without_cuda_kernels_are_refused(monkeypatch):
    monkeypatch.setattr(_C, "cuda_architectures", ())
    with pytest.raises(RuntimeError, match="masked_pixel_loss .* built without .* FASTM3AE_CUDA=1"):
        launch_masked_pixel_loss_cuda(*ODD.inputs(), 3, True, None, None, False)


@pytest.mark.skipif(not _C.cuda_architectures, reason="needs the CUDA build")
def test_an_error_of_cuda_is_named():
    arguments = dict.fromkeys(("pred", "image", "mean", "std", "stream", "partial", "loss", "difference"), 0)
    shape = _C.PixelLossShape(
        batch_size=0, height=1, width=1, patch_size=1, num_preds=0, is_hidden=0, hidden_index=0, normalize_target=True
    )
    with pytest.raises(RuntimeError, match="^cuda[GS]etDevice: cudaError[A-Z][A-Za-z]+: "):
        _C.masked_pixel_loss_cuda(
            shape, pred_dtype="float32", image_dtype="float32", device=4096, grad_scale=0, **arguments
        )
    with pytest.raises(ValueError, match="no kernel is compiled for int32"):
        _C.masked_pixel_loss_cuda(shape, pred_dtype="int32", image_dtype="float32", device=0, grad_scale=0, **arguments)


PRED, IMAGE, IS_HIDDEN = ODD.inputs()
LEVELS = ODD.levels()[0]
INDEX = torch.zeros(3, 15, dtype=torch.int64)
MISTAKES = {
    "image_without_batch": (PRED, IMAGE[0], IS_HIDDEN, 3, r"image must be \(B, 3, H, W\) .* got \(3, 9, 15\) float32"),
    "grey_image": (PRED, IMAGE[:, :1], IS_HIDDEN, 3, r"image must be .* got \(3, 1, 9, 15\) float32"),
    "int8_image": (PRED, IMAGE.char(), IS_HIDDEN, 3, r"image must be .* uint8, float32 or float64, got .* int8"),
    "patch_does_not_divide": (PRED, IMAGE, IS_HIDDEN, 4, "patch_size_px must divide the image's 9 x 15 pixels, got 4"),
    "patch_of_no_pixels": (PRED, IMAGE, IS_HIDDEN, 0, "patch_size_px must divide .* got 0"),
    "other_patch_size": (PRED, IMAGE[:, :, :, :9], IS_HIDDEN[:, :9], 3, r"pred must be \(3, 9, 27\) .* got"),
    "fewer_preds_than_index": (PRED[:, 1:], IMAGE, INDEX, 3, r"pred must be \(3, 15, 27\) .* got \(3, 14, 27\)"),
    "mixed_precision": (PRED, IMAGE.double(), IS_HIDDEN, 3, "pred must be .* float64 for this image .* got .* float32"),
    "double_pred_of_levels": (PRED.double(), LEVELS, IS_HIDDEN, 3, "pred must be .* float32 .* got .* float64"),
    "integer_pred": (PRED.int(), IMAGE, IS_HIDDEN, 3, "pred must be .* float32 or float16 or bfloat16 .* int32"),
    "float_mask": (PRED, IMAGE, IS_HIDDEN.float(), 3, r"hidden must be \(B, N\) = \(3, 15\) bool .* got .* float32"),
    "mask_of_other_shape": (PRED, IMAGE, IS_HIDDEN[:1], 3, r"hidden must be .* got \(1, 15\) bool"),
    "index_of_other_batch": (PRED, IMAGE, INDEX[:1], 3, r"hidden must be .* \(3, U\) int64, got \(1, 15\) int64"),
    "flat_index": (PRED, IMAGE, INDEX[:, 0], 3, r"hidden must be .* got \(3,\) int64"),
    "int32_index": (PRED, IMAGE, INDEX.int(), 3, r"hidden must be .* got .* int32"),
    "other_device": (PRED.to("meta"), IMAGE, IS_HIDDEN, 3, "pred, image and hidden must be .* got meta, cpu and cpu"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(mistake):
    pred, image, hidden, patch_size_px, message = mistake
    with pytest.raises(ValueError, match=message):
        masked_pixel_loss(pred, image, hidden, patch_size_px=patch_size_px, normalize_target=True)


NORMALIZATION_MISTAKES = {
    "no_mean": (LEVELS, None, STD, r"mean must be \(3, 1, 1\) float32 for a uint8 image, got None"),
    "no_std": (LEVELS, MEAN, None, r"std must be \(3, 1, 1\) float32 .* got None"),
    "flat_mean": (LEVELS, MEAN.view(3), STD, r"mean must be .* got \(3,\) float32"),
    "double_std": (LEVELS, MEAN, STD.double(), r"std must be .* got \(3, 1, 1\) float64"),
    "other_device": (LEVELS, MEAN, STD.to("meta"), "hidden, mean and std must be .* got cpu, cpu, cpu, cpu and meta"),
    "normalised_image": (IMAGE, MEAN, STD, "mean and std must be None for an image of float32"),
}


@pytest.mark.parametrize("mistake", NORMALIZATION_MISTAKES.values(), ids=NORMALIZATION_MISTAKES.keys())
def test_mistakes_of_the_normalisation_are_named(mistake):
    image, mean, std, message = mistake
    with pytest.raises(ValueError, match=message):
        masked_pixel_loss(PRED, image, IS_HIDDEN, **ODD.options, mean=mean, std=std)
