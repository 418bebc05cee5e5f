"""MPMA literally, one pair, one head and one word at a time, from the formulas: slow, and with no op of ours."""

import math

import torch
import torch.nn.functional as F


def losses(model, batch):
    """The four losses, before their weights."""
    config = model.config
    pairs = [_Pair(model, batch, b) for b in range(len(batch))]
    found = {}
    if "image_reconstruction" in config.objectives:
        found["image_reconstruction"] = torch.stack([loss for pair in pairs for loss in _pixel_losses(pair)]).mean()
    if "report_reconstruction" in config.objectives:
        token_losses = [loss for pair in pairs for loss in _token_losses(pair)]
        found["report_reconstruction"] = sum(token_losses) / max(1, len(token_losses))
    if "global_alignment" in config.objectives:
        found["global_alignment"] = info_nce(*zip(*(_features(pair) for pair in pairs), strict=True), _scale(model))
    if "local_alignment" in config.objectives:
        found["local_alignment"] = sum(_local_loss(pair) for pair in pairs) / len(pairs)
    return found


def logits(model, batch):
    """Of the answers or the classes, from whole images and texts, one pair after another."""
    found = []
    for b in range(len(batch)):
        length = int((~batch.is_padding_BT[b]).sum())
        image = _shrunk(batch.image_BCHW[b], model.config.image.target_scale)
        image, _ = _encode_image(model.vision, image, list(range(model.config.vision.num_patches)))
        text, _ = _encode_report(model.text, batch.text_ids_BT[b, :length])
        image = model.image_proj(image)
        text = _fused(model, model.text_proj(text), image[1:])
        pooled = [
            torch.tanh(pooler.dense.weight @ x[0] + pooler.dense.bias)
            for pooler, x in ((model.text_pooler, text), (model.image_pooler, image))
        ]
        head = model.vqa_head if model.config.objectives == ("vqa",) else model.classification_head
        x = head[0](torch.cat(pooled))
        found.append(head[3](F.gelu(F.layer_norm(x, x.shape, *_affine(head[1]), 1e-5))))
    return torch.stack(found)


def vqa_loss(logits, batch):
    """Binary cross entropy, one question and one answer at a time."""
    total = 0
    for b, row in enumerate(logits):
        scores = dict(zip(batch.answer_ids_BA[b].tolist(), batch.answer_scores_BA[b].tolist(), strict=True))
        for answer, logit in enumerate(row):
            score = scores.get(answer, 0.0)
            total = total - score * F.logsigmoid(logit) - (1 - score) * F.logsigmoid(-logit)
    return total / len(logits)


def classification_loss(logits, batch):
    """Cross entropy, one pair at a time."""
    return -sum(row.log_softmax(0)[label] for row, label in zip(logits, batch.label_B, strict=True)) / len(logits)


class _Pair:
    """One pair: its unpadded report, and what the towers make of what the objectives see."""

    def __init__(self, model, batch, b):
        self.model, self.config, config = model, model.config, model.config
        length = int((~batch.is_padding_BT[b]).sum())
        self.labels = batch.mlm_labels_BT[b, :length]
        self.hidden = [t for t in range(length) if self.labels[t] != -100]
        self.target_image = batch.image_BCHW[b]
        image = _shrunk(self.target_image, config.image.target_scale)
        num_patches = config.vision.num_patches
        self.order = sorted(range(num_patches), key=lambda n: (float(batch.patch_noise_BN[b, n]), n))
        self.num_kept = int(num_patches * (1 - config.image.patch_frac))
        self.visible = _encode_image(model.vision, image, self.order[: self.num_kept])
        self.whole = _encode_image(model.vision, image, list(range(num_patches)))
        self.masked_report = _encode_report(model.text, batch.mlm_ids_BT[b, :length])
        if config.alignment.view == "full":
            self.aligned = self.whole, _encode_report(model.text, batch.text_ids_BT[b, :length])
            self.words = list(range(1, length - 1))
        else:
            self.aligned = self.visible, self.masked_report
            self.words = [t for t in range(1, length - 1) if t not in self.hidden]


def _shrunk(image, scale):
    return torch.stack([image[:, i::scale, j::scale] for i in range(scale) for j in range(scale)]).mean(0)


def _encode_image(vit, image, patches):
    """CLS and these patches behind the last norm, and the last block's attention of CLS to the patches."""
    embedded = F.conv2d(
        image[None], vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, vit.patch_embed.proj.stride
    )
    embedded = embedded[0].flatten(1).T
    x = torch.stack(
        [vit.cls_token[0, 0] + vit.pos_embed[0, 0]] + [embedded[n] + vit.pos_embed[0, 1 + n] for n in patches]
    )
    for block in vit.blocks:
        qkv = block.attn.qkv(block.norm1(x))
        x = block(x[None])[0]
    q, k, _ = qkv.chunk(3, dim=-1)
    return vit.norm(x), _attention_of_first(q[0], k[1:], vit.blocks[0].attn.num_heads)


def _encode_report(text, ids):
    """Its tokens, and a function from positions to the last layer's attention of CLS among them."""
    outputs = text(input_ids=ids[None], output_hidden_states=True)
    attention = text.encoder.layer[-1].attention.self
    q, k = (product(outputs.hidden_states[-2][0]) for product in (attention.query, attention.key))
    heads = text.config.num_attention_heads
    return outputs.last_hidden_state[0], lambda positions: _attention_of_first(q[0], k[positions], heads)


def _attention_of_first(q, keys, num_heads):
    by_head = []
    for q_head, k_head in zip(q.chunk(num_heads), keys.chunk(num_heads, dim=-1), strict=True):
        by_head.append((k_head @ q_head / math.sqrt(len(q_head))).softmax(0))
    return torch.stack(by_head).mean(0).detach()


def _pixel_losses(pair):
    """One loss for each hidden patch."""
    model, config = pair.model, pair.config
    decoder, grid = model.mim_decoder, pair.config.vision.image_size_px // pair.config.vision.patch_size_px
    embedded = decoder.embed(pair.visible[0])
    tokens = [embedded[0]]
    for n in range(grid * grid):
        rank = pair.order.index(n)
        tokens.append(embedded[1 + rank] if rank < pair.num_kept else decoder.mask_token[0, 0])
    x = torch.stack(tokens)[None] + decoder.positions
    for block in decoder.blocks:
        x = block(x)
    predicted = decoder.pixels(decoder.norm(x[0]))
    size = config.vision.patch_size_px * config.image.target_scale
    for n in pair.order[pair.num_kept :]:
        row, column = divmod(n, grid)
        patch = pair.target_image[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
        target = patch.permute(1, 2, 0).flatten()
        if config.image.normalize_target:
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        yield ((predicted[1 + n] - target) ** 2).mean()


def _token_losses(pair):
    """One loss for each hidden token."""
    model = pair.model
    seen = pair.visible if pair.config.masking == "paired" else pair.whole
    x = _fused(model, model.text_proj(pair.masked_report[0]), model.image_proj(seen[0][1:]))
    for t in pair.hidden:
        yield -model.mlm_head(x[t : t + 1])[0].log_softmax(0)[pair.labels[t]]


def _fused(model, x, patches):
    """All tokens of a text behind the last layer."""
    config, fusion = model.config, model.fusion
    if config.memory == "topk":
        x, patches = (_read_matrix(fusion.topk, y) for y in (x, patches))
    num_heads, width = config.fusion.num_heads, config.fusion.width
    for number, layer in enumerate(fusion.layers):
        q, k, v = layer.self_qkv(x).chunk(3, dim=-1)
        x = F.layer_norm(x + layer.self_out(attention(q, k, v, num_heads)), (width,), *_affine(layer.self_norm), 1e-12)
        k, v = layer.cross_kv(patches).chunk(2, dim=-1)
        if config.memory == "slots":
            slots = fusion.slots[number]
            k = torch.cat([math.sqrt(width / num_heads) * slots.keys, k])
            v = torch.cat([math.sqrt(config.num_slots) * slots.values, v])
        read = attention(layer.cross_q(x), k, v, num_heads)
        x = F.layer_norm(x + layer.cross_out(read), (width,), *_affine(layer.cross_norm), 1e-12)
        inner = layer.mlp_out(F.gelu(layer.mlp_in(x)))
        x = F.layer_norm(x + inner, (width,), *_affine(layer.mlp_norm), 1e-12)
    return x


def _affine(norm):
    return norm.weight, norm.bias


def attention(q, k, v, num_heads):
    heads = []
    for q_h, k_h, v_h in zip(*(x.chunk(num_heads, dim=-1) for x in (q, k, v)), strict=True):
        heads.append((q_h @ k_h.T / math.sqrt(q_h.shape[-1])).softmax(-1) @ v_h)
    return torch.cat(heads, dim=-1)


def _read_matrix(memory, x):
    q, (k, v) = memory.q(x), memory.kv(memory.matrix).chunk(2, dim=-1)
    return x + memory.out(topk_attention(q, k, v, memory.num_heads, memory.num_kept))


def topk_attention(q, k, v, num_heads, num_kept):
    heads = []
    for q_h, k_h, v_h in zip(*(x.chunk(num_heads, dim=-1) for x in (q, k, v)), strict=True):
        rows = []
        for row in q_h:
            scores = k_h @ row / math.sqrt(len(row))
            best = sorted(range(len(scores)), key=lambda m: -float(scores[m]))[:num_kept]
            rows.append(sum(w * v_h[m] for w, m in zip(scores[best].softmax(0), best, strict=True)))
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=-1)


def _project(head, x):
    x = head[2](F.gelu(head[0](x)))
    return x / x.norm(dim=-1, keepdim=True)


def _features(pair):
    (image, _), (report, _) = pair.aligned
    if pair.config.alignment.pool == "cls":
        image, report = image[0], report[0]
    else:
        image, report = image.mean(0), report[[0, *pair.words]].mean(0)
    return _project(pair.model.global_head.image, image), _project(pair.model.global_head.report, report)


def _scale(model):
    learned = model.global_head.log_temperature
    return 1 / model.config.alignment.temperature if learned is None else torch.exp(-learned)


def info_nce(images, reports, scale):
    total = 0
    for i in range(len(images)):
        of_image = torch.stack([images[i] @ report * scale for report in reports])
        of_report = torch.stack([image @ reports[i] * scale for image in images])
        total = total - of_image.log_softmax(0)[i] - of_report.log_softmax(0)[i]
    return total / (2 * len(images))


def _local_loss(pair):
    (image, patch_weights), (report, weights_among) = pair.aligned
    if not pair.words:
        return image.new_zeros(())
    head = pair.model.local_head
    words, patches = _project(head.word, report[pair.words]), _project(head.patch, image[1:])
    return local_loss(words, weights_among(pair.words), patches, patch_weights, pair.config.alignment.local_temperature)


def local_loss(words, word_weights, patches, patch_weights, temperature):
    """Of one pair with at least one word."""
    sides = _one_side(words, patches, word_weights, temperature), _one_side(patches, words, patch_weights, temperature)
    return (sides[0] + sides[1]) / 2


def _one_side(x, y, weights, temperature):
    said = []
    for word in x:
        attention = torch.stack([word @ patch / temperature for patch in y]).softmax(0)
        mixed = sum(a * patch for a, patch in zip(attention, y, strict=True))
        said.append(mixed / mixed.norm())
    total = 0
    for i in range(len(x)):
        which_said = torch.stack([x[i] @ c / temperature for c in said]).log_softmax(0)[i]
        which_word = torch.stack([w @ said[i] / temperature for w in x]).log_softmax(0)[i]
        total = total - weights[i] * (which_said + which_word) / 2
    return total
