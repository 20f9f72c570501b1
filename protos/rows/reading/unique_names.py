"""Parses JSON whose objects give each name once: of two values of a name the standard parser drops one silently."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

GIVEN_TWICE = "is given twice in one object, so that one of its values would be lost. Remove one."
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


class UniqueNames:
    """A JSON decoder that notes a name which an object gives twice, to any depth."""

    def __init__(self) -> None:
        self.repeated: str | None = None
        """The first such name of the last text; None if there is none."""
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def parse(self, text: str) -> Any:
        """Returns the value of a text. Raises ValueError, or RecursionError, as json.loads does."""
        self.repeated = None
        return self._decoder.decode(text)

    def parse_at(self, text: str, at: int) -> tuple[Any, int]:
        """Returns the value that begins at a place of a text, and the place behind it. Raises as `parse` does."""
        self.repeated = None
        return self._decoder.raw_decode(text, at)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs) and self.repeated is None:
            [(self.repeated, _)] = Counter(name for name, _ in pairs).most_common(1)
        return values
