"""Rules of a run's fields, written as metadata of their types: `Annotated[float, Range(0, 1)]`; all else derives from them."""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Self, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """An interval of finite numbers; an open end is left out of it. On a list it holds for each item."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """True if `value` is finite and in the range."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'above' if self.open_low else 'at least'} {self.low:g}"
        return (
            f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"
        )


POSITIVE = Range(0, open_low=True)
NOT_NEGATIVE = Range(0)
COUNT = Range(1)


class _Values(tuple[T, ...]):
    __slots__ = ()

    def __new__(cls, *values: T) -> Self:
        return super().__new__(cls, values)


class Choices(_Values[str]):
    """The words that a text field, or each item of a list, may hold."""


@dataclasses.dataclass(frozen=True, slots=True)
class Required:
    """A field that must not be empty."""

    sentence: str
    """Follows the field's path in the error, and says what to write."""
    unless_offline: bool = False
    """True if a run without a teacher service may leave it out."""
    unless_task: str = ""
    """Task of which a run may leave it out."""


@dataclasses.dataclass(frozen=True, slots=True)
class DefaultText:
    """A default that depends on other fields or on the host, in words; defaults.py or the run service settles it."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class MaxLength:
    """Longest text, in characters."""

    characters: int


@dataclasses.dataclass(frozen=True, slots=True)
class Lines:
    """Text that may have line breaks."""


@dataclasses.dataclass(frozen=True, slots=True)
class JsonText:
    """JSON text; a run file may have the value itself in its place."""

    kind: str
    """JSON Schema's name of its type: object or array."""


@dataclasses.dataclass(frozen=True, slots=True)
class ByWord:
    """List of dataclasses; in a run file an item that is a word stands for this field of it alone."""

    field: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FieldInfo:
    """Type, default and rules of one field of a configuration dataclass."""

    name: str
    python_type: type[Any]
    """Type of a value, or of an item of a list: str, bool, int, float or a dataclass."""
    default: Any
    """MISSING where the field builds its default."""
    repeated: bool
    mapping: bool
    rules: tuple[object, ...]

    @property
    def nested(self) -> type[Any] | None:
        """The dataclass that a value or an item is, if it is one."""
        return self.python_type if dataclasses.is_dataclass(self.python_type) else None

    def rule(self, kind: type[T]) -> T | None:
        """The field's rule of this kind, if it has one."""
        return next((each for each in self.rules if isinstance(each, kind)), None)


_FIELDS: dict[type[Any], Mapping[str, FieldInfo]] = {}
"""By dataclass: reading type hints takes most of the time of a copy."""


def fields_of(cls: type[Any]) -> Mapping[str, FieldInfo]:
    """Every field of the dataclass `cls` by name, in order."""
    if cls not in _FIELDS:
        hints = typing.get_type_hints(cls, include_extras=True)
        _FIELDS[cls] = {field.name: _info(field, hints[field.name]) for field in dataclasses.fields(cls)}
    return _FIELDS[cls]


def _info(field: dataclasses.Field[Any], hint: Any) -> FieldInfo:
    rules: tuple[object, ...] = getattr(hint, "__metadata__", ())
    bare = hint.__origin__ if rules else hint
    origin = typing.get_origin(bare)
    members = [each for each in typing.get_args(bare) or (bare,) if each not in (type(None), Ellipsis)]
    return FieldInfo(
        name=field.name,
        python_type=members[-1],
        default=field.default,
        repeated=origin is tuple,
        mapping=origin is collections.abc.Mapping,
        rules=rules,
    )
