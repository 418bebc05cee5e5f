"""Checkpoints of tiny models as a run leaves them: weights, what the run says of itself, and the tokenizer."""

import dataclasses

import torch
from models import small_config as m3ae_config
from mpma_models import small_config as mpma_config
from runs import TOKENIZER

from fastm3ae.config import DataConfig, FusionConfig, ImageConfig, PretrainConfig
from fastm3ae.config.files import to_dict
from fastm3ae.data.text import load_tokenizer
from fastm3ae.model.build import build_model
from fastm3ae.weights.pretrained import save_weights


def _small(config):
    """With as few layers as there can be: a graph takes its time."""
    changes = {"vision": dataclasses.replace(config.vision, num_blocks=1)}
    if config.has_texts:
        changes["text"] = dataclasses.replace(config.text, num_layers=1)
        changes["fusion"] = FusionConfig(width=48, num_layers=1, num_heads=4, mlp_ratio=2)
    return dataclasses.replace(config, **changes)


CONFIGS = {
    "m3ae": _small(m3ae_config(text="bert", objectives=("mlm", "itm"))),
    "m3ae-roberta": _small(m3ae_config(objectives=("mlm", "itm"))),
    "swin": _small(m3ae_config("swin", "bert", objectives=("mlm", "itm"))),
    "mpma": _small(mpma_config()),
    "mpma-vqa": _small(mpma_config(objectives=("vqa",), num_answers=5)),
    "image": _small(ImageConfig(vision=mpma_config().vision, num_classes=3)),
}


def write_checkpoint(folder, name, transform="clip", seed=0, **about):
    """Writes one of them, and returns it in evaluation mode."""
    torch.manual_seed(seed)
    model = build_model(CONFIGS[name]).eval()
    data = DataConfig(datasets=("made",), max_text_tokens=24, train_transform=transform, val_transform=transform)
    run = to_dict(PretrainConfig(data=data)) if name != "image" else {"data": to_dict(data)}
    folder.mkdir()
    save_weights(model.state_dict(), model.config, folder, {"config": run, "weights_were_random": True, **about})
    load_tokenizer(TOKENIZER).save_pretrained(folder)
    return model
