"""Which device a process takes."""

import pytest
import torch

from fastm3ae.device import pick_device
from fastm3ae.errors import UserError


def gpus(monkeypatch, number):
    monkeypatch.setattr("torch.cuda.device_count", lambda: number)
    monkeypatch.setattr("torch.cuda.is_available", lambda: number > 0)


@pytest.mark.parametrize(
    ("num_gpus", "name", "local_rank", "number_here", "picked"),
    [
        (0, "auto", 0, 1, "cpu"),
        (2, "auto", 0, 1, "cuda:0"),
        (2, "cpu", 1, 2, "cpu"),
        (8, "cuda", 0, 1, "cuda:0"),
        (8, "cuda:3", 0, 1, "cuda:3"),
        (8, "cuda:3", 5, 8, "cuda:5"),  # one for each process, whatever the number
    ],
)
def test_picked(monkeypatch, num_gpus, name, local_rank, number_here, picked):
    gpus(monkeypatch, num_gpus)
    assert pick_device(name, local_rank, number_here) == torch.device(picked)


@pytest.mark.parametrize(
    ("num_gpus", "name", "number_here", "said"),
    [
        (1, "gpu", 1, "The device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (1, "fpga", 1, "The device must be auto, cpu, cuda or cuda:N, got 'fpga'"),  # torch knows it
        (1, "cuda:-1", 1, "The device must be auto, cpu, cuda or cuda:N, got 'cuda:-1'"),
        (0, "cuda", 1, "The device is to be 'cuda', but torch .* sees no GPU here"),
        (2, "cuda:2", 1, "The device is to be 'cuda:2', but torch sees 2 GPUs here, from cuda:0 on"),
        (2, "auto", 3, "3 processes were started here, one for each GPU, but torch sees 2"),
    ],
)
def test_refused(monkeypatch, num_gpus, name, number_here, said):
    gpus(monkeypatch, num_gpus)
    with pytest.raises(UserError, match=said):
        pick_device(name, 0, number_here)
