"""What MPMA computes in a pre-training step, in plain PyTorch with our model's parameters: the yardstick.

As one would write it from the public code of its neighbours: reports are padded; the ViT embeds all patches, of which
the visible ones are gathered by index, and a learned token stands in for the others in the decoder, which runs over all
and is compared with patchified pixels by a mean weighted with the mask (MAE, MRM); BERT runs as transformers runs it,
with an attention mask; memory slots are concatenated to the keys and values (Meshed-Memory Transformer), a token's best
rows of the memory matrix are gathered (R2Gen-CMN); the vocabulary is predicted at all positions, of which the
cross entropy ignores those that are not masked; local alignment is a loop over the pairs.

Attention is materialised: so it is in MRM's and MGCA's code, and MGCA, whose weights of words and patches these are,
reads CLS's row of the last layer. ``is_fused`` runs ``scaled_dot_product_attention`` instead and makes that row again:
the faster way with today's packages.

Not modelled: the full view, separate masking, a target of twice the resolution, the gather of other passes' features.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastm3ae.data.batch import PretrainBatch
from fastm3ae.masking import num_kept_patches
from fastm3ae.model.mpma import MPMA


class Encoded(NamedTuple):
    """What a tower gives: its tokens, and for each head the last layer's attention of CLS to all of them."""

    x_BLD: Tensor
    cls_BHL: Tensor


def losses(model: MPMA, batch: PretrainBatch, is_fused: bool = False) -> dict[str, Tensor]:
    """Each objective's loss, times its weight."""
    config = model.config
    if config.alignment.view != "masked" or config.masking != "paired" or config.image.target_scale != 1:
        raise ValueError(f"model must have the masked view, paired masking and a target of its size, got {config}")
    attend = fused_attention if is_fused else attention
    order_BN = torch.argsort(batch.patch_noise_BN, dim=1, stable=True)
    keep_BK = order_BN[:, : num_kept_patches(order_BN.shape[1], config.image.patch_frac)]
    image = encode_image(model, batch.image_BCHW, keep_BK, is_fused)
    text = encode_text(model, batch, is_fused)
    is_word_BT = words(batch)
    found = {
        "image_reconstruction": lambda: pixel_loss(model, batch, image.x_BLD, order_BN, is_fused),
        "report_reconstruction": lambda: token_loss(model, batch, image.x_BLD, text.x_BLD, attend),
        "global_alignment": lambda: global_loss(model, image.x_BLD, text.x_BLD, is_word_BT),
        "local_alignment": lambda: local_loss(model, image, text, is_word_BT),
    }
    return {name: getattr(config.loss_weights, name) * found[name]() for name in config.objectives}


def heads(x_BLD: Tensor, num_heads: int) -> Tensor:
    return x_BLD.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def scores(q_BHQd: Tensor, k_BHSd: Tensor) -> Tensor:
    return q_BHQd @ k_BHSd.transpose(-1, -2) / math.sqrt(q_BHQd.shape[-1])


def attention(q_BHQd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, mask: Tensor | None, dropout_frac: float) -> Tensor:
    scores_BHQS = scores(q_BHQd, k_BHSd)
    weights_BHQS = (scores_BHQS if mask is None else scores_BHQS.masked_fill(~mask, -math.inf)).softmax(dim=-1)
    return F.dropout(weights_BHQS, dropout_frac) @ v_BHSd


def fused_attention(q_BHQd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, mask: Tensor | None, dropout_frac: float) -> Tensor:
    return F.scaled_dot_product_attention(q_BHQd, k_BHSd, v_BHSd, attn_mask=mask, dropout_p=dropout_frac)


def run_block(block: nn.Module, x_BLD: Tensor, is_fused: bool) -> Encoded:
    """A block of timm, which keeps CLS's attention."""
    q, k, v = (heads(x, block.attn.num_heads) for x in block.attn.qkv(block.norm1(x_BLD)).chunk(3, dim=-1))
    if is_fused:
        context_BHLd, cls_BHL = fused_attention(q, k, v, None, 0.0), scores(q[:, :, :1], k).softmax(dim=-1)[:, :, 0]
    else:
        weights_BHLL = scores(q, k).softmax(dim=-1)
        context_BHLd, cls_BHL = weights_BHLL @ v, weights_BHLL[:, :, 0]
    x_BLD = x_BLD + block.attn.proj(context_BHLd.transpose(1, 2).flatten(2))
    return Encoded(x_BLD + block.mlp(block.norm2(x_BLD)), cls_BHL)


def take(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    return torch.gather(x_BND, 1, index_BK[..., None].repeat(1, 1, x_BND.shape[-1]))


def encode_image(model: MPMA, image_BCHW: Tensor, keep_BK: Tensor, is_fused: bool) -> Encoded:
    vit = model.vision
    x_BKD = take(vit.patch_embed(image_BCHW) + vit.pos_embed[:, 1:], keep_BK)
    cls_B1D = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x_BKD), -1, -1)
    encoded = Encoded(vit.norm_pre(torch.cat([cls_B1D, x_BKD], dim=1)), None)
    for block in vit.blocks:
        encoded = run_block(block, encoded.x_BLD, is_fused)
    return encoded._replace(x_BLD=vit.norm(encoded.x_BLD))


def encode_text(model: MPMA, batch: PretrainBatch, is_fused: bool) -> Encoded:
    text, inputs = model.text, {"input_ids": batch.mlm_ids_BT, "attention_mask": (~batch.is_padding_BT).long()}
    text.set_attn_implementation("sdpa" if is_fused else "eager")  # ours asks for neither
    if not is_fused:
        outputs = text(**inputs, output_attentions=True)
        return Encoded(outputs.last_hidden_state, outputs.attentions[-1][:, :, 0])
    outputs = text(**inputs, output_hidden_states=True)
    last, num_heads = text.encoder.layer[-1].attention.self, text.config.num_attention_heads
    x_BTD = outputs.hidden_states[-2]
    q, k = heads(last.query(x_BTD[:, :1]), num_heads), heads(last.key(x_BTD), num_heads)
    scores_BHT = scores(q, k)[:, :, 0].masked_fill(batch.is_padding_BT[:, None], -math.inf)
    return Encoded(outputs.last_hidden_state, scores_BHT.softmax(dim=-1))


def words(batch: PretrainBatch) -> Tensor:
    """Which tokens are aligned: no CLS, no SEP, no padding, and none that is masked."""
    position_T = torch.arange(batch.text_ids_BT.shape[1], device=batch.text_ids_BT.device)
    num_tokens_B1 = (~batch.is_padding_BT).sum(dim=1, keepdim=True)
    return (position_T > 0) & (position_T < num_tokens_B1 - 1) & (batch.mlm_labels_BT == -100)


def pixel_loss(model: MPMA, batch: PretrainBatch, image_BLD: Tensor, order_BN: Tensor, is_fused: bool) -> Tensor:
    decoder, config = model.mim_decoder, model.config
    num_kept, restore_BN = image_BLD.shape[1] - 1, torch.argsort(order_BN, dim=1)
    x_BLD = decoder.embed(image_BLD)
    mask_tokens = decoder.mask_token.repeat(len(x_BLD), order_BN.shape[1] - num_kept, 1)
    x_BND = take(torch.cat([x_BLD[:, 1:], mask_tokens], dim=1), restore_BN)
    x_BLD = torch.cat([x_BLD[:, :1], x_BND], dim=1) + decoder.positions
    for block in decoder.blocks:
        x_BLD = run_block(block, x_BLD, is_fused).x_BLD
    pred_BNP = decoder.pixels(decoder.norm(x_BLD))[:, 1:]
    target_BNP = patchify(batch.image_BCHW, config.vision.patch_size_px)
    if config.image.normalize_target:
        mean, variance = target_BNP.mean(dim=-1, keepdim=True), target_BNP.var(dim=-1, keepdim=True)
        target_BNP = (target_BNP - mean) / (variance + 1e-6) ** 0.5
    is_hidden_BN = (restore_BN >= num_kept).to(pred_BNP.dtype)
    return (((pred_BNP - target_BNP) ** 2).mean(dim=-1) * is_hidden_BN).sum() / is_hidden_BN.sum()


def patchify(image_BCHW: Tensor, size: int) -> Tensor:
    B, C, height, width = image_BCHW.shape
    pixels = image_BCHW.reshape(B, C, height // size, size, width // size, size)
    return torch.einsum("bchpwq->bhwpqc", pixels).reshape(B, -1, size**2 * C)


def token_loss(model: MPMA, batch: PretrainBatch, image_BLD: Tensor, text_BTD: Tensor, attend) -> Tensor:
    fusion, config = model.fusion, model.config
    x_BTD, patches_BKD = model.text_proj(text_BTD), model.image_proj(image_BLD[:, 1:])
    if fusion.topk is not None:
        x_BTD, patches_BKD = read_memory(fusion.topk, x_BTD), read_memory(fusion.topk, patches_BKD)
    is_visible_B11T = ~batch.is_padding_BT[:, None, None]
    split = partial(heads, num_heads=config.fusion.num_heads)
    for number, layer in enumerate(fusion.layers):
        dropout_frac = layer.dropout_frac if layer.training else 0.0
        q, k, v = map(split, layer.self_qkv(x_BTD).chunk(3, dim=-1))
        context = attend(q, k, v, is_visible_B11T, dropout_frac)
        x_BTD = layer.add_self(x_BTD, context.transpose(1, 2).flatten(2))
        q, (k, v) = layer.cross_q(x_BTD), layer.cross_kv(patches_BKD).chunk(2, dim=-1)
        if fusion.slots is not None:
            slots = fusion.slots[number]
            keys = slots.keys * math.sqrt(slots.keys.shape[1] / slots.num_heads)
            values = slots.values * math.sqrt(len(slots.values))
            k = torch.cat([keys.expand(len(k), -1, -1), k], dim=1)
            v = torch.cat([values.expand(len(v), -1, -1), v], dim=1)
        context = attend(split(q), split(k), split(v), None, dropout_frac)
        x_BTD = layer.add_mlp(layer.add_cross(x_BTD, context.transpose(1, 2).flatten(2)))
    logits_BTV = model.mlm_head(x_BTD)
    return nn.CrossEntropyLoss(ignore_index=-100)(logits_BTV.flatten(0, 1), batch.mlm_labels_BT.flatten())


def read_memory(memory: nn.Module, x_BLD: Tensor) -> Tensor:
    q_BHLd = heads(memory.q(x_BLD), memory.num_heads)
    k_HMd, v_HMd = (heads(x[None], memory.num_heads)[0] for x in memory.kv(memory.matrix).chunk(2, dim=-1))
    best_BHLk, index_BHLk = scores(q_BHLd, k_HMd).topk(memory.num_kept, dim=-1)
    values_BHLMd = v_HMd[:, None].expand(*q_BHLd.shape[:3], *v_HMd.shape[1:])
    chosen_BHLkd = values_BHLMd.gather(3, index_BHLk[..., None].expand(*index_BHLk.shape, v_HMd.shape[-1]))
    read_BHLd = (best_BHLk.softmax(dim=-1)[..., None, :] @ chosen_BHLkd).squeeze(-2)
    return x_BLD + memory.out(read_BHLd.transpose(1, 2).flatten(2))


def global_loss(model: MPMA, image_BLD: Tensor, text_BTD: Tensor, is_word_BT: Tensor) -> Tensor:
    image_BD, report_BD = image_BLD[:, 0], text_BTD[:, 0]
    if model.config.alignment.pool == "mean":
        image_BD = image_BLD.mean(dim=1)
        report_BD = (report_BD + (text_BTD * is_word_BT[..., None]).sum(dim=1)) / (1 + is_word_BT.sum(1, keepdim=True))
    features = model.global_head(image_BD, report_BD)
    logits_BB = features.image_BE @ features.report_BE.T * features.scale
    targets_B = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, targets_B) + F.cross_entropy(logits_BB.T, targets_B)) / 2


def local_loss(model: MPMA, image: Encoded, text: Encoded, is_word_BT: Tensor) -> Tensor:
    head = model.local_head
    all_words_BTE, all_patches_BKE = head.word(text.x_BLD), head.patch(image.x_BLD[:, 1:])
    total = 0.0
    for pair, is_word_T in enumerate(is_word_BT):
        if not is_word_T.any():
            continue
        words_WE, patches_KE = all_words_BTE[pair, is_word_T], all_patches_BKE[pair]
        word_weights_W = share(text.cls_BHL[pair][:, is_word_T])
        patch_weights_K = share(image.cls_BHL[pair][:, 1:])
        of_words = contrast(words_WE, patches_KE, word_weights_W, head.temperature)
        of_patches = contrast(patches_KE, words_WE, patch_weights_K, head.temperature)
        total = total + (of_words + of_patches) / 2
    return total / len(is_word_BT)


def share(cls_HX: Tensor) -> Tensor:
    """CLS's attention among these tokens alone, the mean over heads, which is a weight and not trained."""
    return (cls_HX / cls_HX.sum(dim=-1, keepdim=True)).mean(dim=0).detach()


def contrast(x_XE: Tensor, y_YE: Tensor, weights_X: Tensor, temperature: float) -> Tensor:
    said_XE = F.normalize((x_XE @ y_YE.T / temperature).softmax(dim=-1) @ y_YE, dim=-1)
    scores_XX, targets_X = x_XE @ said_XE.T / temperature, torch.arange(len(x_XE), device=x_XE.device)
    cross_entropy = partial(F.cross_entropy, target=targets_X, reduction="none")
    return ((cross_entropy(scores_XX) + cross_entropy(scores_XX.T)) / 2 * weights_X).sum()
