"""Pre-training: what its runs are, to the code that all runs share."""

from typing import Any

import torch

from fastm3ae.config import MPMA_PRETRAINING_OBJECTIVES, PRETRAINING_OBJECTIVES, PretrainConfig
from fastm3ae.data.batch import PretrainBatch
from fastm3ae.data.loader import pretrain_loader
from fastm3ae.errors import UserError
from fastm3ae.training.distributed import Processes
from fastm3ae.training.job import Job
from fastm3ae.training.pictures import draw_pictures
from fastm3ae.training.run import run
from fastm3ae.training.validation import validate

__all__ = ["PRETRAINING", "check_objectives", "longest_batch", "pretrain"]


def pretrain(config: PretrainConfig) -> dict[str, Any] | None:
    """Runs a pre-training, together with the other processes that torchrun may have started.

    Args:
        config: The run; all processes take that of the first.

    Returns:
        What was written to summary.json; None in all processes but the first.

    Raises:
        UserError: Something that the configuration names is missing or does not fit.
        Interrupted: A signal ended the run; what it had is saved.
    """
    processes = Processes(config.train.device)
    config = processes.from_first(lambda: config)
    check_objectives(config)
    summary = run(config, PRETRAINING, processes)
    processes.close()
    return summary


def check_objectives(config: PretrainConfig) -> None:
    """Checks that a model is pre-trained by what is meant for that.

    Raises:
        UserError: An objective is not one of pre-training.
    """
    known = PRETRAINING_OBJECTIVES if config.model.kind == "m3ae" else MPMA_PRETRAINING_OBJECTIVES
    others = [name for name in config.model.objectives if name not in known]
    if others:
        raise UserError(
            f"model.objectives names {others[0]!r}, which is no objective of pre-training; "
            f"expected some of {', '.join(known)}."
        )


def longest_batch(config: PretrainConfig, num_pairs: int) -> PretrainBatch:
    """Returns a batch that needs as much memory as any: full texts, all images false (and drawn besides)."""
    size, num_tokens = config.model.image_size_px, config.data.max_text_tokens
    images = torch.zeros(num_pairs, 3, size, size)
    ids = torch.full((num_pairs, num_tokens), (config.model.text.pad_token_id or 0) + 1)
    is_masked_T = torch.arange(num_tokens) < max(1, round(num_tokens * config.masking.token_frac))
    return PretrainBatch(
        image_BCHW=images,
        text_ids_BT=ids,
        is_padding_BT=torch.zeros(num_pairs, num_tokens, dtype=torch.bool),
        texts=[""] * num_pairs,
        item_ids=[""] * num_pairs,
        bad_samples=[],
        mlm_ids_BT=ids,
        mlm_labels_BT=ids.masked_fill(~is_masked_T, -100),
        itm_labels_B=torch.zeros(num_pairs, dtype=torch.int64),
        false_image_FCHW=images,
        patch_noise_BN=torch.rand(num_pairs, config.model.num_noise_patches),
    )


PRETRAINING = Job("pretrain", "score", pretrain_loader, longest_batch, validate, draw_pictures)
