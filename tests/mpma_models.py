"""Small MPMA models and batches that several tests share."""

import dataclasses

import torch
from models import VOCAB

from fastm3ae.config import (
    AlignmentConfig,
    FusionConfig,
    ImageReconstructionConfig,
    MPMAConfig,
    TextConfig,
    VisionConfig,
)
from fastm3ae.data.batch import PretrainBatch
from fastm3ae.model.mpma import MPMA

MASK, PAD = 3, 0
MEMORIES = ("slots", "topk", "none")
# Reports of every kind: without a word, of one word that is hidden, of one that is not, and longer ones.
LENGTHS = (2, 3, 3, 9, 7, 6)
HIDDEN = ((), (1,), (), (2, 3, 6), (1, 5), (1, 2, 3, 4))


def small_config(text="bert", alignment=None, image=None, dropout_frac=0.0, **changes):
    """A configuration with every size different from every other where possible."""
    towers = {
        "vision": VisionConfig(kind="vit", image_size_px=64, patch_size_px=16, width=64, num_blocks=2),
        "text": TextConfig(
            kind=text,
            vocab_size=VOCAB,
            pad_token_id=PAD,
            width=32,
            num_layers=2,
            num_heads=4,
            mlp_width=80,
            max_positions=34,
            num_token_types=2,
            layer_norm_eps=1e-12,
            dropout_frac=dropout_frac,
        ),
        "fusion": FusionConfig(width=48, num_layers=3, num_heads=4, mlp_ratio=2, dropout_frac=dropout_frac),
    }
    decoder = {"decoder_width": 40, "decoder_num_layers": 2, "decoder_num_heads": 2}
    sizes = {"num_slots": 5, "num_topk_slots": 11, "num_topk_kept": 3, "init_std": 0.1}
    return MPMAConfig(
        image=ImageReconstructionConfig(**decoder | (image or {})),
        alignment=AlignmentConfig(**{"head_width": 24, "width": 12} | (alignment or {})),
        **towers | sizes | changes,
    )


def small_model(*args, seed=0, dtype=torch.float64, **kwargs):
    torch.manual_seed(seed)
    return MPMA(small_config(*args, **kwargs)).to(dtype)


def small_batch(config, lengths=LENGTHS, hidden=HIDDEN, num_tokens=9, seed=0, dtype=torch.float64):
    """Ragged reports with floating-point images."""
    generator = torch.Generator().manual_seed(seed)
    num, size = len(lengths), config.image_size_px
    is_padding = torch.arange(num_tokens) >= torch.tensor(lengths)[:, None]
    ids = torch.randint(4, VOCAB, (num, num_tokens), generator=generator).masked_fill(is_padding, PAD)
    labels = torch.full_like(ids, -100)
    for row, positions in enumerate(hidden):
        labels[row, list(positions)] = ids[row, list(positions)]
    return PretrainBatch(
        image_BCHW=torch.randn(num, 3, size, size, generator=generator, dtype=dtype),
        text_ids_BT=ids,
        is_padding_BT=is_padding,
        texts=[""] * num,
        item_ids=[str(i) for i in range(num)],
        bad_samples=[],
        mlm_ids_BT=ids.where(labels == -100, MASK),
        mlm_labels_BT=labels,
        itm_labels_B=torch.ones(num, dtype=torch.int64),
        false_image_FCHW=torch.zeros(0, 3, size, size, dtype=dtype),
        patch_noise_BN=torch.rand(num, config.num_noise_patches, generator=generator),
    )


def part_of(batch, rows):
    """Some pairs of a batch, as a batch."""
    index = torch.tensor(rows)
    tensors = {
        name: getattr(batch, name)[index]
        for name in ("image_BCHW", "text_ids_BT", "is_padding_BT", "mlm_ids_BT", "mlm_labels_BT", "itm_labels_B",
                     "patch_noise_BN")
    }  # fmt: skip
    made = ("num_tokens_B", "masked_index_M", "masked_labels_M", "masked_rows_M", "itm_index_B", "itm_rows_B")
    ids = [batch.item_ids[row] for row in rows]
    return dataclasses.replace(batch, **tensors, **dict.fromkeys(made), texts=[""] * len(rows), item_ids=ids)
