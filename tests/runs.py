"""Whole runs of a tiny model through the command, for the tests that need them."""

import json
from pathlib import Path

import yaml
from corpus import caption_rows

from fastm3ae.cli import main
from fastm3ae.data.arrow import write_pairs

TOKENIZER = Path(__file__).parent / "data" / "golden" / "data" / "tok" / "bert-base-uncased"
MODEL = {
    "vision": {"image_size_px": 32, "patch_size_px": 16, "width": 64, "num_blocks": 1},
    "text": {"kind": "bert", "width": 16, "num_layers": 1, "num_heads": 2, "mlp_width": 32, "max_positions": 32,
             "num_token_types": 2},
    "fusion": {"width": 32, "num_layers": 2, "num_heads": 2},
    "mim": {"layer": 1, "decoder_width": 32, "decoder_num_layers": 1, "decoder_num_heads": 2},
}  # fmt: skip
GPU_MODEL = {  # on a GPU the packed step takes heads of width 32 and 64
    **MODEL,
    "text": {**MODEL["text"], "width": 64},
    "fusion": {**MODEL["fusion"], "width": 64},
}
NO_DROPOUT = {
    **MODEL,
    "text": {**MODEL["text"], "dropout_frac": 0.0},
    "fusion": {**MODEL["fusion"], "dropout_frac": 0.0},
}
TRAIN = {"num_steps": 6, "batch_size": 8, "num_workers": 0, "log_every_steps": 1, "validate_every_steps": 3,
         "save_every_steps": 2, "keep_checkpoints": 2, "num_pictures": 2, "tensorboard": False,
         "device": "cpu"}  # fmt: skip


def write_corpus(folder):
    """24 training pairs and 13 validation pairs."""
    for split, num in (("train", 12), ("val", 7)):
        write_pairs(folder / f"made_{split}.arrow", caption_rows(num, 10 if split == "val" else 100))


def write_config(folder, **changes):
    """A YAML file for a tiny run; keyword sections are merged into it."""
    config = {
        "model": MODEL,
        "data": {"root": str(folder), "datasets": ["made"], "tokenizer": str(TOKENIZER), "max_text_tokens": 24},
        "optim": {"learning_rate": 1e-3},
        "train": TRAIN,
    }
    for section, values in changes.items():
        config[section] = {**config[section], **values} if isinstance(values, dict) else values
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(folder, *arguments, output="run", **changes):
    """The arguments of the command for the tiny configuration."""
    config = write_config(folder, **changes)
    overrides = ["--model.vision.weights", "random", "--model.text.weights", "random"]
    return ["pretrain", "--config", str(config), "--output", str(folder / output), *overrides, *arguments]


def run(folder, *arguments, output="run", **changes):
    """Runs the command on the tiny configuration; returns its exit status."""
    return main(command(folder, *arguments, output=output, **changes))


def losses(folder):
    """Step, split and all losses of every line of metrics.jsonl; nothing that depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["split"], line.get("loss"), line["mlm_loss"], line["mim_loss"], line["itm_loss"])
            for line in lines]  # fmt: skip
