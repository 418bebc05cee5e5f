"""Validation: every metric on held-out pairs, with the controls that say what the numbers mean."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastm3ae import objectives
from fastm3ae.data.batch import PretrainBatch
from fastm3ae.model.build import Model
from fastm3ae.model.fusion_use import FusionUse
from fastm3ae.model.heads import MIMOutputs
from fastm3ae.training.distributed import Processes
from fastm3ae.training.retrieval import Retrieval

__all__ = ["validate"]


@torch.no_grad()
def validate(
    model: Model,
    batches: Iterable[PretrainBatch],
    autocast: Callable[[], AbstractContextManager],
    processes: Processes,
) -> dict[str, float]:
    """Returns the mean of each loss and metric over all batches of all processes, two controls, and a score.

    Of M3AE. ``mlm_accuracy_shuffled_image``: the accuracy at the same masked tokens when each text sees another pair's
    image; what the right image adds is the difference. ``mim_loss_patch_mean``: the loss of predicting each hidden
    patch as its own mean. ``score``: the sum of the accuracies less the loss of masked image modelling, by which the
    original chooses its best checkpoint (``epoch_wrapup`` in modules/m3ae_utils.py).

    Of MPMA the same under its objectives' names, and ``image_to_report_recall_at_1`` (see ``Retrieval``) over
    ``image_to_report_candidates`` candidates, the whole images and reports being shown; it counts in the score. The
    loss of global_alignment contrasts the pairs of one pass, so that it depends on ``train.micro_batch``. With slots,
    ``memory_frac``: which fraction of their cross-attention the hidden words give to the slots, mean over the words,
    the heads and the fusion's layers; a slot that weighs as much as a patch gives M / (M + patches).

    Args:
        model: The model; its mode (training or evaluation) is left as it was.
        batches: Batches of this process, on the model's device, images normalised.
        autocast: Gives the context in which the model computes.
        processes: Those that share the work.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, int] = defaultdict(int)
    retrieval = Retrieval()
    has_slots = "report_reconstruction" in model.config.objectives and model.config.memory == "slots"

    def add(name: str, total: Tensor | float, count: int) -> None:
        sums[name] += float(total)
        counts[name] += count

    with model.evaluating():
        for batch in batches:
            with autocast(), FusionUse(model, batch) if has_slots else nullcontext() as use:
                outputs = model(batch)
                results = objectives.losses(outputs, batch, model.config)
            for name, loss in results.items():
                count = objectives.num_averaged(name, batch, model.config)
                add(f"{name}_loss", loss.mean * count, count)
                for metric, total in loss.sums.items():
                    add(f"{name}_{metric}", total, count)
            if use is not None:
                of_layers = torch.stack(use.slot_weights())
                add("memory_frac", of_layers.mean(dim=0).sum(), of_layers.shape[1])
            for name in outputs.keys() & {"mlm", "report_reconstruction"}:
                if len(batch) > 1:
                    # Half a batch further on: neighbours may be texts of the same image.
                    other = dataclasses.replace(batch, image_BCHW=batch.image_BCHW.roll(len(batch) // 2, dims=0))
                    with autocast():
                        again = model.mlm(other) if name == "mlm" else model(other, only=(name,))[name]
                    count = objectives.num_averaged(name, batch, model.config)
                    add(f"{name}_accuracy_shuffled_image", again.num_correct, count)
            for name in outputs.keys() & {"mim", "image_reconstruction"}:
                means = {name: outputs[name]._replace(pred=_patch_means(outputs[name], batch, model))}
                (control,) = objectives.losses(means, batch, model.config).values()
                count = objectives.num_averaged(name, batch, model.config)
                add(f"{name}_loss_patch_mean", control.mean * count, count)
            if "global_alignment" in outputs:
                with autocast():
                    retrieval.add(model.embed(batch), batch)
    shares = processes.gather({name: (sums[name], counts[name]) for name in sums})
    metrics = {}
    for name in {name: None for share in shares for name in share}:  # a process without a batch has none
        total, count = map(sum, zip(*(share[name] for share in shares if name in share), strict=True))
        metrics[name] = total / max(1, count)
    if "global_alignment" in model.config.objectives:
        recall, num_candidates = retrieval.recall(processes)
        metrics |= {"image_to_report_recall_at_1": recall, "image_to_report_candidates": num_candidates}
    gains = ("mlm_accuracy", "itm_accuracy", "report_reconstruction_accuracy", "image_to_report_recall_at_1")
    losses = ("mim_loss", "image_reconstruction_loss")
    metrics["score"] = sum(metrics.get(name, 0) for name in gains) - sum(metrics.get(name, 0) for name in losses)
    return metrics


def _patch_means(outputs: MIMOutputs, batch: PretrainBatch, model: Model) -> Tensor:
    """Returns what predicting each patch as its mean predicts, in the space of the targets."""
    pred, hidden = outputs
    config = model.config
    if (config.mim if config.kind == "m3ae" else config.image).normalize_target:
        return torch.zeros_like(pred)
    size = round((pred.shape[-1] // 3) ** 0.5)
    means_BNC = torch.nn.functional.avg_pool2d(batch.image_BCHW, size).flatten(2).transpose(1, 2)
    if hidden.dtype != torch.bool:
        means_BNC = means_BNC.gather(1, hidden[..., None].expand(-1, -1, 3))
    return means_BNC.repeat(1, 1, size**2).to(pred.dtype)
