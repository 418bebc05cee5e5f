"""Every Triton kernel under Triton's interpreter on the CPU, against its reference.

TRITON_INTERPRET=1 holds for a whole process, so test_triton_interpreter.py runs this file in one of its own.
"""

import pytest
import test_random_patch_order as order
import torch

from fastm3ae.kernels import random_patch_order_triton
from fastm3ae.kernels.random_patch_order import random_patch_order_from_seed_reference, random_patch_order_reference


def cases(table):
    return pytest.mark.parametrize("case", table.values(), ids=table.keys())


@cases(order.CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_patch_order(case, dtype):
    for noise in (case.noise(dtype=dtype), case.hard_noise(dtype=dtype)):
        got = random_patch_order_triton.launch_random_patch_order(noise, case.num_kept)
        order.assert_all_equal(got, random_patch_order_reference(noise, case.num_kept))


@cases(order.CASES)
def test_random_patch_order_from_seed(case):
    sizes = case.sizes.values()
    for seed in map(torch.tensor, order.SEEDS):
        got = random_patch_order_triton.launch_random_patch_order_from_seed(seed, *sizes)
        order.assert_all_equal(got, random_patch_order_from_seed_reference(seed, *sizes))
