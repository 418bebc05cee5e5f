"""Damage: bytes with flipped bits, wild lengths and foreign pieces; and values that no program expects."""

import random
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["mutate", "odd_json", "odd_text", "odd_value"]

EXTREMES = (0, 1, -1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1)
NUMBERS = ("0", "-1", "1", "9" * 5000, "0x" + "f" * 6000, "1e999", "-1e999", "nan", ".inf", "1e-320", "2147483648",
           "18446744073709551616", "0.0", "-0", "1_0", "1:30:00", "0o17", "1j", "٣", "１")  # fmt: skip
TEXTS = ("", " ", "\t", "\n", "~", "null", "true", "é", "\u202e", "\ufeff", "😀" * 50, "a" * 100_000, "../../x", "/",
         "a\x00b", "\x1b[31m", "%s%n", "{}", "--", "-", "=", "[", "'", '"', "\\", "#", "!!python/object:os.system",
         "a\nb: 1", "e\u0301", "$(touch owned)", "`touch owned`")  # fmt: skip

Operation = Callable[[bytes, random.Random, Sequence[bytes]], bytes]


def place(data: bytes, rng: random.Random) -> int:
    """A position: most formats decide at their beginning or their end."""
    last = max(0, len(data) - 1)
    return min(last, max(0, rng.choice((rng.randint(0, last), rng.randint(0, 255), last - rng.randint(0, 255)))))


def flip(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    changed, at = bytearray(data or b"\0"), place(data, rng)
    changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    at, size = place(data, rng), rng.choice((1, 2, 4, 8))
    at -= at % size * rng.getrandbits(1)  # formats like their numbers aligned
    number = rng.choice((*EXTREMES, rng.getrandbits(64))) & (256**size - 1)
    return data[:at] + number.to_bytes(size, rng.choice(("little", "big"))) + data[at + size :]


def nudge(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    changed, at = bytearray(data or b"\0"), place(data, rng)
    changed[at] = (changed[at] + rng.choice((-16, -1, 1, 16))) % 256
    return bytes(changed)


def truncate(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    return data[: place(data, rng)]


def cut(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    at = place(data, rng)
    return data[:at] + data[at + rng.choice((1, 2, 4, 8, 100)) :]


def insert(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    at, size = place(data, rng), rng.choice((1, 2, 4, 8, 100))
    return data[:at] + rng.choice((rng.randbytes(size), bytes(size), b"\xff" * size)) + data[at:]


def repeat(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    at, size = place(data, rng), rng.choice((1, 8, 64, 1000))
    return data[:at] + data[at : at + size] * rng.choice((2, 3, 20)) + data[at + size :]


def splice(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others) if others else data
    at, start = place(data, rng), place(other, rng)
    if rng.getrandbits(1):
        return data[:at] + other[start:]
    size = rng.choice((8, 64, 1000))
    return data[:at] + other[start : start + size] + data[at + size :]


def swap(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    size = rng.choice((1, 4, 8, 64))
    first, second = sorted((place(data, rng), place(data, rng)))
    if second - first < size:
        return data
    middle, end = data[first + size : second], data[second + size :]
    return data[:first] + data[second : second + size] + middle + data[first : first + size] + end


def digits(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Another number where one is written in digits."""
    places = [i for i, byte in enumerate(data[:100_000]) if 0x30 <= byte <= 0x39]
    if not places:
        return flip(data, rng, others)
    at = rng.choice(places)
    end = at + 1
    while end < len(data) and 0x30 <= data[end] <= 0x39:
        end += 1
    return data[:at] + rng.choice((*NUMBERS, *map(str, EXTREMES))).encode() + data[end:]


OPERATIONS: tuple[Operation, ...] = (flip, flip, overwrite, overwrite, nudge, truncate, cut, insert, repeat, splice,
                                     swap, digits)  # fmt: skip


def mutate(data: bytes, rng: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """Returns the bytes after one to sixteen kinds of damage; ``others`` give foreign pieces."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4, 16))):
        data = rng.choice(OPERATIONS)(data, rng, others)
    return data


def odd_text(rng: random.Random) -> str:
    """Returns a text that breaks what splits, prints or looks up texts."""
    return rng.choice((*TEXTS, *NUMBERS, "".join(chr(rng.randrange(1, 0xD800)) for _ in range(rng.randrange(1, 30)))))


def odd_value(rng: random.Random) -> Any:
    """Returns a value of any type that YAML and JSON know, often in the wrong place."""
    return rng.choice(
        (
            None, True, False, 0, 1, -1, 2, 3.5, -0.0, float("nan"), float("inf"), 10**30, 10**4000, -(2**63), 64,
            odd_text(rng), [], {}, [[]], [None], ["a", 1], [float("nan")], {"a": {}}, {"kind": []}, {"kind": "mpma"},
            nested(rng.choice((3, 50, 150)), rng), list(range(1000)), [odd_text(rng) for _ in range(3)],
        )
    )  # fmt: skip


def nested(depth: int, rng: random.Random) -> Any:
    value: Any = 1
    wrap = rng.choice((lambda inner: [inner], lambda inner: {"a": inner}))
    for _ in range(depth):
        value = wrap(value)
    return value


def odd_json(rng: random.Random) -> str:
    """Returns JSON, or what looks like it, that its readers stumble over."""
    deep = rng.choice((100, 100_000))
    return rng.choice(
        (
            "", "{", "[", "null", "1", "[]", '"x"', "NaN", "{}", '{"a": NaN}', "9" * 5000, "-", '{"a": 1e999}',
            "[" * deep, '{"a":' * deep, "[" * deep + "]" * deep, '{"a": "\\ud800"}', '{"a": "\\u0000"}', "\ufeff{}",
            '{"classes": []}', '{"classes": {"labels": 5}}', '{"classes": {"labels": [1, 2]}}', '{"options": []}',
            '{"classes": {"labels": [["a"]]}}', '{"classes": {"labels": "ab"}}', '{"classes": null, "options": null}',
            '{"classes": {"answer_labels": {}}}', '{"options": {"a": {"b": [1]}}}', '{"classes": {"labels": []}}',
        )
    )  # fmt: skip
