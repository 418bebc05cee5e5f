"""Small models and batches that several tests share."""

import dataclasses

import torch

from fastm3ae.config import FusionConfig, M3AEConfig, MIMConfig, TextConfig, VisionConfig
from fastm3ae.data.batch import ClassificationBatch, PretrainBatch, RetrievalBatch, VqaBatch
from fastm3ae.model.m3ae import M3AE

VOCAB, ANSWERS, CLASSES = 60, 7, 5


def small_config(vision="clip", text="roberta", objectives=("mlm", "mim", "itm"), **changes):
    """A configuration with every size different from every other where possible."""
    dropout = changes.pop("dropout_frac", 0.0)
    towers = {
        "clip": VisionConfig(image_size_px=64, patch_size_px=16, width=64, num_blocks=2),
        "swin": VisionConfig(
            kind="swin", image_size_px=64, patch_size_px=4, width=16,
            swin_num_blocks=(2, 2), swin_num_heads=(1, 2), swin_drop_path_frac=0.0,
        ),
    }  # fmt: skip
    return M3AEConfig(
        vision=changes.pop("vision_config", towers[vision]),
        text=TextConfig(
            kind=text,
            vocab_size=VOCAB,
            pad_token_id=1 if text == "roberta" else 0,
            width=32,
            num_layers=2,
            num_heads=4,
            mlp_width=80,
            max_positions=34,
            num_token_types=1 if text == "roberta" else 2,
            layer_norm_eps=1e-5 if text == "roberta" else 1e-12,
            dropout_frac=dropout,
        ),
        fusion=FusionConfig(width=48, num_layers=3, num_heads=4, mlp_ratio=2, dropout_frac=dropout),
        mim=MIMConfig(**{"layer": 2, "decoder_width": 40, "decoder_num_layers": 1, "decoder_num_heads": 2,
                         **changes.pop("mim", {})}),
        objectives=tuple(objectives),
        num_answers=ANSWERS,
        num_classes=CLASSES,
        **changes,
    )  # fmt: skip


def small_model(*args, seed=0, dtype=torch.float64, **kwargs):
    torch.manual_seed(seed)
    return M3AE(small_config(*args, **kwargs)).to(dtype)


def small_gpu_model(**changes):
    """On the GPU, in float32, with heads of 32, which the packed step's kernel takes."""
    config = small_config(**changes)
    text = dataclasses.replace(config.text, width=64, num_heads=2)
    fusion = dataclasses.replace(config.fusion, width=64, num_heads=2)
    torch.manual_seed(0)
    return M3AE(dataclasses.replace(config, text=text, fusion=fusion)).cuda()


def small_batch(model, objective, num=4, num_tokens=9, seed=0):
    """A batch for one objective (any of mlm, mim, itm gives all three), with ragged texts and floating-point images."""
    generator = torch.Generator().manual_seed(seed)
    config, dtype = model.config, model.image_proj.weight.dtype
    size = config.vision.image_size_px
    pad = config.text.pad_token_id

    def texts(*shape):
        ids = torch.randint(4, VOCAB, (*shape, num_tokens), generator=generator)
        lengths = torch.randint(3, num_tokens + 1, (*shape, 1), generator=generator)
        is_padding = torch.arange(num_tokens) >= lengths
        return ids.masked_fill(is_padding, pad), is_padding

    def images(count):
        return torch.randn(count, 3, size, size, generator=generator, dtype=dtype)

    ids, is_padding = texts(num)
    common = {
        "image_BCHW": images(num), "text_ids_BT": ids, "is_padding_BT": is_padding,
        "texts": [""] * num, "item_ids": [str(i) for i in range(num)], "bad_samples": [],
    }  # fmt: skip
    if objective in ("mlm", "mim", "itm"):
        labels = torch.full_like(ids, -100)
        labels[:, 1] = ids[:, 1]
        labels[0, 2] = ids[0, 2]
        itm = torch.arange(num) % 2
        num_patches = (size // config.vision.patch_size_px) ** 2
        return PretrainBatch(
            **common,
            mlm_ids_BT=ids.where(labels == -100, 3),
            mlm_labels_BT=labels,
            itm_labels_B=itm,
            false_image_FCHW=images(int((itm == 0).sum())),
            patch_noise_BN=torch.rand(num, num_patches, generator=generator),
        )
    if objective == "vqa":
        answers = torch.randint(0, ANSWERS, (num, 2), generator=generator)
        answers[0, 1] = -1
        return VqaBatch(
            **common,
            answer_ids_BA=answers,
            answer_scores_BA=torch.rand(num, 2, generator=generator) * (answers >= 0),
            is_open_B=torch.ones(num, dtype=torch.bool),
            question_ids=list(range(num)),
            answers=[[]] * num,
        )
    if objective == "classification":
        return ClassificationBatch(**common, label_B=torch.randint(0, CLASSES, (num,), generator=generator))
    false_ids, is_false_padding = texts(num, 3)
    return RetrievalBatch(
        **common, false_text_ids_BRT=false_ids, is_false_text_padding_BRT=is_false_padding, false_texts=[[]] * num
    )


class CountingBackend:
    """Runs the graphs that ``torch.compile`` makes as they are, and counts them."""

    num_graphs = 0

    def __call__(self, graph, inputs):
        self.num_graphs += 1
        return graph.forward
