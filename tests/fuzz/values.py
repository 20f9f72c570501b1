"""Hostile values of every scalar type, and the class that a value falls into, by which structures are told apart."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field

MAX_LONG = 70_000
STRINGS: Sequence[str] = (
    "",
    ".",
    "..",
    "/",
    "../../../../etc/passwd",
    "/etc/passwd",
    "/proc/self/environ",
    "/dev/zero",
    "checkpoints/../../../stillhouse.db",
    "checkpoints//../lock",
    "exports/link",
    "exports/folder/passwd",
    "datasets/../credentials.toml",
    "caches/../../x",
    "runs/../../credentials.toml",
    "file:///etc/passwd",
    "\\\\host\\share",
    "a\0b",
    "nul\0",
    "new\nline: {a: b}",
    "; rm -rf ~",
    "$(touch /tmp/x)",
    "`id`",
    "%s%s%n",
    "{0.__class__}",
    "<script>",
    "é" * 300,
    "\u202e\u2066",
    "\U0001f600",
    "\ufeff",
    "\x7f\x1b[31m",
    "-1",
    "1e309",
    "nan",
    "true",
    "null",
    "x" * 300,
    "x" * 5000,
    "/".join("d" * 200),
    "a/" * 2000,
)
INTS = (
    0,
    1,
    -1,
    2,
    7,
    63,
    64,
    65,
    127,
    128,
    255,
    256,
    257,
    1023,
    1024,
    4095,
    4096,
    65535,
    65536,
    10**6,
    10**9,
)
FLOATS = (
    *(0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, -1e-30, 1e30, 1e308, -1e308, 5e-324),
    *(math.nan, math.inf, -math.inf, 1.0000001, 2.0, 1e6),
)
_LIMITS = {
    Field.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    Field.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    Field.CPPTYPE_UINT32: (0, 2**32 - 1),
    Field.CPPTYPE_UINT64: (0, 2**64 - 1),
    Field.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}


def hostile(field: Any, rng: random.Random, words: Sequence[str]) -> Any:
    """A value of the field's type; of strings, one of `words`, which the service under test knows, a third of the time."""
    kind = field.cpp_type
    if kind in _LIMITS:
        return _integer(field, rng)
    if kind in (Field.CPPTYPE_DOUBLE, Field.CPPTYPE_FLOAT):
        value = rng.choice(FLOATS) if rng.random() < 0.8 else rng.uniform(-2, 2)
        return value if kind == Field.CPPTYPE_DOUBLE or abs(value) < 3e38 else math.copysign(math.inf, value)
    if kind == Field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.type == Field.TYPE_BYTES:
        return some_bytes(rng)
    return some_string(rng, words)


def _integer(field: Any, rng: random.Random) -> int:
    low, high = _LIMITS[field.cpp_type]
    if field.cpp_type == Field.CPPTYPE_ENUM and rng.random() < 0.6:
        return int(rng.choice(list(field.enum_type.values_by_number)))
    if rng.random() < 0.25:
        return rng.choice((low, high, low + 1, high - 1))
    return max(low, min(high, rng.choice(INTS) * rng.choice((1, 1, 1, -1))))


def some_string(rng: random.Random, words: Sequence[str]) -> str:
    """A string for a place where a name, a path or a number in words is expected."""
    draw = rng.random()
    if words and draw < 0.33:
        return rng.choice(words)
    if words and draw < 0.45:
        return rng.choice(words) + rng.choice(STRINGS)
    if draw < 0.455:
        return "y" * rng.randrange(MAX_LONG)
    if draw < 0.55:
        return "".join(
            chr(rng.choice((rng.randrange(1, 128), rng.randrange(0x80, 0xD800)))) for _ in range(9)
        )
    return rng.choice(STRINGS)


def some_bytes(rng: random.Random) -> bytes:
    """Bytes of any length, mostly few."""
    size = rng.choice((0, 1, 2, 3, 4, 7, 8, 16, 33, 100, 1000, rng.randrange(MAX_LONG)))
    return rng.randbytes(size)


def class_of(value: Any) -> Any:
    """Kind of a value: sign and size of numbers, length and traits of texts."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return (value > 0) - (value < 0), abs(value).bit_length() // 4
    if isinstance(value, float):
        if not math.isfinite(value) or value == 0:
            return repr(value)
        return value > 0, max(-4, min(4, math.floor(math.log10(abs(value)))))
    if isinstance(value, bytes):
        return "bytes", len(value).bit_length()
    traits = tuple(mark in value for mark in ("\0", "..", "/", "\n", ";"))
    return len(value).bit_length(), traits, value.isascii(), value.startswith("/")
