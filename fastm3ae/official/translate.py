"""An official configuration as one of ours: the same run, field by field."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastm3ae.config import PRETRAINING_OBJECTIVES, FinetuneConfig, PretrainConfig
from fastm3ae.config.files import from_dict
from fastm3ae.errors import UserError, first_line, nearest, shown
from fastm3ae.official.arguments import OfficialRun

__all__ = ["heads_and_fusion", "to_run_config"]

_LARGE_CLIP = {"width": 1024, "num_blocks": 23}
_SWIN = {"kind": "swin", "patch_size_px": 4, "swin_num_blocks": [2, 2, 18, 2]}
_BASE = {**_SWIN, "width": 128, "swin_num_heads": [4, 8, 16, 32]}
_LARGE = {**_SWIN, "width": 192, "swin_num_heads": [6, 12, 24, 48]}
_VISION: dict[str, dict[str, Any]] = {
    "ViT-B/32": {"weights": "vit_base_patch32_clip_quickgelu_224.openai", "patch_size_px": 32, "width": 768},
    "ViT-B/16": {"weights": "vit_base_patch16_clip_quickgelu_224.openai", "patch_size_px": 16, "width": 768},
    "ViT-L/14": {"weights": "vit_large_patch14_clip_quickgelu_224.openai", "patch_size_px": 14, **_LARGE_CLIP},
    "ViT-L/14@336px": {"weights": "vit_large_patch14_clip_quickgelu_336.openai", "patch_size_px": 14, **_LARGE_CLIP},
    "swin_base_patch4_window7_224_in22k": {"weights": "swin_base_patch4_window7_224.ms_in22k", **_BASE},
    "swin_base_patch4_window12_384_in22k": {"weights": "swin_base_patch4_window12_384.ms_in22k", **_BASE},
    "swin_large_patch4_window7_224_in22k": {"weights": "swin_large_patch4_window7_224.ms_in22k", **_LARGE},
    "swin_large_patch4_window12_384_in22k": {"weights": "swin_large_patch4_window12_384.ms_in22k", **_LARGE},
}
_OBJECTIVES = {"mlm": "mlm", "mim": "mim", "itm": "itm", "vqa": "vqa", "cls": "classification", "irtr": "retrieval"}
_PRECISIONS = {16: "fp16", "bf16": "bf16", 32: "fp32"}
# Keys that say nothing here: sizes are read from the tokenizer, the towers' weights and the data.
_NO_EFFECT = {"default_root_dir", "draw_false_image", "get_recall_metric", "image_only", "input_text_embed_size",
              "melinda_label_size", "mlc_label_size", "num_layers", "vocab_size", "vqa_label_size"}  # fmt: skip
_NO_EFFECT_ON_PRETRAINING = {"draw_false_text", "label_column_name"}
_NO_EFFECT_ON_FINETUNING = {"mlm_prob", "whole_word_masking"}


def heads_and_fusion(official: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of ``M3AEConfig`` that an official configuration decides by itself, all but the towers.

    A loss counts from any weight above 0: the original adds up its losses without weights.
    """
    objectives = [_OBJECTIVES[name] for name, weight in official["loss_names"].items() if weight > 0]
    classes = official["melinda_label_size"].get(official["label_column_name"], 0)
    return {
        "fusion": {
            "width": official["hidden_size"],
            "num_layers": official["num_top_layer"],
            "num_heads": official["num_heads"],
            "mlp_ratio": official["mlp_ratio"],
            "dropout_frac": official["drop_rate"],
        },
        "mim": {
            "patch_frac": official["mim_prob"],
            "layer": official["mim_layer"],
            "decoder_width": official["mim_decoder_hidden_size"],
            "decoder_num_layers": official["mim_decoder_num_layers"],
            "decoder_num_heads": official["mim_decoder_num_heads"],
            "normalize_target": official["norm_pix_loss"],
        },
        "objectives": objectives,
        "num_answers": official["vqa_label_size"] if "vqa" in objectives else 0,
        "num_classes": classes if "classification" in objectives else 0,
    }


def to_run_config(run: OfficialRun) -> tuple[PretrainConfig | FinetuneConfig, list[str]]:
    """Returns the same run as our own configuration, and what its user should know about it.

    The run folder is the one that the original's TensorBoard logger would take, ``version_N`` with the next free N. A
    line with ``test_only`` gives the configuration of the fine-tuning whose checkpoint it tests.

    Raises:
        UserError: The original could not run it either, or it does not exist here.

    Source: main.py, m3ae/modules/m3ae_utils.py (``set_schedule``), m3ae/datasets/base_dataset.py.
    Deviation: The original also stops after 1000 epochs where max_steps is given.
    """
    official = run.config
    if str(official["resume_from"]).endswith(".ckpt"):
        raise UserError(
            f"resume_from={official['resume_from']} is a checkpoint of the original, which a run here cannot go on "
            f"from exactly: load_path={official['resume_from']} starts from its weights."
        )
    base, own = (FinetuneConfig(), _finetuning(run)) if run.is_finetuning else (PretrainConfig(), _pretraining(run))
    values = {
        "resume": official["resume_from"],
        "init_from": official["load_path"] or None,
        "seed": official["seed"],
        "data": {
            "root": official["data_root"],
            "datasets": official["datasets"],
            "tokenizer": official["tokenizer"],
            "max_text_tokens": official["max_text_len"],
            "train_transform": _transform("train_transform_keys", official),
            "val_transform": re.sub("_randaug|_resizedcrop", "", _transform("val_transform_keys", official)),
            "alpha": "official",
            "on_bad_sample": "skip",  # the original goes on, too, with a random other pair
        },
        "optim": _optim(official),
        "train": _train(run),
    }
    values = _merged(values | own, run.ours)
    values.setdefault("output", _run_folder(official, go_on=values["resume"] == "auto"))
    return from_dict(base, values), _notes(run)


def _pretraining(run: OfficialRun) -> dict[str, Any]:
    official = run.config
    if official["test_only"]:
        raise UserError(
            f"{official['exp_name']} is a pre-training, which has no test_only=True: that is for the tasks."
        )
    return {
        "model": {"vision": _vision(official), "text": _text(official["tokenizer"]), **heads_and_fusion(official)},
        "masking": {
            "token_frac": official["mlm_prob"],
            "words": "official" if official["whole_word_masking"] else "token",
        },
    }


def _finetuning(run: OfficialRun) -> dict[str, Any]:
    official = run.config
    model = heads_and_fusion(official)
    if len(model["objectives"]) != 1:
        names = ", ".join(name for name, weight in official["loss_names"].items() if weight > 0)
        raise UserError(f"loss_names must name one task to fine-tune for, got {names}.")
    (kind,) = model["objectives"]
    task = {"kind": kind}
    if kind == "classification":
        task["label_column"] = official["label_column_name"]
    if kind == "retrieval" and official["draw_false_text"]:
        task["num_false_texts"] = official["draw_false_text"]
    # How many labels there are is read from the data.
    own = {key: model[key] for key in ("fusion", "mim")} | {"objectives": list(PRETRAINING_OBJECTIVES)}
    if "swin" in official["vit"]:
        own["objectives"].remove("mim")
    return {
        "model": {"vision": _vision(official), "text": _text(official["tokenizer"]), **own},
        "task": task,
    }


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested dictionaries with the values of ``above`` laid over those of ``below``."""
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _vision(official: Mapping[str, Any]) -> dict[str, Any]:
    vit = official["vit"]
    if vit not in _VISION:
        raise UserError(f"vit must be one of {', '.join(_VISION)}, got {vit!r}.{nearest(vit, _VISION)}")
    vision = _VISION[vit]
    # A Swin halves its grid and doubles its width three times.
    scale = 8 if vision.get("kind") == "swin" else 1
    own = {"patch_size": vision["patch_size_px"] * scale, "input_image_embed_size": vision["width"] * scale}
    for key, value in own.items():
        if official[key] != value:
            raise UserError(f"{key} must be {value} for the vision tower vit={vit}, got {official[key]}.")
    return {**vision, "image_size_px": official["image_size"]}


def _text(tokenizer: str) -> dict[str, Any]:
    if "roberta" in tokenizer:
        return {"kind": "roberta", "weights": tokenizer}
    sizes = {"max_positions": 512, "num_token_types": 2, "layer_norm_eps": 1e-12}
    return {"kind": "bert", "weights": tokenizer, **sizes}


def _transform(key: str, official: Mapping[str, Any]) -> str:
    transforms = official[key]
    if len(transforms) != 1:
        raise UserError(f"{key} must name exactly one transform, got {transforms}.")
    return transforms[0]


def _optim(official: Mapping[str, Any]) -> dict[str, Any]:
    power, warmup = official["decay_power"], official["warmup_steps"]
    if official["optim_type"] != "adamw":
        raise UserError(f"optim_type must be 'adamw', the only optimiser here, got {official['optim_type']!r}.")
    if isinstance(power, str) and power != "cosine":
        raise UserError(f"decay_power must be a number or 'cosine', got {power!r}.")
    return {
        "learning_rate": official["learning_rate"],
        "head_lr_multiplier": official["lr_multiplier_head"],
        "fusion_lr_multiplier": official["lr_multiplier_multi_modal"],
        "weight_decay": official["weight_decay"],
        "end_learning_rate": official["end_lr"],
        **({"schedule": "cosine"} if power == "cosine" else {"decay_power": power}),
        "warmup_frac" if isinstance(warmup, float) else "warmup_steps": warmup,
    }


def _train(run: OfficialRun) -> dict[str, Any]:
    official, per_gpu = run.config, run.config["per_gpu_batchsize"]
    if run.num_gpus < 0 or official["num_nodes"] < 1:
        raise UserError(
            f"num_gpus must not be negative and num_nodes must be at least 1, "
            f"got {run.num_gpus} and {official['num_nodes']}."
        )
    if official["precision"] not in _PRECISIONS:
        raise UserError(f"precision must be one of 16, bf16 and 32, got {official['precision']!r}.")
    pairs_per_pass = per_gpu * max(1, run.num_gpus) * official["num_nodes"]
    num_passes = max(1, official["batch_size"] // pairs_per_pass) if per_gpu else 1
    train = {
        "num_steps": official["max_steps"],
        "num_epochs": official["max_epoch"] if official["max_steps"] is None else None,
        "batch_size": pairs_per_pass * num_passes if per_gpu else official["batch_size"],
        "micro_batch": per_gpu or "auto",
        "precision": _PRECISIONS[official["precision"]],
        "device": "auto" if run.num_gpus else "cpu",
        "num_workers": official["num_workers"],
    }
    check = official["val_check_interval"]
    if isinstance(check, float):
        train["validate_every_epochs"] = check
    else:
        train["validate_every_steps"] = max(1, check // num_passes)
    if num_batches := int(official["fast_dev_run"]):
        train |= {"num_steps": num_batches, "num_epochs": None, "max_val_batches": num_batches}
    return train


def _run_folder(official: Mapping[str, Any], *, go_on: bool) -> str:
    """Returns the next free version_N, or the newest one if the run is to go on where that ended.

    Raises:
        UserError: The name of the experiment leads out of ``log_dir``, or there can be no folder of such a name.
    """
    name = Path(official["exp_name"])
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"exp_name must be a name within log_dir, got {shown(official['exp_name'])}.")
    load_path = official["load_path"].replace("/", "_")
    folder = Path(official["log_dir"]) / f"{official['exp_name']}-seed{official['seed']}-from_{load_path}"
    try:
        versions = [re.fullmatch(r"version_([0-9]{1,9})", path.name) for path in folder.glob("version_*")]
    except (OSError, ValueError) as error:  # too long, or of characters that no name has
        raise UserError(f"The run folder cannot be {shown(str(folder))}: {first_line(error)[:100]}.") from error
    newest = max((int(match[1]) for match in versions if match), default=-1)
    return str(folder / f"version_{newest if go_on and newest >= 0 else newest + 1}")


def _notes(run: OfficialRun) -> list[str]:
    official, notes = run.config, []
    of_kind = _NO_EFFECT_ON_FINETUNING if run.is_finetuning else _NO_EFFECT_ON_PRETRAINING
    no_effect = [key for key in run.given if key in _NO_EFFECT | of_kind]
    if "max_epoch" in run.given and official["max_steps"] is not None:
        no_effect.append("max_epoch (max_steps is set; max_steps=None makes it count)")
    if no_effect:
        notes.append(f"Without effect here: {', '.join(no_effect)}.")
    asked = official["num_gpus"]
    if isinstance(asked, list) and any(gpu != number for number, gpu in enumerate(asked)):
        notes.append(
            f"num_gpus={shown(asked)} means the first {run.num_gpus} GPUs, as in the original; "
            f"CUDA_VISIBLE_DEVICES chooses others."
        )
    return notes
