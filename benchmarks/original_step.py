"""What the original computes in a pre-training step, in eager PyTorch with our model's parameters: the yardstick.

Modelled: a whole forward pass for each objective, which patchifies its images, runs all fusion layers and both poolers
whether or not the loss reads them, and looks up modality embeddings token by token; attention of texts and fusion with
a product each for queries, keys and values, materialised scores, an added mask (of zeros for images), dropout on the
probabilities; CLIP blocks around ``nn.MultiheadAttention``'s function, norms in float32, QuickGELU as a product; the
patches of all of an image embedded before most are hidden by two argsorts; logits, losses and accuracies of all text
positions; true and false images chosen sample by sample, by asking the device; fp16 autocast with a gradient scaler
on a GPU, its AdamW, every metric read by the host.

Where the original depends on versions or has a choice, the faster way is taken: today's torch, gradients that are
dropped instead of zeroed, positions added out of place, metrics that are updated once a step.

Compiled, each pass is one graph of ``torch.compile``, which breaks nowhere. What does break one stays outside of it:
choosing ITM's images, because the labels are asked of the device, and the accuracies, because a boolean index has as
many rows as the device finds.

Deviation: A batch without masked tokens has the MLM loss 0 here, as in ours; the original's is NaN. Sorting is stable
here, so that equal noise hides the same patches in both.

Source: The original's modules/m3ae_module.py, objectives.py, prediction_heads.py, language_encoders/bert_model.py and
vision_encoders/clip_model.py; BERT and RoBERTa of transformers 4.6.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastm3ae.config import M3AEConfig, ModelConfig, OptimConfig
from fastm3ae.data.batch import PretrainBatch
from fastm3ae.masking import num_kept_patches
from fastm3ae.model.fusion import CoAttentionLayer
from fastm3ae.model.heads import MIMDecoder, MLMHead
from fastm3ae.model.m3ae import M3AE
from fastm3ae.model.packed import maybe_compiled
from fastm3ae.training.optim import build_optimizer, build_schedule, parameter_groups


class Outputs(NamedTuple):
    """One objective's loss and predictions, and the labels (int64, -100: none) where it reports an accuracy."""

    loss: Tensor
    predictions: Tensor
    labels: Tensor | None


class Features(NamedTuple):
    """What a forward pass gives: to all objectives the same, whatever they read of it."""

    text_BTD: Tensor
    image_BLD: Tensor
    cls_BE: Tensor
    mim_image_BLD: Tensor | None
    hidden_BN: Tensor | None
    restore_BN: Tensor | None
    patches_BNP: Tensor


class Projections(NamedTuple):
    """Weight and bias for each of those of a fusion layer's products that ours fuses."""

    self_qkv: list[tuple[Tensor, Tensor]]
    cross_kv: list[tuple[Tensor, Tensor]]


def passes(model: M3AE, batch: PretrainBatch, compiled: bool = False) -> Iterator[tuple[str, Outputs]]:
    """Runs one forward pass after the other, each when it is asked for."""
    if model.config.vision.kind != "clip":
        raise ValueError(f"model must have a CLIP ViT, which is what the original trains, got {model.config.vision}")
    if unknown := set(model.config.objectives) - set(PASSES):
        raise ValueError(f"model must have no objectives but {list(PASSES)}, got {sorted(unknown)}")
    layers = separated(model)
    run = maybe_compiled(one_pass, compiled)
    # The length is known to the host.
    reduction = "mean" if len(batch.masked_index_M) else "sum"
    for objective in model.config.objectives:
        image_BCHW = matched_images(batch) if objective == "itm" else batch.image_BCHW
        yield objective, run(model, layers, batch, objective, image_BCHW, reduction)


def one_pass(
    model: M3AE,
    layers: Sequence[tuple[CoAttentionLayer, Projections, CoAttentionLayer, Projections]],
    batch: PretrainBatch,
    objective: str,
    image_BCHW: Tensor,
    reduction: str,
) -> Outputs:
    run = partial(infer, model, layers, batch)
    if objective == "mlm":
        return mlm(model, batch, image_BCHW, run, reduction)
    return PASSES[objective](model, batch, image_BCHW, run)


def mlm(model: M3AE, batch: PretrainBatch, image_BCHW: Tensor, run: Callable[..., Features], reduction: str) -> Outputs:
    features = run(batch.mlm_ids_BT, image_BCHW)
    logits_BTV = mlm_logits(model.mlm_head, features.text_BTD)
    logits, labels = logits_BTV.view(-1, logits_BTV.shape[-1]), batch.mlm_labels_BT.view(-1)
    loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction=reduction)
    return Outputs(loss, logits_BTV, batch.mlm_labels_BT)


def mim(model: M3AE, batch: PretrainBatch, image_BCHW: Tensor, run: Callable[..., Features]) -> Outputs:
    features = run(batch.text_ids_BT, image_BCHW, batch.patch_noise_BN)
    pred_BNP = decode_pixels(model.mim_decoder, features.mim_image_BLD, features.restore_BN)
    target_BNP = features.patches_BNP
    if model.config.mim.normalize_target:
        mean, variance = target_BNP.mean(dim=-1, keepdim=True), target_BNP.var(dim=-1, keepdim=True)
        target_BNP = (target_BNP - mean) / (variance + 1.0e-6) ** 0.5
    error_BN = ((pred_BNP - target_BNP) ** 2).mean(dim=-1)
    return Outputs((error_BN * features.hidden_BN).sum() / features.hidden_BN.sum(), pred_BNP, None)


def matched_images(batch: PretrainBatch) -> Tensor:
    false_images = iter(batch.false_image_FCHW)
    images = [
        true_image if label == 1 else next(false_images)  # asks the device, once for each sample
        for true_image, label in zip(batch.image_BCHW, batch.itm_labels_B, strict=True)
    ]
    return torch.stack(images)


def itm(model: M3AE, batch: PretrainBatch, image_BCHW: Tensor, run: Callable[..., Features]) -> Outputs:
    logits_B2 = model.itm_head(run(batch.text_ids_BT, image_BCHW).cls_BE)
    labels_B = batch.itm_labels_B.to(logits_B2.device)
    return Outputs(F.cross_entropy(logits_B2, labels_B), logits_B2, labels_B)


PASSES = {"mlm": mlm, "mim": mim, "itm": itm}


def infer(
    model: M3AE,
    layers: Sequence[tuple[CoAttentionLayer, Projections, CoAttentionLayer, Projections]],
    batch: PretrainBatch,
    ids_BT: Tensor,
    image_BCHW: Tensor,
    noise_BN: Tensor | None = None,
) -> Features:
    """The forward pass. With noise, patches are hidden, and the features that MIM reads are kept."""
    dtype = model.image_proj.weight.dtype
    text_mask = additive_mask(~batch.is_padding_BT, dtype)
    text = model.text_proj(encode_text(model.text, ids_BT, text_mask))

    image, hidden, restore = encode_image(model, image_BCHW, noise_BN)
    image = model.image_proj(image)
    is_visible_BL = torch.ones(image.shape[:2], dtype=torch.int64, device=image.device)
    image_mask = additive_mask(is_visible_BL, dtype)

    text = text + model.modality_embeddings(torch.zeros_like(ids_BT))
    image = image + model.modality_embeddings(torch.ones_like(is_visible_BL))
    mim_image = None
    for number, (text_layer, text_projections, image_layer, image_projections) in enumerate(layers):
        if noise_BN is not None and number == model.config.mim.layer:
            mim_image = image
        text, image = (
            cross_layer(text_layer, text_projections, text, image, text_mask, image_mask),
            cross_layer(image_layer, image_projections, image, text, image_mask, text_mask),
        )
    if noise_BN is not None and model.config.mim.layer == -1:
        mim_image = image
    cls = torch.cat([model.text_pooler(text), model.image_pooler(image)], dim=-1)
    return Features(text, image, cls, mim_image, hidden, restore, patchify(image_BCHW, model.config))


def additive_mask(is_visible_BS: Tensor, dtype: torch.dtype) -> Tensor:
    return (1.0 - is_visible_BS[:, None, None, :].to(dtype)) * -10000.0


def encode_text(text: nn.Module, ids_BT: Tensor, mask: Tensor) -> Tensor:
    x_BTD = text.embeddings(input_ids=ids_BT)
    for layer in text.encoder.layer:
        attention = layer.attention.self
        q, k, v = attention.query(x_BTD), attention.key(x_BTD), attention.value(x_BTD)
        context_BTD = attend(q, k, v, mask, attention.num_attention_heads, attention.dropout)
        x_BTD = layer.attention.output(context_BTD, x_BTD)
        x_BTD = layer.output(layer.intermediate(x_BTD), x_BTD)
    return x_BTD


def encode_image(
    model: M3AE, image_BCHW: Tensor, noise_BN: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the tokens, and with noise which patches are hidden (1, else 0) and where each patch went."""
    vit = model.vision
    x_BND = vit.patch_embed.proj(image_BCHW).flatten(2).permute(0, 2, 1)
    # Under autocast the stream stays in fp16: the original casts what it adds.
    cls_B1D = vit.cls_token.to(x_BND.dtype).expand(len(x_BND), -1, -1)
    positions = vit.pos_embed.to(x_BND.dtype)
    hidden_BN = restore_BN = None
    if noise_BN is None:
        x_BLD = torch.cat([cls_B1D, x_BND], dim=1) + positions
    else:
        visible_BKD, hidden_BN, restore_BN = hide_patches(
            x_BND + positions[:, 1:], noise_BN, model.config.mim.patch_frac
        )
        x_BLD = torch.cat([cls_B1D + positions[:, :1], visible_BKD], dim=1)
    x_BLD = clip_blocks(vit.blocks, clip_norm(vit.norm_pre, x_BLD))
    return clip_norm(vit.norm, x_BLD), hidden_BN, restore_BN


def hide_patches(x_BND: Tensor, noise_BN: Tensor, patch_frac: float) -> tuple[Tensor, Tensor, Tensor]:
    num_kept = num_kept_patches(noise_BN.shape[1], patch_frac)
    order_BN = torch.argsort(noise_BN, dim=1, stable=True)
    restore_BN = torch.argsort(order_BN, dim=1)
    visible_BKD = torch.gather(x_BND, 1, order_BN[:, :num_kept, None].repeat(1, 1, x_BND.shape[-1]))
    hidden_BN = torch.ones(noise_BN.shape, device=noise_BN.device)
    hidden_BN[:, :num_kept] = 0
    return visible_BKD, torch.gather(hidden_BN, 1, restore_BN), restore_BN


def patchify(image_BCHW: Tensor, config: M3AEConfig) -> Tensor:
    """Returns (B, N, P), the pixels of a patch in (row, column, channel) order."""
    size, grid = config.vision.patch_size_px, config.vision.image_size_px // config.vision.patch_size_px
    pixels = image_BCHW.reshape(-1, 3, grid, size, grid, size)
    return torch.einsum("bchpwq->bhwpqc", pixels).reshape(-1, grid**2, 3 * size**2)


def clip_blocks(blocks: Sequence[nn.Module], x_BLD: Tensor) -> Tensor:
    x_LBD = x_BLD.permute(1, 0, 2)
    for block in blocks:
        normed, attn = clip_norm(block.norm1, x_LBD), block.attn
        context, _ = F.multi_head_attention_forward(
            normed, normed, normed, normed.shape[-1], attn.num_heads,
            attn.qkv.weight, attn.qkv.bias, bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0,
            out_proj_weight=attn.proj.weight, out_proj_bias=attn.proj.bias,
            training=block.training, need_weights=False,
        )  # fmt: skip
        x_LBD = x_LBD + context
        hidden = block.mlp.fc1(clip_norm(block.norm2, x_LBD))
        x_LBD = x_LBD + block.mlp.fc2(hidden * torch.sigmoid(1.702 * hidden))
    return x_LBD.permute(1, 0, 2)


def clip_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """The norm in float32 (float64 stays), back in the input's type."""
    return norm(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


def separated(model: M3AE) -> list[tuple[CoAttentionLayer, Projections, CoAttentionLayer, Projections]]:
    return [
        (text_layer, separate(text_layer), image_layer, separate(image_layer))
        for text_layer, image_layer in zip(model.fusion.text_layers, model.fusion.image_layers, strict=True)
    ]


def separate(layer: CoAttentionLayer) -> Projections:
    """The original has a product for each of queries, keys and values, with parameters of its own."""

    def split(linear: nn.Linear, num: int) -> list[tuple[Tensor, Tensor]]:
        weight, bias, device = linear.weight, linear.bias, linear.weight.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            # Once a step, as autocast does it for the original's parameters; casts of views it would not keep.
            weight, bias = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (weight, bias))
        return list(zip(weight.chunk(num), bias.chunk(num), strict=True))

    return Projections(split(layer.self_qkv, 3), split(layer.cross_kv, 2))


def cross_layer(
    layer: CoAttentionLayer, projections: Projections, x_BQD: Tensor, y_BSD: Tensor, x_mask: Tensor, y_mask: Tensor
) -> Tensor:
    drop = partial(F.dropout, p=layer.dropout_frac, training=layer.training)
    q, k, v = (F.linear(x_BQD, *projection) for projection in projections.self_qkv)
    context = layer.self_out(attend(q, k, v, x_mask, layer.num_heads, drop))
    x_BQD = layer.self_norm(drop(context) + x_BQD)
    k, v = (F.linear(y_BSD, *projection) for projection in projections.cross_kv)
    context = layer.cross_out(attend(layer.cross_q(x_BQD), k, v, y_mask, layer.num_heads, drop))
    x_BQD = layer.cross_norm(drop(context) + x_BQD)
    return layer.mlp_norm(drop(layer.mlp_out(F.gelu(layer.mlp_in(x_BQD)))) + x_BQD)


def attend(
    q_BQD: Tensor, k_BSD: Tensor, v_BSD: Tensor, mask: Tensor, num_heads: int, drop: Callable[[Tensor], Tensor]
) -> Tensor:
    q, k, v = (t.view(*t.shape[:2], num_heads, -1).permute(0, 2, 1, 3) for t in (q_BQD, k_BSD, v_BSD))
    scores_BHQS = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    probabilities_BHQS = drop(F.softmax(scores_BHQS + mask, dim=-1))
    return torch.matmul(probabilities_BHQS, v).permute(0, 2, 1, 3).contiguous().flatten(2)


def mlm_logits(head: MLMHead, text_BTD: Tensor) -> Tensor:
    hidden_BTD = head.norm(F.gelu(head.dense(text_BTD)))
    return (
        F.linear(hidden_BTD, head.decoder.weight) + head.decoder.bias
    )  # the original's bias is no part of the product


def decode_pixels(decoder: MIMDecoder, visible_BLD: Tensor, restore_BN: Tensor) -> Tensor:
    x_BLD = decoder.embed(visible_BLD)
    batch_size, num_visible, width = x_BLD.shape
    mask_tokens = decoder.mask_token.repeat(batch_size, restore_BN.shape[1] + 1 - num_visible, 1)
    tokens_BND = torch.cat([x_BLD[:, 1:], mask_tokens], dim=1)
    tokens_BND = torch.gather(tokens_BND, 1, restore_BN[..., None].repeat(1, 1, width))
    x_BLD = torch.cat([x_BLD[:, :1], tokens_BND], dim=1)
    x_BLD = clip_blocks(decoder.blocks, x_BLD + decoder.positions.to(x_BLD.dtype))
    return decoder.pixels(decoder.norm(x_BLD))[:, 1:]


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    is_labelled = labels != -100
    # On a GPU each of these two asks the device for its size.
    predicted, labels = logits.detach().argmax(dim=-1)[is_labelled], labels[is_labelled]
    return (predicted == labels).sum() / max(1, labels.numel())


class OriginalStep:
    """Makes optimiser steps on a model, on the device where it is: fp16 on a GPU, float32 on a CPU.

    Args:
        model: The model; its parameters are changed in place.
        config: How it learns; the AdamW is always the original's.
        num_steps: Steps of the whole run.
        compiled: Whether ``torch.compile`` makes a graph of each pass.
    """

    def __init__(self, model: M3AE, config: OptimConfig, num_steps: int, compiled: bool = False) -> None:
        self.model, self.device, self.compiled = model, model.image_proj.weight.device.type, compiled
        config = dataclasses.replace(config, adamw="official")
        self.optimizer = build_optimizer(parameter_groups(model, config), config)
        self.schedule = build_schedule(self.optimizer, config, num_steps)
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.device == "cuda")

    def __call__(self, *pieces: PretrainBatch) -> dict[str, float]:
        """Returns each objective's loss and accuracy, and the total loss: the means over the batch's equal pieces."""
        sums: dict[str, Tensor] = {}
        for number, piece in enumerate(pieces):
            metrics = {}
            with torch.autocast(self.device, torch.float16, enabled=self.device == "cuda"):
                losses = []
                for name, (loss, logits, labels) in passes(self.model, piece, self.compiled):
                    losses.append(loss)
                    metrics[f"{name}_loss"] = loss.detach()
                    if labels is not None:
                        metrics[f"{name}_accuracy"] = accuracy(logits, labels)
                total = sum(losses)
            if number == 0:
                self.optimizer.zero_grad()
            self.scaler.scale(total / len(pieces)).backward()
            metrics["total_loss"] = total.detach()
            sums = {name: metric + sums.get(name, 0) for name, metric in metrics.items()}
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return {name: metric.item() / len(pieces) for name, metric in sums.items()}


def make_batch(
    config: ModelConfig, lengths: Sequence[int], num_masked: int | Sequence[int], num_tokens: int, seed: int = 0
) -> PretrainBatch:
    """Random normalised images with texts of so many valid tokens, in each of which so many are masked (a number each).

    As in the original, half of the images that ITM sees are false (with an odd number of pairs, the larger half).
    """
    generator = torch.Generator().manual_seed(seed)
    size, num = config.vision.image_size_px, len(lengths)
    ids_BT = torch.randint(4, config.text.vocab_size, (num, num_tokens), generator=generator)
    is_padding_BT = torch.arange(num_tokens) >= torch.tensor(lengths)[:, None]
    ids_BT[is_padding_BT] = config.text.pad_token_id
    labels_BT = torch.full_like(ids_BT, -100)
    each_masked = [num_masked] * num if isinstance(num_masked, int) else num_masked
    for row, (length, number) in enumerate(zip(lengths, each_masked, strict=True)):
        masked = 1 + torch.randperm(length - 2, generator=generator)[:number]  # not CLS, not SEP
        labels_BT[row, masked] = ids_BT[row, masked]
    itm_labels_B = (torch.arange(num) < num // 2).long()[torch.randperm(num, generator=generator)]
    return PretrainBatch(
        image_BCHW=torch.randn(num, 3, size, size, generator=generator),
        text_ids_BT=ids_BT,
        is_padding_BT=is_padding_BT,
        texts=[""] * num,
        item_ids=[str(number) for number in range(num)],
        bad_samples=[],
        mlm_ids_BT=ids_BT.where(labels_BT == -100, 3),
        mlm_labels_BT=labels_BT,
        itm_labels_B=itm_labels_B,
        false_image_FCHW=torch.randn(num - num // 2, 3, size, size, generator=generator),
        patch_noise_BN=torch.rand(num, (size // config.vision.patch_size_px) ** 2, generator=generator),
    )
