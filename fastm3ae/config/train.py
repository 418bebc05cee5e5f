"""The configuration of learning: the optimiser, and the loop."""

from dataclasses import dataclass
from typing import Literal

from fastm3ae.errors import UserError

__all__ = ["OptimConfig", "Step", "TrainConfig"]

Step = Literal["packed", "original"]
MAX_STALL_TIMEOUT_S = 2700.0  # processes wait for each other for an hour


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW in the original's six parameter groups, warm-up, and a polynomial or cosine decay."""

    learning_rate: float = 1e-5
    """Peak learning rate of the towers and the modality embeddings."""
    head_lr_multiplier: float = 5.0
    """The heads learn so many times faster."""
    fusion_lr_multiplier: float = 5.0
    """The projections, fusion layers and poolers learn so many times faster."""
    weight_decay: float = 0.01
    """Weight decay of the decayed groups."""
    beta1: float = 0.9
    """Decay of the gradients' running mean."""
    beta2: float = 0.98
    """Decay of the squared gradients' running mean."""
    eps: float = 1e-8
    """Added to the root of the squared gradients' running mean."""
    schedule: Literal["polynomial", "cosine"] = "polynomial"
    """Shape of the decay after the warm-up."""
    warmup_frac: float = 0.1
    """Fraction of all steps over which the learning rate rises from 0."""
    warmup_steps: int | None = None
    """The same as a number of steps; None: use warmup_frac."""
    decay_power: float = 1.0
    """Power of the polynomial decay; 1 is linear."""
    end_learning_rate: float = 0.0
    """Where the polynomial decay ends, for every group."""
    clip_grad_norm: float | None = None
    """Scale gradients down to this total norm; None: no clipping, as the original."""
    adamw: Literal["torch", "official"] = "torch"
    """torch: torch.optim.AdamW, fused. official: the arithmetic of the original's AdamW."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_frac <= 1:
            raise UserError(f"optim.warmup_frac must lie between 0 and 1, got {self.warmup_frac}.")
        if self.end_learning_rate >= self.learning_rate:
            raise UserError(
                f"optim.end_learning_rate must be below optim.learning_rate, "
                f"got {self.end_learning_rate} and {self.learning_rate}."
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: how long, how large, how precise, how often."""

    num_steps: int | None = 100_000
    """Optimiser steps; None: as many as num_epochs needs."""
    num_epochs: int | None = None
    """Stop after so many passes over the data, if that comes first."""
    batch_size: int = 256
    """Image-text pairs per optimiser step, over all processes and passes together."""
    micro_batch: int | Literal["auto"] = "auto"
    """Pairs per process and forward pass, at most; the gradients of several passes are added up. auto: on a GPU
    those of the fewest passes that its memory holds, found by trying and remembered in the user's cache folder; on a
    CPU 32. The result differs by rounding and dropout. With several passes a step, global alignment runs the towers
    once more, to contrast each pair with all others."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes hold the model. ddp: each a copy. fsdp: each a part of the weights, gradients and optimiser
    state, which needs less memory and more communication; on several machines, each machine has all parts."""
    step: Step = "packed"
    """packed: one pass for all objectives, without padding and without what no loss reads. original: a pass for each
    objective, as in the original. Both give the same losses and gradients; dropout draws other numbers."""
    share_texts: bool = False
    """Not exact while the language tower has dropout: encode a text once for all objectives of the packed step that see
    it unmasked, so that they see the same dropout."""
    checkpoint_activations: bool = False
    """Exact: the packed step keeps only what its layers start from and computes the rest again in the backward pass,
    which takes less memory and more time."""
    compiled: bool = False
    """Exact: compile the packed step with torch.compile, which takes some minutes at the start."""
    cuda_graphs: bool = False
    """Exact: on one GPU, record the packed step of M3AE once and replay it, which saves the time in which the GPU waits
    for the next kernel to be started. Batches are filled up to the size of a bucket, by some percent."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Autocast type on a GPU (fp16 with a gradient scaler); a CPU always computes in fp32."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:N"."""
    num_workers: int = 8
    """Processes that decode images and tokenize texts, at most the machine's cores; 0: none. No effect on results."""
    log_every_steps: int = 10
    """How often losses go to metrics.jsonl and TensorBoard."""
    validate_every_steps: int = 5_000
    """How often the validation split is evaluated; always at the end."""
    validate_every_epochs: float | None = None
    """The same in passes over the data; None: use validate_every_steps."""
    max_val_batches: int | None = None
    """Validate on at most so many batches; None: the whole split."""
    num_pictures: int = 8
    """Validation pairs drawn into each picture; 0: no pictures."""
    save_every_steps: int = 5_000
    """How often a checkpoint is written; always at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept, beside the one that validated best."""
    keep_every_steps: int | None = None
    """Checkpoints of a multiple of so many steps are kept for good, too; None: none is."""
    patience: int | None = None
    """Stop early after so many validations in a row of which none was the best so far; None: never."""
    max_nonfinite_steps: int = 20
    """A step whose losses or gradients are not finite is left out; more than so many in a row end the run."""
    stall_timeout_s: float | None = 1800.0
    """End a process with exit status 75 when nothing moved for so long: no piece of data, no pass, no other process;
    None: never."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""
    wandb_project: str | None = None
    """Log to this project of Weights & Biases, too; None: don't. Needs the extra ``wandb``, whose own variables say the
    rest (WANDB_MODE=offline: nothing leaves the machine). A resumed run goes on with its W&B run. What cannot be
    started ends the run at once; if W&B fails later, the run goes on without it."""
    wandb_pictures: bool = False
    """Send the pictures of held-out pairs there, too, which show images and texts of the data."""

    def __post_init__(self) -> None:
        counts = ("num_steps", "num_epochs", "batch_size", "micro_batch", "log_every_steps", "validate_every_steps",
                  "max_val_batches", "save_every_steps", "keep_checkpoints", "keep_every_steps",
                  "patience")  # fmt: skip
        for name in counts:
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise UserError(f"train.{name} must be at least 1, got {value}.")
        if self.num_steps is None and self.num_epochs is None:
            raise UserError("train.num_steps or train.num_epochs must say when training ends; both are None.")
        if self.validate_every_epochs is not None and self.validate_every_epochs <= 0:
            raise UserError(f"train.validate_every_epochs must be positive, got {self.validate_every_epochs}.")
        for name in ("share_texts", "checkpoint_activations", "compiled", "cuda_graphs"):
            if self.step == "original" and getattr(self, name):
                raise UserError(f"train.{name} is an option of train.step packed only.")
        if self.stall_timeout_s is not None and not 0 < self.stall_timeout_s <= MAX_STALL_TIMEOUT_S:
            raise UserError(
                f"train.stall_timeout_s must be positive and at most {MAX_STALL_TIMEOUT_S}, after which processes stop "
                f"to wait for each other, or None; got {self.stall_timeout_s}."
            )
        if self.parallel == "fsdp" and self.compiled:
            raise UserError("train.compiled and train.parallel fsdp exclude each other.")
        if self.compiled and self.checkpoint_activations:
            raise UserError("train.compiled and train.checkpoint_activations exclude each other.")
        if self.cuda_graphs and self.checkpoint_activations:
            raise UserError("train.cuda_graphs and train.checkpoint_activations exclude each other.")
        for name in ("num_workers", "num_pictures", "max_nonfinite_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} must not be negative, got {getattr(self, name)}.")
