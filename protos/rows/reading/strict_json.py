"""Parses JSON strictly: of two values of one name the standard parser drops one silently, and it reads NaN, which JSON has not."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from stillhouse.protos.rows.field_error import MAX_SHOWN_CHARS, FieldError

T = TypeVar("T")

GIVEN_TWICE = "is given twice in one object, so that one of its values would be lost. Remove one."
NOT_FINITE = "holds {}, which JSON does not. Write a number, or null."
MAX_NAME_CHARS = 80


def shown_name(name: str) -> str:
    """Returns a name for a sentence: short, and of text that can be printed."""
    return name[:MAX_NAME_CHARS].encode(errors="backslashreplace").decode()


def why_not_json(error: Exception, remedy: str) -> str:
    """Returns why a text is refused, as the rest of a sentence: in the parser's words, but where they speak of Python."""
    if isinstance(error, RecursionError):
        return "is nested too deeply. Write less than some hundred objects and arrays in each other."
    if "integer string conversion" in str(error):
        return f"has a whole number of more than {sys.get_int_max_str_digits()} digits. Write it as a string."
    return f"is not JSON ({error}); {remedy}."


class StrictJson:
    """A JSON decoder that notes what the standard one lets pass, to any depth: a name given twice, and NaN or infinity."""

    def __init__(self) -> None:
        self.fault: FieldError | None = None
        """The first such fault of the last text; None if there is none."""
        self._unnamed: str | None = None
        """A number that is not finite, in an object whose end is not read yet."""
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def parse(self, text: str) -> Any:
        """Returns the value of a text. Raises ValueError, or RecursionError, as json.loads does."""
        return self._checked(lambda: self._decoder.decode(text))

    def parse_at(self, text: str, at: int) -> tuple[Any, int]:
        """Returns the value that begins at a place of a text, and the place behind it. Raises as `parse` does."""
        return self._checked(lambda: self._decoder.raw_decode(text, at))

    def _checked(self, decode: Callable[[], T]) -> T:
        self.fault = self._unnamed = None
        value = decode()
        if self._unnamed is not None and self.fault is None:
            self.fault = FieldError("(the value)", NOT_FINITE.format(self._unnamed))
        return value

    def _constant(self, name: str) -> float:
        self._unnamed = name
        return float(name.replace("Infinity", "inf"))

    def _float(self, digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            self._unnamed = digits if len(digits) <= MAX_SHOWN_CHARS else f"{digits[:MAX_SHOWN_CHARS]}…"
        return number

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if self.fault is not None:
            return values
        if len(values) < len(pairs):
            [(repeated, _)] = Counter(name for name, _ in pairs).most_common(1)
            self.fault = FieldError(shown_name(repeated), GIVEN_TWICE)
        elif self._unnamed is not None:
            # The number may stand before this object in a list: the object around the list has its name.
            name = next((name for name, value in pairs if not is_finite(value)), None)
            if name is not None:
                self.fault = FieldError(shown_name(name), NOT_FINITE.format(self._unnamed))
        return values


def is_finite(value: Any) -> bool:
    """True for a JSON value without NaN and infinity in it."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    return not isinstance(value, list | tuple) or all(map(is_finite, value))
