"""Checkpoints of small models with a tokenizer, and images beside them, for the tests of pictures."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import models
import mpma_models
import numpy as np
import torch
from corpus import TOKENIZER
from PIL import Image

from fastm3ae.config import DataConfig, MaskingConfig
from fastm3ae.config.files import to_dict
from fastm3ae.model.build import build_model
from fastm3ae.weights.pretrained import save_weights

_ROOT = tempfile.TemporaryDirectory()  # the tests read these checkpoints, and leave them as they are


def m3ae_folder(**changes):
    """A checkpoint of M3AE, with two images."""
    return _folder(models.small_config(text="bert", **changes))


def mpma_folder(**changes):
    """A checkpoint of MPMA, with two images."""
    return _folder(mpma_models.small_config(**changes))


def given(folder):
    """The images beside a checkpoint."""
    return sorted(folder.glob("*.png"))


@functools.cache
def _folder(config):
    folder = Path(tempfile.mkdtemp(dir=_ROOT.name)) / config.kind
    folder.mkdir()
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=len(TOKENIZER)), init_std=0.3)
    torch.manual_seed(0)
    about = {"config": {"data": to_dict(DataConfig(max_text_tokens=24)), "masking": to_dict(MaskingConfig())}}
    save_weights(build_model(config).state_dict(), config, folder, about)
    TOKENIZER.save_pretrained(folder)
    rng = np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(rng.integers(0, 255, (80, 70), np.uint8)).save(folder / f"{number}.png")
    return folder
