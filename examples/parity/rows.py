"""Rows of the parity table, each with the function that shows it; a row that is not shown fails the script."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from examples.parity.world import World

Show = Callable[[World], str]
"""Shows a row: returns the evidence in a few words, or raises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row."""

    id: str
    title: str
    show: Show


ROWS: dict[str, Row] = {}
"""Rows by id, in the order in which they run."""


def row(row_id: str, title: str) -> Callable[[Show], Show]:
    """Decorates the function that shows a row."""

    def add(show: Show) -> Show:
        assert row_id not in ROWS, row_id
        ROWS[row_id] = Row(id=row_id, title=title, show=show)
        return show

    return add


def check(condition: object, problem: object) -> None:
    """Raises AssertionError with `problem` unless `condition` holds; also where assertions are off."""
    if not condition:
        raise AssertionError(str(problem)[:2000])
