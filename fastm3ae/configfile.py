"""Configurations as nested dictionaries of plain values, for YAML and JSON; and in what two of them differ."""

import dataclasses
import types
import typing
from typing import Any, Literal

from fastm3ae.errors import UserError, nearest

__all__ = ["differences", "from_dict", "to_dict"]


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a dataclass as nested dictionaries of plain values, ready for YAML and JSON (tuples become lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(config)


def from_dict(base: Any, values: dict[str, Any], where: str = "") -> Any:
    """Returns ``base`` with the fields that ``values`` names replaced, section by section.

    A section of several possible kinds (``model``) that names another ``kind`` starts from that kind's defaults.

    Args:
        base: A configuration dataclass.
        values: Nested dictionaries, as a YAML file gives them.
        where: Dotted name of ``base``, for the error messages.

    Raises:
        UserError: A key is unknown (the nearest known one is named) or a value has the wrong type.
    """
    hints, changes = typing.get_type_hints(type(base)), {}
    if not isinstance(values, dict):
        raise UserError(f"{where.rstrip('.') or 'the configuration'} must be a section of keys, got {values!r}.")
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"Unknown configuration key {where}{key}.{nearest(str(key), hints)}")
        current = getattr(base, key)
        if dataclasses.is_dataclass(current):
            start = _section_of_kind(current, hints[key], value, f"{where}{key}")
            changes[key] = from_dict(start, value, f"{where}{key}.")
        else:
            changes[key] = _checked(value, hints[key], f"{where}{key}")
    return dataclasses.replace(base, **changes)


def differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns the dotted keys at which two dictionaries of ``to_dict`` differ, with both values (None: no such key)."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= differences(before, after, f"{where}{key}.")
        elif before != after:
            found[f"{where}{key}"] = (before, after)
    return found


def _section_of_kind(current: Any, hint: Any, values: Any, where: str) -> Any:
    """Returns what the section's values are put into: ``current``, or the defaults of the other kind that they name."""
    kinds = {section.kind: section for section in typing.get_args(hint)}
    if not isinstance(values, dict) or "kind" not in values or not kinds or values["kind"] == current.kind:
        return current
    if values["kind"] not in kinds:
        expected = ", ".join(map(repr, kinds))
        raise UserError(
            f"{where}.kind must be one of {expected}, got {values['kind']!r}.{nearest(str(values['kind']), kinds)}"
        )
    return kinds[values["kind"]]()


def _checked(value: Any, hint: Any, where: str) -> Any:
    """Returns ``value`` as the type that ``hint`` names, or raises a UserError that names ``where``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        alternatives = [a for a in args if a is not type(None)]
        words = [a for a in alternatives if typing.get_origin(a) is Literal and value in typing.get_args(a)]
        return value if words else _checked(value, alternatives[0], where)
    if origin is Literal:
        if value not in args:
            expected = ", ".join(map(repr, args))
            raise UserError(f"{where} must be one of {expected}, got {value!r}.{nearest(str(value), args)}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} must be a list, got {value!r}.")
        return tuple(_checked(v, args[0], where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML reads 1e-5 as a string
        try:
            return float(value)
        except ValueError:
            raise UserError(f"{where} must be a number, got {value!r}.") from None
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} must be of type {hint.__name__}, got {value!r}.")
    return value
