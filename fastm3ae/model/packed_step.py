"""One pass for all objectives: each tower and each fusion layer runs once, over the rows that the losses read.

It gives what the passes of the objectives one after another give. Rows are independent in every product, norm and
feed-forward network, and attention mixes them only through keys and values, which are complete; so the results differ
by the order of sums, and by which random numbers dropout draws.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastm3ae.data.batch import ImageTextBatch
from fastm3ae.masking import num_kept_patches, split_patches
from fastm3ae.model.bucket import Sizes, fill_reads
from fastm3ae.model.packed import Run, call, checkpointed, encode_images, encode_texts, fuse, maybe_compiled
from fastm3ae.model.plan import Plan, Reads, make_plan
from fastm3ae.model.reads import OBJECTIVES
from fastm3ae.model.vision import num_image_tokens

if TYPE_CHECKING:
    from fastm3ae.model.m3ae import M3AE

__all__ = ["batch_reads", "compute", "plan_batch", "run_packed"]


def run_packed(
    model: M3AE,
    batch: ImageTextBatch,
    *,
    share_texts: bool = False,
    checkpoint_activations: bool = False,
    compiled: bool = False,
) -> dict[str, Any]:
    """Returns for each of the model's objectives what its loss is made of.

    Args:
        model: The model.
        batch: A batch on the model's device, images normalised.
        share_texts: Whether objectives that see the same texts share their encoding also where that is not exact,
            because dropout would draw for each of them.
        checkpoint_activations: Whether the activations within layers are computed again in the backward pass.
        compiled: Whether ``torch.compile`` makes one graph of all that runs on the device. The numbers of tokens differ
            from batch to batch; after the first few batches the graph leaves them open.
    """
    plan = plan_batch(model, batch, share_texts)
    plan.send(batch.image_BCHW.device)
    return maybe_compiled(compute, compiled)(model, batch, plan, checkpointed if checkpoint_activations else call)


def plan_batch(model: M3AE, batch: ImageTextBatch, share_texts: bool = False, bucket: Sizes | None = None) -> Plan:
    """Plans the batch, from what of it stands on the host.

    Args:
        model: The model.
        batch: The batch.
        share_texts: As of ``run_packed``.
        bucket: Plan for the batch that ``fill_batch`` makes for this bucket.
    """
    config, reads = model.config, batch_reads(model, batch)
    num_encoded = None
    if bucket is not None:
        num_tokens = batch.text_ids_BT.shape[1]
        reads = {name: fill_reads(name, read, bucket, num_tokens) for name, read in reads.items()}
        num_encoded = len(batch) + bucket.false_images
    num_patches = model.vision.patch_embed.num_patches
    return make_plan(
        reads,
        num_images=len(batch.image_BCHW),
        num_whole_tokens=num_image_tokens(model.vision),
        num_visible_tokens=1 + num_kept_patches(num_patches, config.mim.patch_frac),
        shares_texts=share_texts or not model.training or config.text.dropout_frac == 0,
        num_encoded=num_encoded,
    )


def batch_reads(model: M3AE, batch: ImageTextBatch) -> dict[str, Reads]:
    """Returns for each of the model's objectives what it reads of the batch."""
    return {name: OBJECTIVES[name].reads(batch, model.config) for name in model.config.objectives}


def compute(model: M3AE, batch: ImageTextBatch, plan: Plan, run: Run = call) -> dict[str, Any]:
    """Computes what the plan says, without asking the device for anything: one graph for ``torch.compile``."""
    config = model.config
    order = split_patches(batch.patch_noise_BN, config.mim.patch_frac) if plan.num_visible else None
    false_image_FCHW = getattr(batch, "false_image_FCHW", None)
    keep_BK = None if order is None else order.keep_BK
    image_SD = encode_images(model.vision, batch.image_BCHW, false_image_FCHW, keep_BK, plan, run).tokens_SD
    image_SD = model.image_proj(image_SD) + model.modality_embeddings.weight[1]
    text_SD = None
    if plan.texts:
        text_SD = encode_texts(model.text, plan, run).tokens_SD
        text_SD = model.text_proj(text_SD) + model.modality_embeddings.weight[0]
    read = fuse(model.fusion, text_SD, image_SD, plan, run)
    return {name: OBJECTIVES[name].head(model, read[name], batch, order) for name in config.objectives}
