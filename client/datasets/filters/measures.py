"""Filters by one measure of a row alone: length, end, repetition, parse_ok, the teacher's log-probability."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stillhouse.client.datasets.filters.row import Drop, FilterRow
from stillhouse.protos.rows.field_error import FieldError, kind_of
from stillhouse.protos.rows.finish_reason import is_cut_short

REPEATED_WORDS = 4
"""Length of the runs of words that count as repeated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """Completions within bounds, in characters or in the teacher's tokens, which `generate --capture` has counted."""

    unit: str
    """"chars" or "tokens"."""
    least: int | None = None
    most: int | None = None

    def __call__(self, row: FilterRow) -> Drop | None:
        found = len(row.parts.completion) if self.unit == "chars" else _count(row.values)
        if self.least is not None and found < self.least:
            return Drop(filter="length", why=f"{found} {self.unit}, at least {self.least}")
        if self.most is not None and found > self.most:
            return Drop(filter="length", why=f"{found} {self.unit}, at most {self.most}")
        return None


def truncated(row: FilterRow) -> Drop | None:
    """Drops completions that ended because they were too long."""
    reason = row.values.get("finish_reason")
    return Drop(filter="truncated", why=f"finish_reason {reason}") if is_cut_short(reason) else None


def not_parsed(row: FilterRow) -> Drop | None:
    """Drops rows whose completion was not parsed."""
    value = row.values.get("parse_ok")
    if not isinstance(value, bool):
        raise FieldError("parse_ok", f"is {kind_of(value)}; `stillhouse data parse` writes it.")
    return None if value else Drop(filter="parse_ok", why=str(row.values.get("parse_reason")))


@dataclass(frozen=True, kw_only=True, slots=True)
class Repetition:
    """Completions whose runs of words are mostly new."""

    most: float
    """Largest share of runs of REPEATED_WORDS words that are there already, from 0 to 1."""

    def __call__(self, row: FilterRow) -> Drop | None:
        share = repeated_share(row)
        if share <= self.most:
            return None
        return Drop(filter="repetition", why=f"{share:.3f} of runs repeated, at most {self.most:g}")


def repeated_share(row: FilterRow) -> float:
    """Returns the share of runs of REPEATED_WORDS words of the completion that came before; 0 for a shorter text."""
    found = row.completion_words
    num_runs = len(found) - REPEATED_WORDS + 1
    if num_runs < 1:
        return 0.0
    distinct = {tuple(found[at : at + REPEATED_WORDS]) for at in range(num_runs)}
    return 1 - len(distinct) / num_runs


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanLogprob:
    """Completions that the teacher finds likely."""

    least: float
    """Smallest mean of the natural logarithm of the tokens' probabilities at temperature 1."""

    def __call__(self, row: FilterRow) -> Drop | None:
        value = row.values.get("mean_logprob")
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise FieldError(
                "mean_logprob", f"is {kind_of(value)}; `stillhouse generate --capture` writes it."
            )
        if value >= self.least:
            return None
        return Drop(filter="mean_logprob", why=f"{value:.3f}, at least {self.least:g}")


def _count(values: Mapping[str, Any]) -> int:
    value = values.get("num_tokens")
    if type(value) is not int or value < 0:
        raise FieldError("num_tokens", f"is {kind_of(value)}; `stillhouse generate --capture` writes it.")
    return value
