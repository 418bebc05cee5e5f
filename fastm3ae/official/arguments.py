"""The original's command line, ``python main.py with ...``: its keys, its named configurations, what a line says.

The rules are those of sacred, which the original uses: ``key=value`` beats every named configuration wherever it
stands, a later named configuration beats an earlier one, values are Python literals or else texts, and a dotted key
reaches into a dictionary. Keys of our own configuration (``model.text.weights=random``, ``output=runs/x``) may stand
beside the original's.
"""

import ast
import shlex
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

from fastm3ae.config import FinetuneConfig, PretrainConfig
from fastm3ae.errors import UserError, listed, nearest, shown

__all__ = ["DEFAULTS", "NAMED_CONFIGS", "OfficialRun", "arguments_of", "parse_official"]


def _losses(*names: str) -> dict[str, int]:
    return {name: int(name in names) for name in ("mlm", "mim", "itm", "vqa", "cls", "irtr")}


def _transforms(train: str, val: str) -> dict[str, list[str]]:
    return {"train_transform_keys": [train], "val_transform_keys": [val]}


DEFAULTS: dict[str, Any] = {
    "exp_name": "meter", "seed": 0, "datasets": ["medicat", "roco"], "loss_names": _losses("itm", "mlm"),
    "batch_size": 4096,
    **_transforms("clip", "clip"), "image_size": 224, "patch_size": 32, "draw_false_image": 1, "image_only": False,
    "vqa_label_size": 3129, "mlc_label_size": 14, "max_text_len": 40, "tokenizer": "bert-base-uncased",
    "vocab_size": 30522, "whole_word_masking": True, "mlm_prob": 0.15, "draw_false_text": 0,
    "num_top_layer": 6, "input_image_embed_size": 768, "input_text_embed_size": 768, "vit": "ViT-B/32",
    "hidden_size": 768, "num_heads": 12, "num_layers": 6, "mlp_ratio": 4, "drop_rate": 0.1,
    "mim_prob": 0.75, "mim_decoder_hidden_size": 384, "mim_decoder_num_layers": 4, "mim_decoder_num_heads": 6,
    "norm_pix_loss": True, "mim_layer": -1,
    "optim_type": "adamw", "learning_rate": 1e-5, "weight_decay": 0.01, "decay_power": 1, "max_epoch": 100,
    "max_steps": 100000, "warmup_steps": 10000, "end_lr": 0, "lr_multiplier_head": 5, "lr_multiplier_multi_modal": 5,
    "get_recall_metric": False, "resume_from": None, "fast_dev_run": False, "val_check_interval": 1.0,
    "test_only": False, "default_root_dir": "checkpoints", "data_root": "", "log_dir": "result",
    "per_gpu_batchsize": 0, "num_gpus": 8, "num_nodes": 1, "load_path": "", "num_workers": 8, "precision": 16,
    "label_column_name": "",
    "melinda_label_size": {"i_meth": 85, "p_meth": 45, "i_meth_label": 15, "p_meth_label": 7},
}  # fmt: skip
"""Every key of the original with its default. Source: m3ae/config.py."""

# What a key may be beside the type of its default. A number may be whole where it need not be.
_ALSO: dict[str, tuple[type, ...]] = {
    "max_steps": (type(None),), "resume_from": (str,), "fast_dev_run": (int,), "val_check_interval": (int,),
    "num_gpus": (list,), "precision": (str,), "warmup_steps": (float,), "end_lr": (float,),
    "decay_power": (float, str), "lr_multiplier_head": (float,), "lr_multiplier_multi_modal": (float,),
}  # fmt: skip
_KIND_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", list: "a list",
               dict: "a dictionary", type(None): "None"}  # fmt: skip
_OUR_KEYS = {field.name for config in (PretrainConfig, FinetuneConfig) for field in fields(config)} - DEFAULTS.keys()
_TASKS = {"vqa": "vqa", "cls": "classification", "irtr": "retrieval"}


def _named_configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the original's named configurations: its tasks, then what is added to a task."""
    clip, bert = _transforms("clip", "clip"), {"tokenizer": "bert-base-uncased"}

    def task(name: str, dataset: str, loss: str, **changes: Any) -> tuple[str, dict[str, Any]]:
        config = {
            "exp_name": name, "datasets": [dataset], "loss_names": _losses(loss), "max_steps": None,
            "warmup_steps": 0.1, "learning_rate": 5e-6, "lr_multiplier_multi_modal": 5, "input_text_embed_size": 768,
            "vit": "ViT-B/32", "input_image_embed_size": 768, **bert, **clip,
        }  # fmt: skip
        return name, config | changes

    yield "task_pretrain_m3ae", {
        "exp_name": "task_pretrain_m3ae", "datasets": ["medicat", "roco"], "loss_names": _losses("itm", "mlm", "mim"),
        "batch_size": 256, "max_epoch": 10, "max_steps": 100000, "warmup_steps": 0.1, "whole_word_masking": True,
        "vocab_size": 30522, "max_text_len": 64, "image_size": 224, "learning_rate": 1e-5, "val_check_interval": 1.0,
        "lr_multiplier_head": 5, "lr_multiplier_multi_modal": 5, "num_top_layer": 6, "hidden_size": 768,
        "num_heads": 12, "precision": 16, "mim_layer": 3, **bert, **clip,
    }  # fmt: skip
    for dataset, batch_size, num_epochs, num_answers in (
        ("vqa_vqa_rad", 64, 50, 498), ("vqa_slack", 32, 15, 222), ("vqa_medvqa_2019", 32, 10, 79)
    ):  # fmt: skip
        vqa = task(
            f"task_finetune_{dataset}", dataset, "vqa", batch_size=batch_size, max_epoch=num_epochs, max_text_len=32,
            image_size=576, lr_multiplier_head=50, draw_false_image=0, val_check_interval=1.0,
            vqa_label_size=num_answers,
        )  # fmt: skip
        yield vqa
        if dataset == "vqa_slack":  # the original misspells SLAKE
            yield "task_finetune_vqa_slake", vqa[1]
    for column in DEFAULTS["melinda_label_size"]:
        yield task(
            f"task_finetune_cls_melinda_{column}", "cls_melinda", "cls", batch_size=16, max_epoch=20, max_text_len=128,
            image_size=384, lr_multiplier_head=10, draw_false_image=0, label_column_name=column,
        )  # fmt: skip
    yield task(
        "task_finetune_irtr_roco", "irtr_roco", "irtr", batch_size=256, max_epoch=10, image_size=384,
        lr_multiplier_head=5, get_recall_metric=True, draw_false_text=15,
    )  # fmt: skip
    for name, vit, image_size, width in (
        ("swin32_base224", "swin_base_patch4_window7_224_in22k", 224, 1024),
        ("swin32_base384", "swin_base_patch4_window12_384_in22k", 384, 1024),
        ("swin32_large384", "swin_large_patch4_window12_384_in22k", 384, 1536),
    ):
        yield name, {"vit": vit, "patch_size": 32, "image_size": image_size, "input_image_embed_size": width,
                     **_transforms("imagenet", "imagenet")}  # fmt: skip
    for patch_size in (32, 16):
        yield f"clip{patch_size}", {"vit": f"ViT-B/{patch_size}", "patch_size": patch_size, "image_size": 224,
                                    "input_image_embed_size": 768, **clip}  # fmt: skip
    for name, tokenizer, width in (
        ("text_roberta", "roberta-base", 768),
        ("text_roberta_large", "roberta-large", 1024),
    ):
        yield name, {"tokenizer": tokenizer, "vocab_size": 50265, "input_text_embed_size": width}
    for transform in ("imagenet_randaug", "clip_randaug", "clip_resizedcrop"):
        yield transform, {"train_transform_keys": [transform]}


NAMED_CONFIGS: dict[str, dict[str, Any]] = dict(_named_configs())
"""What each named configuration sets. Source: m3ae/config.py."""


@dataclass(frozen=True, kw_only=True)
class OfficialRun:
    """What a command line of the original says."""

    config: dict[str, Any]
    """The whole official configuration."""
    given: tuple[str, ...]
    """The official keys that stand on the command line as ``key=value``."""
    ours: dict[str, Any]
    """Fields of our own configuration beside them, nested."""

    @property
    def num_gpus(self) -> int:
        """GPUs per machine. Of a list of device ids the original, too, takes the length only."""
        num_gpus = self.config["num_gpus"]
        return num_gpus if isinstance(num_gpus, int) else len(num_gpus)

    @property
    def is_finetuning(self) -> bool:
        """Whether a loss of a downstream task counts."""
        return any(self.config["loss_names"][name] > 0 for name in _TASKS)

    @property
    def command(self) -> str:
        """Which of our commands does it."""
        tasks = [task for name, task in _TASKS.items() if self.config["loss_names"][name] > 0]
        return f"finetune {tasks[0]}" if tasks else "pretrain"


def arguments_of(command_line: str) -> list[str]:
    """Returns the words behind ``with`` in a command line as it stands in a shell script; all words if there is none.

    Raises:
        UserError: A quote is not closed.
    """
    try:
        words = shlex.split(command_line.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise UserError(f"The command line cannot be split into words: {error}.") from error
    return words[words.index("with") + 1 :] if "with" in words else words


def parse_official(arguments: Sequence[str]) -> OfficialRun:
    """Resolves the words behind ``with``, by sacred's rules.

    Raises:
        UserError: A key or a named configuration is unknown (the nearest known one is named), or a value has a type
            that its key cannot have.
    """
    named, changes, ours = [], {}, {}
    for word in arguments:
        key, equals, text = word.partition("=")
        path = key.strip().split(".")
        if not equals:
            named.append(word)
        elif path[0] in _OUR_KEYS:
            _set(ours, path, _literal(text.strip()))
        else:
            _set(changes, path, _literal(text.strip()))
    config = DEFAULTS
    for name in named:
        if name not in NAMED_CONFIGS:
            known = [*NAMED_CONFIGS, *(f"{key}=..." for key in DEFAULTS)]
            raise UserError(f"The original has no named configuration {shown(name)}.{nearest(name, known)}")
        config = _updated(config, NAMED_CONFIGS[name])
    return OfficialRun(config=deepcopy(_updated(config, changes)), given=tuple(changes), ours=ours)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last two: nested too deeply
        return text


def _set(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Sets a dotted key in nested dictionaries; what is no dictionary on the way gives place to one."""
    for part in path[:-1]:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[path[-1]] = value


def _updated(config: Mapping[str, Any], changes: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Returns an official configuration with some values replaced, dictionary by dictionary."""
    updated = dict(config)
    for key, value in changes.items():
        if key not in config:
            known = config if where else [*config, *_OUR_KEYS]
            raise UserError(f"The original has no configuration key {where}{listed([str(key)])}.{nearest(key, known)}")
        if isinstance(config[key], dict) and isinstance(value, dict):
            updated[key] = _updated(config[key], value, f"{where}{key}.")
        else:
            updated[key] = _checked(f"{where}{key}", value)
    return updated


def _checked(key: str, value: Any) -> Any:
    """Returns a value as the type that its key must have."""
    kinds = (type(DEFAULTS.get(key, 0)), *_ALSO.get(key, ()))  # the values of the nested dictionaries are whole numbers
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{key} must be a number of at most 64 bits, got {shown(value)}.")
    if bool in kinds and value in (0, 1):
        return bool(value)
    if kinds[0] is int and float not in kinds and type(value) is float and value.is_integer():  # max_steps=1e5
        return int(value)
    if kinds == (str,) and type(value) in (int, float):  # exp_name=7
        return shown(value)
    if type(value) not in kinds and not (float in kinds and type(value) is int):
        expected = " or ".join(_KIND_WORDS[kind] for kind in kinds)
        hint = f' In a shell, quote the list: \'{key}=["a", "b"]\'.' if list in kinds and key != "num_gpus" else ""
        raise UserError(f"{key} must be {expected}, got {shown(value)}.{hint}")
    item = int if key == "num_gpus" else str
    if isinstance(value, list) and not all(type(one) is item for one in value):
        raise UserError(f"{key} must be a list, each {_KIND_WORDS[item]}, got {shown(value)}.")
    return value
