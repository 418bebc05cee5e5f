"""The CUDA sources compiled for the CPU, thread by thread: their indices, reductions and rounding without a GPU.

With CXXFLAGS=-fsanitize=thread (or address,undefined) and the sanitizer's library in LD_PRELOAD it finds races between
the threads of a block, and reads and writes out of bounds.
"""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from pixel_loss_cases import CASES, MEAN, STD, Case

from fastm3ae.kernels.masked_pixel_loss import launch_masked_pixel_loss_cpu

ROOT = Path(__file__).parents[1]
ENTRY = """
#include "masked_pixel_loss.h"
extern "C" int preds_per_block() { return fastm3ae::kPixelLossPredsPerBlock; }
extern "C" void run(int64_t batch_size, int64_t height, int64_t width, int64_t patch_size, int64_t num_preds,
                    const bool* is_hidden, const int64_t* index, int64_t normalize_target, int64_t pred_dtype,
                    int64_t image_dtype, void* pred, void* image, float* mean, float* std, void* partial, void* loss,
                    void* difference, void* grad_scale) {
  fastm3ae::masked_pixel_loss_cuda({batch_size, height, width, patch_size, num_preds, is_hidden, index,
                                    normalize_target != 0}, fastm3ae::DType(pred_dtype), fastm3ae::DType(image_dtype),
                                   pred, image, mean, std, 0, nullptr, partial, loss, difference, grad_scale);
}
"""
DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]  # in the order of csrc/dtype.h

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs a checkout"),
    pytest.mark.usefixtures("nan_filled_empty"),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """masked_pixel_loss_cuda with pointers to memory of the CPU."""
    folder = tmp_path_factory.mktemp("emulated")
    source = (ROOT / "csrc" / "masked_pixel_loss.cu").read_text()
    source = re.sub(r"([\w<>]+)<<<", r"cuda_emulator::launch(\1, ", source).replace(">>>(", ", ")
    (folder / "kernel.cpp").write_text(source + ENTRY)
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", *os.environ.get("CXXFLAGS", "").split()]
    includes = ["-I", ROOT / "csrc", "-I", ROOT / "tests" / "cuda_emulator"]
    subprocess.run([*command, *includes, "-o", folder / "kernel.so", folder / "kernel.cpp"], check=True)
    return ctypes.CDLL(str(folder / "kernel.so"))


def launch(emulated, pred, image, hidden, patch_size_px, normalize_target, mean=None, std=None):
    B, _, H, W = image.shape
    dtype = torch.promote_types(image.dtype, torch.float32)
    partial = torch.empty(B * -(-hidden.shape[1] // emulated.preds_per_block()), 2, dtype=dtype)
    loss, grad_scale, difference = torch.empty((), dtype=dtype), torch.empty((), dtype=dtype), torch.empty_like(pred)
    is_mask = hidden.dtype == torch.bool
    indices = (hidden, None) if is_mask else (None, hidden)
    tensors = (pred, image, mean, std, partial, loss, difference, grad_scale)
    arguments = [B, H, W, patch_size_px, hidden.shape[1], *indices, normalize_target]
    arguments += [DTYPES.index(pred.dtype), DTYPES.index(image.dtype), *tensors]
    emulated.run(*(x if x is None else ctypes.c_int64(x.data_ptr() if torch.is_tensor(x) else x) for x in arguments))
    return loss, difference, grad_scale


def assert_agree(got, want, pred_dtype):
    rounding = torch.finfo(pred_dtype).eps
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=0)
    # The sums of a patch are in another order, so that a difference of two large numbers may be rounded otherwise.
    torch.testing.assert_close(got[1], want[1], rtol=2 * rounding, atol=4e-6 if pred_dtype != torch.float64 else 1e-12)
    torch.testing.assert_close(got[2], want[2])


SMALL = {name: case for name, case in CASES.items() if not name.startswith("official")} | {
    "official_patch": Case(1, 64, 80, 16),
    "official_patch_raw_pixels": Case(2, 32, 48, 16, normalize_target=False),
}
each_case = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())


@each_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_agrees_with_the_cpu_kernel(emulated, case, dtype):
    pred, image, is_hidden = case.inputs(dtype)
    options = case.options.values()
    got = launch(emulated, pred, image, is_hidden, *options)
    assert_agree(got, launch_masked_pixel_loss_cpu(pred, image, is_hidden, *options, None, None, True), dtype)


@each_case
def test_levels(emulated, case):
    pred, _, is_hidden = case.inputs(torch.bfloat16)
    levels, statistics = case.levels()
    arguments = (pred, levels, is_hidden, *case.options.values(), MEAN, STD)
    assert_agree(launch(emulated, *arguments), launch_masked_pixel_loss_cpu(*arguments, True), torch.bfloat16)


@each_case
def test_hidden_patches_alone(emulated, case):
    pred, image, is_hidden = case.inputs()
    index = torch.rand(is_hidden.shape).argsort(dim=1)[:, : -(-is_hidden.shape[1] // 2)].contiguous()
    pred = pred[:, : index.shape[1]].contiguous()
    arguments = (pred, image, index, *case.options.values())
    got = launch(emulated, *arguments)
    assert_agree(got, launch_masked_pixel_loss_cpu(*arguments, None, None, True), torch.float32)
    if len(index):
        index[-1, -1] = is_hidden.shape[1]
        loss, difference, _ = launch(emulated, *arguments)
        assert loss.isnan() and difference[-1, -1].isnan().all() and torch.equal(difference[:-1], got[1][:-1])


def test_tensors_that_begin_at_odd_places(emulated):
    case = SMALL["official_patch"]
    inputs = case.inputs(torch.bfloat16)
    moved = [torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x) for x in inputs]
    want = launch(emulated, *inputs, *case.options.values())
    assert_agree(launch(emulated, *moved, *case.options.values()), want, torch.bfloat16)
