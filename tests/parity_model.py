"""Replays the model goldens: outputs, losses and gradients of one configuration, in float32 and float64."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from parity_common import Check, compare
from safetensors.torch import load_file
from torch import Tensor

from fastm3ae import objectives
from fastm3ae.data.batch import ClassificationBatch, ImageTextBatch, PretrainBatch, RetrievalBatch, VqaBatch
from fastm3ae.kernels import masked_pixel_loss
from fastm3ae.masking import split_patches
from fastm3ae.model.m3ae import M3AE
from fastm3ae.model.vision import resize_positions
from fastm3ae.tasks.metrics import classification_metrics, vqa_metrics
from fastm3ae.visualize import patchify
from fastm3ae.weights.convert import config_from_official, from_official, to_official, unused_by_original

OFFICIAL_OBJECTIVES = {"classification": "cls", "retrieval": "irtr"}
FLOAT32 = {"atol": 2e-5, "rtol": 1e-4}
FLOAT64 = {"atol": 1e-9, "rtol": 0.0}
BATCH_TYPES = {"vqa": VqaBatch, "classification": ClassificationBatch, "retrieval": RetrievalBatch}


def load_state(path: Path) -> dict[str, Tensor]:
    """The whole official state dict of a golden: fine-tuned ones store what differs from their base."""
    meta, tensors = json.loads(path.with_suffix(".json").read_text()), load_file(path)
    state = {k.removeprefix("state_dict/"): upcast(v) for k, v in tensors.items() if k.startswith("state_dict/")}
    if meta["base_state_dict"]:
        base = load_state(path.with_name(meta["base_state_dict"] + ".safetensors"))
        state = {k: v for k, v in base.items() if k in meta["state_dict_keys"]} | state
    assert set(state) == set(meta["state_dict_keys"]), f"{path}: the stored state dict is incomplete"
    return state


def upcast(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def build(path: Path, dtype: torch.dtype) -> tuple[M3AE, list[Check]]:
    """The model of a golden with its weights, strictly loaded, and the checks of that."""
    meta, state = json.loads(path.with_suffix(".json").read_text()), load_state(path)
    model = M3AE(config_from_official(meta["config"], state, meta.get("text_encoder")))
    ours, leftovers = from_official(state, model)
    missing = [name for name, _ in model.named_parameters() if name not in ours]
    unknown = [name for name in leftovers if not unused_by_original(name)]
    model.load_state_dict({**model.state_dict(), **ours})
    exported = to_official(model.state_dict(), model)
    lost = [k for k in state if k not in leftovers and (k not in exported or not torch.equal(exported[k], state[k]))]
    extra = [k for k in exported if k not in state]
    checks = [
        Check("state dict: every parameter found", float(len(missing)), not missing, ", ".join(missing[:5])),
        Check("state dict: every tensor used or known", float(len(unknown)), not unknown, ", ".join(unknown[:5])),
        Check(
            "state dict: exported as it was", float(len(lost) + len(extra)), not lost + extra, str((lost + extra)[:5])
        ),
    ]
    return model.to(dtype).eval(), checks


def make_batches(tensors: Mapping[str, Tensor], model: M3AE, dtype: torch.dtype) -> dict[str, ImageTextBatch]:
    """A batch for each of the model's objectives, made of the recorded inputs and draws."""
    inputs = {k.removeprefix("in/"): v for k, v in tensors.items() if k.startswith("in/")}
    if "image" not in inputs:
        return {}
    num = len(inputs["image"])
    common = {
        "image_BCHW": inputs["image"].to(dtype),
        "text_ids_BT": inputs["text_ids"],
        "is_padding_BT": inputs["text_masks"] == 0,
        "texts": [""] * num,
        "item_ids": [""] * num,
        "bad_samples": [],
    }
    batches: dict[str, ImageTextBatch] = {}
    for objective in model.config.objectives:
        if objective in ("mlm", "mim", "itm"):
            labels = torch.cat([torch.ones(num // 2), torch.zeros(num - num // 2)]).long()
            labels = labels[tensors["rng/itm_randperm"]] if "rng/itm_randperm" in tensors else torch.ones_like(labels)
            false = inputs.get("false_image_0", inputs["image"]).to(dtype)
            batches[objective] = PretrainBatch(
                **common,
                mlm_ids_BT=inputs.get("text_ids_mlm", inputs["text_ids"]),
                mlm_labels_BT=inputs.get("text_labels_mlm", torch.full_like(inputs["text_ids"], -100)),
                itm_labels_B=labels,
                false_image_FCHW=false[labels == 0],
                patch_noise_BN=tensors.get("rng/mim_noise", torch.empty(num, 0)),
            )
        elif objective == "vqa":
            batches[objective] = VqaBatch(
                **common,
                answer_ids_BA=inputs["vqa_labels_padded"],
                answer_scores_BA=inputs["vqa_scores_padded"].to(dtype),
                is_open_B=inputs["answer_types"] == 1,
                question_ids=list(range(num)),
                answers=[[]] * num,
            )
        elif objective == "classification":
            batches[objective] = ClassificationBatch(**common, label_B=inputs["cls_labels"])
        elif "false_text_0_ids" in inputs:
            false_names = sorted((k for k in inputs if re.fullmatch(r"false_text_\d+_ids", k)), key=natural)
            batches[objective] = RetrievalBatch(
                **common,
                false_text_ids_BRT=torch.stack([inputs[k] for k in false_names], 1),
                is_false_text_padding_BRT=torch.stack([inputs[k[:-3] + "masks"] for k in false_names], 1) == 0,
                false_texts=[[]] * num,
            )
    return batches


def natural(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", name)]


@torch.no_grad()
def observe(model: M3AE, objective: str, batch: ImageTextBatch) -> dict[str, Tensor]:
    """Everything that the original's forward pass of one objective shows, under the goldens' names."""
    seen: dict[str, Tensor] = {}

    def watch(name: str, module: torch.nn.Module) -> Any:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Tensor) -> None:
            swin_tokens = model.config.vision.kind == "swin" and output.dim() == 4  # (B, height, width, D)
            seen[name] = output.flatten(1, 2) if swin_tokens else output

        return module.register_forward_hook(hook)

    watched = {
        "text_embeddings": model.text.embeddings,
        "text_encoder": model.text.encoder.layer[-1],
        "text_proj": model.text_proj,
        "image_encoder": model.vision.norm,
        "image_proj": model.image_proj,
    }
    swin = model.config.vision.kind == "swin"
    watched |= {"image_patch_embed": model.vision.patch_embed} if swin else {"image_ln_pre": model.vision.norm_pre}
    handles = [watch(name, module) for name, module in watched.items()]
    image, ids, is_padding, keep = batch.image_BCHW, batch.text_ids_BT, batch.is_padding_BT, None
    if objective == "mlm":
        ids = batch.mlm_ids_BT
        seen["mlm_labels_masked"] = batch.mlm_labels_BT.flatten()[batch.masked_index_M]
    elif objective == "mim":
        keep, seen["mim_ids_restore"], is_hidden = split_patches(batch.patch_noise_BN, model.config.mim.patch_frac)
        seen["mim_masks"] = is_hidden.to(image.dtype)
        patches = patchify(image, model.config.vision.patch_size_px)
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        normalized = (patches - mean) / (variance + 1e-6).sqrt()
        seen["mim_target"] = normalized if model.config.mim.normalize_target else patches
    elif objective == "itm":
        image = torch.cat([image, batch.false_image_FCHW])[batch.itm_index_B]
        seen["itm_labels"] = batch.itm_labels_B.to(image.dtype)
    elif objective == "retrieval":
        ids = torch.cat([ids[:, None], batch.false_text_ids_BRT], 1)
        is_padding = torch.cat([is_padding[:, None], batch.is_false_text_padding_BRT], 1).flatten(0, 1)
        image, ids = image.repeat_interleave(ids.shape[1], 0), ids.flatten(0, 1)
    text, image_tokens = model.encode_text(ids, is_padding), model.encode_image(image, keep)
    states = model.fusion(text, image_tokens, is_padding)
    for handle in handles:
        handle.remove()
    for stream, features in (("text", states.text), ("image", states.image)):
        seen |= {f"fusion_{stream}_{i}": layer for i, layer in enumerate(features[1:])}
        seen[f"multi_modal_{stream}_feats"] = features[-1]
        if objective == "mim":
            seen[f"mim_{stream}_feats"] = features[model.config.mim.layer]
    seen["multi_modal_cls_feats"] = model.pool(states.text[-1], states.image[-1])
    seen["extended_text_masks"] = is_padding[:, None, None, :].to(image.dtype) * -10000.0
    if objective == "vqa":
        padded = batch.answer_ids_BA.where(batch.answer_ids_BA >= 0, model.config.num_answers)
        targets = image.new_zeros(len(image), model.config.num_answers + 1)
        seen["vqa_targets"] = targets.scatter(1, padded, batch.answer_scores_BA)[:, :-1]
    return seen


def run(model: M3AE, objective: str, batch: ImageTextBatch) -> tuple[dict[str, Tensor], objectives.Loss]:
    """One objective's outputs under the goldens' names, and its loss with the graph behind it."""
    output = getattr(model, objective)(batch)
    loss = objectives.OBJECTIVES[objective](output, batch, model.config)
    seen = observe(model, objective, batch)
    if objective == "mlm":
        logits = model.mlm_logits(batch)
    else:
        logits = output.pred if objective == "mim" else output
    official = OFFICIAL_OBJECTIVES.get(objective, objective)
    seen[{"mlm": "mlm_logits_masked", "retrieval": "irtr_score"}.get(objective, f"{official}_logits")] = logits
    seen["loss"] = loss.mean
    if objective == "mim":
        seen["loss_norm_pix_false"] = masked_pixel_loss(
            logits, batch.image_BCHW, output.hidden,
            patch_size_px=model.config.vision.patch_size_px, normalize_target=False,
        )  # fmt: skip
    return {name: tensor.detach() for name, tensor in seen.items()}, loss


def packed_losses(model: M3AE, batches: Mapping[str, ImageTextBatch]) -> dict[str, objectives.Loss]:
    """The losses of the packed step, whose one pass makes those of all objectives of a kind of batch."""
    outputs = {type(batch): model(batch, step="packed") for batch in batches.values()}
    return {
        name: objectives.OBJECTIVES[name](outputs[type(batch)][name], batch, model.config)
        for name, batch in batches.items()
    }


def pick(seen: Mapping[str, Tensor], name: str, want: Tensor) -> Tensor | None:
    """What was recorded as ``name``: all of it, or its first rows where only those were stored."""
    if match := re.fullmatch(r"(.+)_first\d+", name):
        name = match[1]
    elif match := re.fullmatch(r"(.+)_sample0_patch0to1", name):
        return seen[match[1]][0, :2]
    got = seen.get(name)
    if got is not None and got.shape != want.shape and got.shape[1:] == want.shape[1:]:
        got = got[: len(want)]
    return got


def retrieval_scores(model: M3AE, tensors: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The score of every image with every text; those whose numbers are those of the recorded table."""
    images = [tensors[name] for name in ("in/image_lowres", "in/image") if name in tensors]
    image = next(image for image in images if len(image) == shape[0]).to(dtype)
    factor = model.config.vision.image_size_px // image.shape[-1]
    image = image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    texts = [name for name in tensors if re.fullmatch(r"in/(?!false)\w*text_ids", name)]
    name = next(name for name in texts if len(tensors[name]) == shape[1])
    ids, is_padding = tensors[name], tensors[name.replace("_ids", "_masks")] == 0
    rows = [
        model.retrieval_head(model.cls_features(one.expand(len(ids), -1, -1, -1), ids, is_padding))[:, 0]
        for one in image
    ]
    return torch.stack(rows)


def check_gradients(
    model: M3AE, losses: Mapping[str, objectives.Loss], meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Iterator[Check]:
    """Recorded gradients of the total loss, and the norm of every parameter's gradient for each loss."""

    def official_gradients(loss: Tensor) -> dict[str, Tensor]:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        found = {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}
        return to_official(found, model)

    total = objectives.total(losses)
    by_loss = {OFFICIAL_OBJECTIVES.get(name, name): official_gradients(loss.mean) for name, loss in losses.items()}
    by_loss["total"] = official_gradients(total)
    for name, want in tensors.items():
        if name.startswith("grad/"):
            got = by_loss["total"].get(name.removeprefix("grad/"))
            yield (
                missing(name)
                if got is None
                else compare(name, got[: len(want)] if want.dim() else got, want, **FLOAT32)
            )
    columns = meta["stats"].get("grad_norm_columns", [])
    for column, label in enumerate(columns):
        if label not in by_loss:
            yield missing(f"grad_norm/{label}")
            continue
        norms, gradients = meta["stats"].get("grad_norm", {}), by_loss[label]
        wrong = [n for n, row in norms.items() if (row[column] is None) != (n not in gradients)]
        yield Check(f"grad_norm/{label}: the same parameters have none", float(len(wrong)), not wrong, str(wrong[:5]))
        names = [n for n, row in norms.items() if row[column] is not None and n in gradients]
        yield compare(
            f"grad_norm/{label}",
            torch.tensor([gradients[n].norm().item() for n in names], dtype=torch.float64),
            torch.tensor([norms[n][column] for n in names], dtype=torch.float64),
            **FLOAT32,
        )


def missing(name: str) -> Check:
    return Check(name, float("inf"), False, "recorded, but not computed here")


def check_model(path: Path) -> Iterator[Check]:
    """Every check of one golden."""
    meta, tensors = json.loads(path.with_suffix(".json").read_text()), load_file(path)
    for dtype, prefix, tolerance in ((torch.float32, "out/", FLOAT32), (torch.float64, "f64/", FLOAT64)):
        model, state_checks = build(path, dtype)
        batches, losses, logits, checked = make_batches(tensors, model, dtype), {}, {}, set()
        if dtype == torch.float32:
            yield from state_checks
        for objective, batch in batches.items():
            seen, losses[objective] = run(model, objective, batch)
            label = OFFICIAL_OBJECTIVES.get(objective, objective)
            logits[objective] = seen.get(f"{label}_logits")
            for name, want in tensors.items():
                if name.startswith(f"{prefix}{label}/"):
                    checked.add(name)
                    got = pick(seen, name.removeprefix(f"{prefix}{label}/"), want)
                    yield missing(name) if got is None else compare(name, got, want, **tolerance)
        for name in (f"{prefix}scores", f"{prefix}irtr/scores"):
            if name in tensors:
                checked.add(name)
                with torch.no_grad():
                    scores = retrieval_scores(model, tensors, tensors[name].shape, dtype)
                yield compare(name, scores, tensors[name], **tolerance)
        if f"{prefix}total_loss" in tensors:
            checked.add(f"{prefix}total_loss")
            yield compare(f"{prefix}total_loss", objectives.total(losses), tensors[f"{prefix}total_loss"], **tolerance)
        yield from (missing(name) for name in tensors if name.startswith(prefix) and name not in checked)
        stored = meta["stats"].get("losses" if dtype == torch.float32 else "losses_f64", {})
        for step, found in {"original": losses, "packed": packed_losses(model, batches)}.items():
            checks = check_gradients(model, found, meta, tensors) if dtype == torch.float32 and found else ()
            yield from (dataclasses.replace(check, name=f"{check.name}, {step} step") for check in checks)
            for name, want in stored.items():
                if name in found:
                    got, label = found[name].mean, f"{prefix}stats/{name}, {step} step"
                    yield compare(label, got, torch.tensor(want, dtype=dtype), **tolerance)
    yield from check_metrics(meta, batches, logits)
    if "pos/before" in tensors:
        before, after = tensors["pos/before"].float(), tensors["pos/after"]
        yield compare("pos/after", resize_positions(before, len(after) - 1), after, **FLOAT32)


def check_metrics(
    meta: Mapping[str, Any], batches: Mapping[str, ImageTextBatch], logits: Mapping[str, Tensor]
) -> Iterator[Check]:
    """The metrics of the recorded batch, where the golden has them, as an evaluation makes them."""
    found = {}
    if "vqa" in logits:
        batch = batches["vqa"]
        accuracies = vqa_metrics(
            logits["vqa"].argmax(dim=-1).tolist(),
            batch.answer_ids_BA.tolist(),
            batch.answer_scores_BA.tolist(),
            batch.is_open_B.tolist(),
            groups=batch.item_ids,
            majority={},
        )
        names = {"vqa_score": "overall_accuracy", "close_score": "closed_accuracy", "open_score": "open_accuracy"}
        found = {name: accuracies[metric].value for name, metric in names.items() if metric in accuracies}
    if "classification" in logits:
        batch = batches["classification"]
        predicted = logits["classification"].argmax(dim=-1).tolist()
        accuracies = classification_metrics(predicted, batch.label_B.tolist(), batch.item_ids)
        found["cls_accuracy"] = accuracies["accuracy"].value
    for name, want in meta.get("metrics_one_batch", {}).items():
        if name in found:
            got = torch.tensor(found[name], dtype=torch.float64)
            yield compare(f"metrics/{name}", got, torch.tensor(want, dtype=torch.float64), **FLOAT32)
