"""AdamW in the original's six parameter groups, and its learning-rate schedule.

Source: set_schedule in the official file m3ae/modules/m3ae_utils.py.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fastm3ae.config import OptimConfig
from fastm3ae.model.heads import HEADS

__all__ = ["OfficialAdamW", "build_optimizer", "build_schedule", "parameter_groups"]

FUSION = ("image_proj.", "text_proj.", "fusion.", "image_pooler.", "text_pooler.")


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Splits the trainable parameters into {base, head, fusion} x {decay, no decay}.

    Biases, the weights of norms and the alignment's temperature do not decay, except for M3AE the norms that the
    original's list of names misses: those of the CLIP ViT and of the MIM decoder's blocks, and those inside the VQA and
    classification heads.

    Returns:
        Six groups with the keys "label", "names", "params", "lr" and "weight_decay"; a group may be empty.
    """
    norm_weights = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, (nn.LayerNorm, nn.GroupNorm))
    }
    is_m3ae, clip = model.config.kind == "m3ae", model.config.vision.kind == "clip"

    def decays(name: str) -> bool:
        if "bias" in name or name.endswith("log_temperature"):  # also Swin's relative_position_bias_table
            return False
        if name in norm_weights:
            return is_m3ae and (
                name.startswith(("mim_decoder.blocks.", "vqa_head.", "classification_head."))
                or (clip and name.startswith("vision."))
            )
        return True

    multipliers = {"base": 1.0, "head": config.head_lr_multiplier, "fusion": config.fusion_lr_multiplier}
    groups = {
        (part, decay): {
            "label": f"{part} {'decay' if decay else 'no_decay'}",
            "names": [],
            "params": [],
            "lr": config.learning_rate * multipliers[part],
            "weight_decay": config.weight_decay if decay else 0.0,
        }
        for part in multipliers
        for decay in (True, False)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "head" if name.startswith(HEADS) else "fusion" if name.startswith(FUSION) else "base"
            group = groups[part, decays(name)]
            group["names"].append(name)
            group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Builds torch's fused AdamW, or the original's, over the groups of ``parameter_groups``."""
    groups = [group for group in groups if group["params"]]
    options = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.adamw == "official":
        return OfficialAdamW(groups, **options)
    return torch.optim.AdamW(groups, **options, fused=True)


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, num_steps: int) -> LambdaLR:
    """Builds the schedule: linear warm-up from 0, then polynomial or cosine decay. The first step's rate is 0.

    Source: get_polynomial_decay_schedule_with_warmup and get_cosine_schedule_with_warmup of transformers. The
    polynomial ends at ``end_learning_rate`` relative to ``learning_rate``, in every group.
    """
    num_warmup = int(num_steps * config.warmup_frac) if config.warmup_steps is None else config.warmup_steps
    end = config.end_learning_rate / config.learning_rate

    def factor(step: int) -> float:
        if step < num_warmup:
            return step / max(1, num_warmup)
        progress = min(1.0, (step - num_warmup) / max(1, num_steps - num_warmup))
        if config.schedule == "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
        return end + (1.0 - end) * (1.0 - progress) ** config.decay_power

    return LambdaLR(optimizer, factor)


class OfficialAdamW(torch.optim.Optimizer):
    """AdamW with the arithmetic of the original: p -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps), p -= lr wd p.

    It differs from ``torch.optim.AdamW`` in where eps stands (before the bias correction of v) and in that the decay
    comes after the update. Parameters without a gradient are left alone.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay of the running means of gradients and squared gradients.
        eps: Added to the root of the uncorrected mean of squares.
        weight_decay: Decoupled weight decay.

    Source: AdamW of transformers 4.6, which the original uses.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Makes one step and returns the closure's value, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, parameter in self._with_gradient():
            (beta1, beta2), state = group["betas"], self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())  # a tensor, as torch's own has it
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
            state["exp_avg"].mul_(beta1).add_(parameter.grad, alpha=1.0 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1.0 - beta2)
            step = state["step"].item()
            step_size = group["lr"] * math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step)
            parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-step_size)
            if group["weight_decay"]:
                parameter.add_(parameter, alpha=-group["lr"] * group["weight_decay"])
        return loss

    def _with_gradient(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        for group in self.param_groups:
            yield from ((group, parameter) for parameter in group["params"] if parameter.grad is not None)
