"""Which numbers a configuration may hold: what no run can want is refused before it takes all memory, or all time."""

import dataclasses
import math
from typing import Any

from fastm3ae.errors import UserError, shown

__all__ = ["MOST_CELLS", "MOST_HEADS", "MOST_LAYERS", "MOST_ROWS", "MOST_WIDTH", "check_finite", "check_range"]

MOST_LAYERS, MOST_HEADS, MOST_WIDTH, MOST_ROWS = 256, 1024, 2**16, 2**22
"""Of a stack, of a layer, of a token or a hidden layer, and of a table."""
MOST_CELLS = 2**26
"""Of a table that is calculated: of positions, rows times width."""


def check_range(where: str, config: Any, low: float, high: float, *names: str) -> None:
    """Raises a UserError unless fields lie within the bounds, which are included; None counts as within.

    Args:
        where: Dotted name of the configuration.
        config: A configuration dataclass.
        low: The lower bound.
        high: The upper bound.
        *names: The fields, of numbers or of tuples of numbers.
    """
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not low <= number <= high:
                bound = f"at most {high}" if number > high else f"at least {low}"
                raise UserError(f"{where}.{name} must be {bound}, got {shown(value)}.")


def check_finite(config: Any, where: str = "") -> None:
    """Raises a UserError that names the first number in a configuration that is infinite or none."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_finite(value, f"{where}{field.name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}{field.name} must be a finite number, got {value}.")
