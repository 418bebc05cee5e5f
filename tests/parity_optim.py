"""Replays the optimiser goldens: parameter groups, learning rates, steps of the original's AdamW; position tables."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from parity_common import Check, compare
from parity_model import FLOAT32, build, make_batches
from safetensors.torch import load_file
from torch import Tensor, nn

from fastm3ae import objectives
from fastm3ae.config import OptimConfig
from fastm3ae.model.heads import sincos_positions
from fastm3ae.model.m3ae import M3AE
from fastm3ae.model.vision import resize_bias_tables, resize_positions
from fastm3ae.training.optim import OfficialAdamW, build_optimizer, build_schedule, parameter_groups
from fastm3ae.weights.convert import official_names, to_official, unused_by_original

LEARNING_RATE = {"atol": 0.0, "rtol": 1e-12}
# Where the true gradient is zero, Adam turns rounding noise into whole steps: these are not compared.
NO_TRUE_GRADIENT = re.compile(r".*\.key\.bias|.*\.in_proj_bias|irtr_head\.bias")


def config_of(settings: Mapping[str, Any]) -> OptimConfig:
    """Our configuration for the original's settings."""
    warmup = settings["warmup_steps"]
    power = settings["decay_power"]
    return OptimConfig(
        learning_rate=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        head_lr_multiplier=settings["lr_multiplier_head"],
        fusion_lr_multiplier=settings["lr_multiplier_multi_modal"],
        schedule="cosine" if power == "cosine" else "polynomial",
        decay_power=1.0 if power == "cosine" else float(power),
        end_learning_rate=float(settings["end_lr"]),
        warmup_frac=warmup if isinstance(warmup, float) else 0.0,
        warmup_steps=None if isinstance(warmup, float) else warmup,
        adamw="official",
    )


def rates(settings: Mapping[str, Any], steps: list[int]) -> Tensor:
    """The learning rates of the six groups before each of the steps."""
    config = config_of(settings)
    multipliers = (1.0, config.head_lr_multiplier, config.fusion_lr_multiplier)
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": config.learning_rate * m} for m in multipliers for _ in "dn"
    ]
    optimizer = OfficialAdamW(groups, lr=config.learning_rate)
    schedule = build_schedule(optimizer, config, settings["max_steps"])
    seen = []
    for _ in range(max(steps) + 1):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return torch.tensor([seen[step] for step in steps], dtype=torch.float64)


def check_rates(name: str, settings: Mapping[str, Any], recorded: Mapping[str, list[float]]) -> Check:
    steps = [int(step) for step in recorded]
    want = torch.tensor([recorded[str(step)] for step in steps], dtype=torch.float64)
    return compare(name, rates(settings, steps), want, **LEARNING_RATE)


def check_groups(model: M3AE, config: OptimConfig, recorded: list[dict[str, Any]]) -> Iterator[Check]:
    """The same official parameters in the same groups, but for those that the original never uses."""
    kind = model.config.vision.kind
    ours = {
        official: (group["lr"] / config.learning_rate, group["weight_decay"])
        for group in parameter_groups(model, config)
        for name in group["names"]
        for official in official_names(name, kind)
    }
    for group in recorded:
        rule = (group["lr_multiplier"], group["weight_decay"])
        used = [n for n in group["names"] if not (unused_by_original(n) or n.startswith("language_encoder.pooler."))]
        wrong = [n for n in used if ours.get(n) != rule]
        yield Check(f"groups/{group['label']}", float(len(wrong)), not wrong, ", ".join(wrong[:5]))
    names = {n for group in recorded for n in group["names"]}
    extra = sorted(set(ours) - names)
    yield Check("groups: no other parameter", float(len(extra)), not extra, ", ".join(extra[:5]))


def check_steps(path: Path, base: Path) -> Iterator[Check]:
    """Steps from the base golden's weights on its batch; every stored value after each step."""
    meta, tensors = json.loads(path.with_suffix(".json").read_text()), load_file(path)
    for run, recorded in meta["three_steps"].items():
        settings = meta["settings"] | recorded["overrides"]
        config = config_of(settings)
        model, _ = build(base, torch.float32)
        batches = make_batches(load_file(base), model, torch.float32)
        optimizer = build_optimizer(parameter_groups(model, config), config)
        schedule = build_schedule(optimizer, config, settings["max_steps"])
        start = to_official({n: p.detach().clone() for n, p in model.named_parameters()}, model)
        seen_losses = []
        for step in range(1, len(recorded["losses_before_each_step"]) + 1):
            results = {
                name: objectives.OBJECTIVES[name](getattr(model, name)(batch), batch, model.config)
                for name, batch in batches.items()
            }
            total = objectives.total(results)
            seen_losses.append(total.detach())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            schedule.step()
            after = to_official({n: p.detach() for n, p in model.named_parameters()}, model)
            for key, want in tensors.items():
                name = key.removeprefix(f"{run}/step{step}/")
                if name == key or unused_by_original(name) or NO_TRUE_GRADIENT.fullmatch(name):
                    continue
                update = (want - start[name]).abs().max().item()
                # 0.1 % of the largest update: noise of other kernels is below, another formula above.
                yield compare(key, after[name], want, atol=max(1e-3 * update, 1e-9), rtol=1e-6)
        want = torch.tensor(recorded["losses_before_each_step"])
        yield compare(f"{run}/losses_before_each_step", torch.stack(seen_losses), want, **FLOAT32)


def check_unit(path: Path) -> Iterator[Check]:
    """The original's AdamW on recorded gradients, without a model."""
    meta, tensors = json.loads(path.with_suffix(".json").read_text()), load_file(path)
    for tag, settings in meta.items():
        if tag == "versions":
            continue
        config = config_of(settings)
        prefix = f"unit/{tag}/param/"
        parameters = {k.removeprefix(prefix): nn.Parameter(v) for k, v in tensors.items() if k.startswith(prefix)}
        groups = []
        for name, parameter in parameters.items():
            multiplier = 1.0
            if name.startswith("mlm_head"):
                multiplier = config.head_lr_multiplier
            elif name.startswith("multi_modal"):
                multiplier = config.fusion_lr_multiplier
            decay = 0.0 if name.endswith("bias") else config.weight_decay
            groups.append({"params": [parameter], "lr": config.learning_rate * multiplier, "weight_decay": decay})
        optimizer = build_optimizer(groups, config)
        schedule = build_schedule(optimizer, config, settings["max_steps"])
        for step in range(len(settings["lr_per_group_before_each_step"])):
            for name, parameter in parameters.items():
                parameter.grad = tensors.get(f"unit/{tag}/grad{step}/{name}")
            optimizer.step()
            schedule.step()
            for name, parameter in parameters.items():
                key = f"unit/{tag}/after{step}/{name}"
                if key in tensors:
                    yield compare(key, parameter.detach(), tensors[key], atol=1e-7, rtol=1e-6)
        recorded = {str(i): row for i, row in enumerate(settings["lr_per_group_before_each_step"])}
        yield check_rates(f"unit/{tag}/learning rates", settings, recorded)


def check_optimizer(path: Path) -> Iterator[Check]:
    """Everything of one optimizer_* golden."""
    meta = json.loads(path.with_suffix(".json").read_text())
    if "three_steps" not in meta:
        yield from check_unit(path)
        return
    base_name = path.stem.removeprefix("optimizer_")
    base = next(iter(sorted(path.parent.glob(f"{base_name}_*.safetensors"))), None)
    if base is None:
        yield Check("base weights", float("inf"), False, f"no {base_name}_*.safetensors beside {path.name}")
        return
    yield check_rates("lr_at_step", meta["settings"], meta["lr_at_step"])
    if "lr_at_step_cosine" in meta:
        settings = meta["settings"] | {"decay_power": "cosine"}
        yield check_rates("lr_at_step_cosine", settings, meta["lr_at_step_cosine"])
    model, _ = build(base, torch.float32)
    yield from check_groups(model, config_of(meta["settings"]), meta["groups"])
    yield from check_steps(path, base)


def check_position_tables(path: Path) -> Iterator[Check]:
    """Resized position embeddings and bias tables, and the decoder's fixed table."""
    for name, want in load_file(path).items():
        kind, case, *part = name.split("/")
        if part == ["after"]:
            before = load_file(path)[f"{kind}/{case}/before"]
            if kind == "clip":
                got = resize_positions(before, len(want) - 1)
            else:
                window = (round(len(want) ** 0.5) + 1) // 2
                got = resize_bias_tables({"table": before}, {"table": window})["table"]
            yield compare(name, got, want, **FLOAT32)
        elif match := re.fullmatch(r"dim(\d+)_grid(\d+)_cls(?:_rows_([\d_]+))?", case):
            table = torch.from_numpy(sincos_positions(int(match[1]), int(match[2]))).float()
            rows = [int(row) for row in match[3].split("_")] if match[3] else range(len(table))
            yield compare(name, table[list(rows)], want, **FLOAT32)
