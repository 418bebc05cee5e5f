"""Configurations as nested dictionaries of plain values, for YAML and JSON; and in what two of them differ."""

import dataclasses
import json
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fastm3ae.errors import UserError, listed, nearest, shown

__all__ = ["differences", "from_dict", "parse_json", "read_yaml", "to_dict"]

LONGEST_FILE, DEEPEST_FILE = 2**18, 32
"""Bytes of a YAML file, of which a configuration has some thousand, and sections within sections."""


def parse_json(text: str | bytes) -> Any:
    """Returns what JSON says.

    Raises:
        ValueError: It is no JSON, nested too deeply, or holds a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_yaml(path: Path) -> Any:
    """Returns what a YAML file holds: dictionaries, lists and plain values.

    Raises:
        UserError: The file cannot be read, is too long or too deep, is not YAML, or has aliases (``*name``), by which a
            few lines can stand for any number of values.
    """
    import yaml

    try:
        with path.open("rb") as file:
            text = file.read(LONGEST_FILE + 1).decode()
        if len(text) > LONGEST_FILE:
            raise UserError(f"{path} is too long for a configuration: more than {LONGEST_FILE} bytes.")
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):  # one after the other: nothing is made of them yet
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{path} has aliases (*name), which are not read: write out what they stand for.")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST_FILE:
                raise UserError(f"{path} is no configuration: more than {DEEPEST_FILE} sections within each other.")
        return yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a number or a date that Python has not
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


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
        raise UserError(f"{where.rstrip('.') or 'the configuration'} must be a section of keys, got {shown(values)}.")
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"Unknown configuration key {where}{listed([str(key)])}.{nearest(key, hints)}")
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
    if not isinstance(values["kind"], str) or values["kind"] not in kinds:
        expected, found = ", ".join(map(repr, kinds)), values["kind"]
        raise UserError(f"{where}.kind must be one of {expected}, got {shown(found)}.{nearest(found, kinds)}")
    return kinds[values["kind"]]()


def _checked(value: Any, hint: Any, where: str) -> Any:
    """Returns ``value`` as the type that ``hint`` names, or raises a UserError that names ``where``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        alternatives = [a for a in args if a is not type(None)]
        words = [a for a in alternatives if typing.get_origin(a) is Literal and _is_one_of(value, typing.get_args(a))]
        return value if words else _checked(value, alternatives[0], where)
    if origin is Literal:
        if not _is_one_of(value, args):
            expected = ", ".join(map(repr, args))
            raise UserError(f"{where} must be one of {expected}, got {shown(value)}.{nearest(value, args)}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} must be a list, got {shown(value)}.")
        return tuple(_checked(v, args[0], where) for v in value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{where} must be a number of at most 64 bits, got {shown(value)}.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML reads 1e-5 as a string
        try:
            return float(value)
        except ValueError:
            raise UserError(f"{where} must be a number, got {shown(value)}.") from None
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} must be of type {hint.__name__}, got {shown(value)}.")
    if hint is str and not _can_name_a_file(value):
        raise UserError(f"{where} must be a text without NUL and half characters, got {shown(value)}.")
    return value


def _is_one_of(value: Any, words: Sequence[Any]) -> bool:
    """Returns whether a value is a word of them; True and 1.0 are no 1."""
    return any(type(value) is type(word) and value == word for word in words)


def _can_name_a_file(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
