"""Named, typed fields of a text: the text itself, a place in its JSON, or what a regular expression finds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import regex

from stillhouse.client.core.errors import usage_error
from stillhouse.client.datasets.parsing.problem import ParseProblem

TIMEOUT_S = 1.0
"""Longest search for one pattern in one text."""
MAX_PATTERN_CHARS = 2000
MAX_SHOWN_CHARS = 40
MAX_DIGITS = 400
"""Longest number as text."""
VALUE_GROUP = "value"

_WHOLE = regex.compile(r"[+-]?[0-9]+")
_NUMBER = regex.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


class SearchTimeout(ParseProblem):
    """A pattern that takes longer than TIMEOUT_S."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field and the place of its value."""

    name: str
    kind: str
    """One of KINDS."""
    pointer: Sequence[str] | None = None
    """Keys and indices of its place in the JSON of the text."""
    pattern: Any = None
    """Compiled expression whose group is its value; without pattern and pointer the whole text is."""

    def value(self, answer: Answer) -> Any:
        """Returns the value in a text. Raises ParseProblem naming the field."""
        try:
            if self.pattern is not None:
                return _typed_text(_search(self.pattern, answer.text), self.kind)
            if self.pointer is not None:
                return _typed_json(_at(answer.document, self.pointer), self.kind)
            return _typed_text(answer.text, self.kind)
        except SearchTimeout:
            raise
        except ParseProblem as problem:
            raise ParseProblem(f"{self.name}: {problem}") from problem


@dataclass(frozen=True)
class Answer:
    """A text and its JSON, which is parsed at most once."""

    text: str

    @cached_property
    def document(self) -> Any:
        """Its JSON, also in a fenced block. Raises ParseProblem."""
        text = self.text.strip()
        if text.startswith("```") and text.endswith("```") and len(text) > 6:
            first, _, rest = text[3:-3].partition("\n")
            text = rest if first.strip().lower() in ("", "json") else text
        try:
            return json.loads(text, object_pairs_hook=_object, parse_constant=_not_json)
        except ParseProblem:
            raise
        except (ValueError, RecursionError) as error:
            raise ParseProblem(f"the text is not JSON ({error})") from error


def parse_field(option: str, source: str) -> Field:
    """Parses NAME:TYPE, or with a `source` of "json" NAME:TYPE[=/POINTER], of "regex" NAME:TYPE=PATTERN.

    Raises StillhouseError for anything else.
    """
    declared, has_place, place = option.partition("=")
    name, has_kind, kind = declared.partition(":")
    if not name.isidentifier() or not has_kind or kind not in KINDS:
        raise usage_error(
            f"{option[:80]!r} is no field; write NAME:TYPE, with a type of {', '.join(KINDS)}"
            + {
                "json": ", and /KEY/KEY after = for another place than the key NAME",
                "regex": ", and a pattern after =",
            }.get(source, "")
            + "."
        )
    if source == "regex":
        return Field(name=name, kind=kind, pattern=_compiled(name, place))
    if source == "json":
        if place and not place.startswith("/"):
            raise usage_error(
                f"{place[:80]!r} is no place in JSON; write /KEY, or /KEY/0 for the first of a list."
            )
        if regex.search("~(?![01])", place):
            raise usage_error(f"{place[:80]!r} is no place in JSON; write ~0 for ~ and ~1 for / in a key.")
        pointer = [_unescaped(each) for each in place[1:].split("/")] if place else [name]
        return Field(name=name, kind=kind, pointer=pointer)
    if has_place:
        raise usage_error(f"{option[:80]!r} has a place, but the field is the whole text; write NAME:TYPE.")
    return Field(name=name, kind=kind)


def _unescaped(token: str) -> str:
    """A token of a JSON pointer (RFC 6901)."""
    return token.replace("~1", "/").replace("~0", "~")


def _compiled(name: str, pattern: str) -> Any:
    if not pattern or len(pattern) > MAX_PATTERN_CHARS:
        raise usage_error(
            f"the pattern of {name} has {len(pattern)} characters; give one of 1 to {MAX_PATTERN_CHARS}."
        )
    try:
        compiled = regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise usage_error(f"the pattern of {name} is no regular expression: {error}.") from error
    if VALUE_GROUP not in compiled.groupindex and compiled.groups > 1:
        raise usage_error(
            f"the pattern of {name} has {compiled.groups} groups; name that of the value, as in (?P<{VALUE_GROUP}>…)."
        )
    return compiled


def _search(pattern: Any, text: str) -> str:
    """Returns what a pattern finds. Raises ParseProblem if it finds nothing, or several values."""
    group = VALUE_GROUP if VALUE_GROUP in pattern.groupindex else min(pattern.groups, 1)
    values: set[str] = set()
    try:
        for found in pattern.finditer(text, timeout=TIMEOUT_S):
            if found[group] is not None:
                values.add(found[group])
            if len(values) > 1:
                raise ParseProblem("the pattern finds several values")
    except TimeoutError as error:
        raise SearchTimeout(f"the pattern searches for more than {TIMEOUT_S:g} s") from error
    if not values:
        raise ParseProblem("the pattern finds nothing")
    return values.pop()


def _at(document: Any, pointer: Sequence[str]) -> Any:
    for token in pointer:
        if isinstance(document, dict) and token in document:
            document = document[token]
        elif isinstance(document, list) and token.isdecimal() and int(token[:9]) < len(document):
            document = document[int(token[:9])]
        else:
            raise ParseProblem(f"the JSON has no /{'/'.join(pointer)}")
    return document


def _object(pairs: Sequence[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ParseProblem("the JSON has a key twice")
    return found


def _not_json(constant: str) -> NoReturn:
    raise ParseProblem(f"the JSON has {constant}, which is no number")


def _whole(text: str) -> int:
    if not _WHOLE.fullmatch(text) or len(text) > MAX_DIGITS:
        raise ValueError
    return int(text)


def _number(text: str) -> float:
    if not _NUMBER.fullmatch(text) or len(text) > MAX_DIGITS:
        raise ValueError
    return float(text)


def _boolean(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


_FROM_TEXT: Mapping[str, Callable[[str], Any]] = {"int": _whole, "float": _number, "bool": _boolean}
KINDS = ("text", *_FROM_TEXT, "json")
"""Types of fields; "json" is any value."""


def _typed_text(text: str, kind: str) -> Any:
    if kind == "text":
        return text
    if kind == "json":
        return Answer(text).document
    try:
        return _finite(_FROM_TEXT[kind](text.strip()), text)
    except (ValueError, KeyError) as error:
        raise _mistyped(text, kind) from error


def _typed_json(value: Any, kind: str) -> Any:
    if kind == "json":
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "float" and is_number:
        try:
            return _finite(float(value), value)
        except OverflowError as error:
            raise _mistyped(value, kind) from error
    if kind == "int" and is_number and value == (value // 1 if math.isfinite(value) else None):
        return int(value)
    wanted = {"text": str, "bool": bool}.get(kind)
    if wanted is None or not isinstance(value, wanted):
        raise _mistyped(value, kind)
    return value


def _finite(value: Any, shown: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise _mistyped(shown, "float")
    return value


def _mistyped(value: Any, kind: str) -> ParseProblem:
    shown = repr(value)
    shown = shown if len(shown) <= MAX_SHOWN_CHARS else f"{shown[:MAX_SHOWN_CHARS]}…"
    return ParseProblem(f"{shown} is no {kind}")
