"""Whether tensors fit a model, and those of other image sizes made to fit."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fastm3ae.model.build import Model
from fastm3ae.model.vision import resize_bias_tables, resize_positions

__all__ = ["differences", "resized"]

FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def resized(state: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Returns the state with its position embeddings or bias tables resized to the model's image size."""
    state = dict(state)
    positions = state.get("vision.pos_embed")
    if positions is not None and model.config.vision.kind != "swin" and _is_square(positions, 1):
        state["vision.pos_embed"] = resize_positions(positions[0], model.vision.pos_embed.shape[1] - 1)[None]
    if model.config.vision.kind == "swin":
        windows = {
            name: (round(len(table) ** 0.5) + 1) // 2
            for name, table in model.state_dict().items()
            if name.endswith("relative_position_bias_table") and name in state and _is_square(state[name][None], 0)
        }
        state = resize_bias_tables(state, windows)
    return state


def _is_square(table_1ND: Tensor, num_others: int) -> bool:
    """Returns whether all rows but the others are those of a square, so that they can be resized to another one."""
    if table_1ND.dim() != 3 or len(table_1ND) != 1 or table_1ND.dtype not in FLOATS:
        return False
    side = round(max(0, table_1ND.shape[1] - num_others) ** 0.5)
    return side > 0 and side**2 + num_others == table_1ND.shape[1]


def differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Returns, in words, which tensors are missing or unlike, layers of the same kind counted once; "": none."""
    found: dict[str, str] = {}
    for name, tensor in own.items():
        kind = re.sub(r"\.\d+\.", ".*.", name)
        if name not in state:
            found.setdefault(kind, f"{name} is missing")
        elif state[name].shape != tensor.shape:
            found.setdefault(kind, f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
        elif tensor.dtype in FLOATS and state[name].dtype not in FLOATS:
            found.setdefault(kind, f"{name} is of the type {state[name].dtype}, expected one of floating-point numbers")
    words = list(found.values())
    more = f", and {len(words) - 5} more" if len(words) > 5 else ""
    return ", ".join(words[:5]) + more
