"""The Triton kernels' bodies without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_every_kernel_under_tritons_interpreter():
    pytest.importorskip("triton", reason="Triton has no build for this system")
    command = [sys.executable, "-m", "pytest", "-q", Path(__file__).with_name("triton_interpreter.py")]
    process = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


def test_without_triton_a_cuda_tensor_says_what_to_install():
    program = """
import sys
sys.modules["triton"] = None
import torch
from fastm3ae.kernels.random_patch_order import launch_random_patch_order_cuda, random_patch_order
random_patch_order(torch.rand(2, 3), 1)
launch_random_patch_order_cuda(torch.rand(2, 3), 1)
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 1
    last_line = process.stderr.strip().splitlines()[-1]
    assert last_line.startswith("RuntimeError: random_patch_order of CUDA tensors runs in Triton") and (
        "pip install 'triton>=3.6'" in last_line
    )
