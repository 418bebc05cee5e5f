"""How many pairs fit: in as few passes as possible."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from models import small_config, small_gpu_model

from fastm3ae import objectives
from fastm3ae.config import DataConfig, PretrainConfig
from fastm3ae.errors import UserError
from fastm3ae.model.m3ae import M3AE
from fastm3ae.training.memory import fit_micro_batch, largest_that_fits
from fastm3ae.training.pretrain import longest_batch


def full():
    return torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("most", "limit", "fits"),
    [(256, 256, 256), (256, 40, 37), (100, 30, 25), (7, 1, 1), (5, 3, 3), (20, 2, 2), (9, 8, 5)],
)
def test_as_few_passes_as_fit(most, limit, fits):
    tried = []

    def attempt(size):
        tried.append(size)
        if size > limit:
            raise full()

    assert largest_that_fits(most, attempt) == fits
    assert tried[0] == most and len(set(tried)) == len(tried) <= 2 * math.ceil(math.log2(most)) + 1


def test_no_pass_could_be_saved(monkeypatch):
    """For any memory: with one pass less, some pass would not fit."""
    monkeypatch.setattr("gc.collect", lambda: 0)  # takes its time, thousands of times
    for most in range(1, 80):
        for limit in range(1, most + 1):

            def attempt(size, limit=limit):
                if size > limit:
                    raise full()

            found = largest_that_fits(most, attempt)
            num_passes = -(-most // found)
            assert found == -(-most // num_passes) <= limit
            assert num_passes == 1 or -(-most // (num_passes - 1)) > limit


def test_not_even_one():
    def attempt(size):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(UserError, match="Not even one pair fits into the device's memory: take a smaller .* 2 GiB"):
        largest_that_fits(8, attempt)


def test_other_errors_are_not_taken_for_memory():
    def attempt(size):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        largest_that_fits(8, attempt)


@pytest.mark.parametrize("names", [("mlm", "mim", "itm"), ("mlm",), ("itm",)])
def test_the_longest_batch_is_one_that_the_model_takes(names):
    model = M3AE(small_config(objectives=names))
    config = PretrainConfig(model=model.config, data=DataConfig(max_text_tokens=30))
    batch = longest_batch(config, 3)
    assert batch.text_ids_BT.shape == (3, 30) and len(batch.false_image_FCHW) == 3 and not batch.is_padding_BT.any()
    results = objectives.losses(model(batch), batch, model.config)
    assert results.keys() == set(names)
    objectives.total(results).backward()


def test_a_cpu_takes_32():
    model = M3AE(small_config())
    config = PretrainConfig(model=model.config)
    assert [
        fit_micro_batch(model, config, most, nullcontext, partial(longest_batch, config)) for most in (256, 32, 5)
    ] == [32, 32, 5]


@pytest.mark.gpu
def test_a_gpu_takes_what_fits():
    model = small_gpu_model(init_std=0.03)
    config = PretrainConfig(model=model.config, data=DataConfig(max_text_tokens=32))
    state = torch.cuda.get_rng_state()
    most = 64
    assert fit_micro_batch(model, config, most, nullcontext, partial(longest_batch, config)) == most
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    fit_micro_batch(model, config, most, nullcontext, partial(longest_batch, config))
    needed, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(needed * 0.75 / total)
    try:
        assert 1 <= fit_micro_batch(model, config, most, nullcontext, partial(longest_batch, config)) < most
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.cuda.get_rng_state(), state)
