"""Compares written answers with references: as text, as the last number, or field by field after parsing JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
from numpy.typing import NDArray

MINUS = "\N{MINUS SIGN}"
NUMBER = re.compile(
    rf"(?:(?<![\w.)\]])[-+{MINUS}])?(?:(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
)
"""A sign behind a number, a word or a bracket is none: that of 10-20 is a dash."""
_FENCE = re.compile(r"```(?:json)?[^\S\n]*\n(.*?)```", re.DOTALL)
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_MARK = "####"


def is_exact(answer: str, reference: str) -> bool:
    """Returns True if both are the same text, but for white space around them."""
    return answer.strip() == reference.strip()


def is_same_number(answer: str, reference: str) -> bool:
    """Returns True if the last number of both is the same; False if one has none."""
    ours, theirs = last_number(answer), last_number(reference)
    return ours is not None and ours == theirs


def last_number(text: str) -> Decimal | None:
    """Returns the last number of a text: 1,234.50 is 1234.5; that after the last "####" comes first, as GSM8K writes it."""
    marked = text.rpartition(_MARK)[2].strip() if _MARK in text else ""
    found = [each.group() for each in NUMBER.finditer(marked if marked and "\n" not in marked else text)]
    numbers = [each for each in found if any(letter.isdigit() for letter in each)]
    if not numbers:
        return None
    try:
        # Not normalised, which rounds, and fails for large exponents: equal numbers compare as equal.
        return Decimal(numbers[-1].replace(",", "").replace(MINUS, "-"))
    except InvalidOperation:
        return None


def fields_of(text: str) -> dict[str, Any] | None:
    """Returns the JSON object in a text: alone, after a thought, in a fence, or between its first and last brace; else None."""
    plain = _THOUGHT.sub("", text).strip()
    fenced = _FENCE.findall(plain)
    braces = plain[plain.find("{") : plain.rfind("}") + 1] if "{" in plain else ""
    for candidate in (plain, *fenced[-1:], braces):
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return None


def is_comparable(match: str) -> Callable[[str], bool]:
    """Returns what tells whether a reference has what a comparison looks at."""
    if match == "numeric":
        return lambda reference: last_number(reference) is not None
    if match == "fields":
        return lambda reference: bool(fields_of(reference))
    return lambda _: True


def matching(match: str, answers: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """Returns 1 for each row whose answer matches by "exact" or "numeric", else 0, [N]."""
    same = is_exact if match == "exact" else is_same_number
    pairs = zip(answers, references, strict=True)
    return np.asarray([float(same(answer, reference)) for answer, reference in pairs])


def matching_fields(
    answers: Sequence[str], references: Sequence[str]
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Returns matches and numbers of rows, both [N] of 0 and 1, for each field of the references, by name.

    A row counts for the fields that its reference has; an answer that is no JSON object matches none of them.
    """
    wanted = [fields_of(each) or {} for each in references]
    names = list(dict.fromkeys(name for row in wanted for name in row))
    given = [fields_of(each) or {} for each in answers]
    result = {}
    for name in names:
        counts = np.asarray([float(name in row) for row in wanted])
        hits = [
            float(name in row and name in own and _same(own[name], row[name]))
            for own, row in zip(given, wanted, strict=True)
        ]
        result[name] = np.asarray(hits), counts
    return result


def _same(answer: Any, reference: Any) -> bool:
    """Returns True for equal values; true and 1 differ, texts are compared without white space around them, at any depth."""
    waiting = [(answer, reference)]
    while waiting:
        ours, theirs = waiting.pop()
        if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
            waiting += zip(ours, theirs, strict=True)
        elif isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
            waiting += ((ours[name], theirs[name]) for name in ours)
        elif isinstance(ours, list | dict):
            return False
        elif isinstance(ours, str) and isinstance(theirs, str):
            if ours.strip() != theirs.strip():
                return False
        elif isinstance(ours, bool) != isinstance(theirs, bool) or ours != theirs:
            return False
    return True
