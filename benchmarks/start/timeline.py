"""Stages of a start, out of the times at which a program's log lines were written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """The time up to a line of a log."""

    name: str
    at_s: float
    """Seconds since the start."""
    seconds: float
    """Seconds since the stage before."""


def timeline(log: str, began_s: float, ended_s: float, end: str) -> list[Stage]:
    """The stages of a log between two times, in seconds since the epoch; the last one is called `end`."""
    marks = [(at_s, name) for at_s, name in _lines(log) if began_s <= at_s <= ended_s]
    stages: list[Stage] = []
    before_s = began_s
    for at_s, name in [*sorted(marks), (ended_s, end)]:
        stages.append(Stage(name=name, at_s=at_s - began_s, seconds=at_s - before_s))
        before_s = at_s
    return stages


def longest(stages: Sequence[Stage], share: float = 1 / 3) -> list[Stage]:
    """The longest stages, which take `share` of the time together."""
    total = sum(each.seconds for each in stages)
    found: list[Stage] = []
    for stage in sorted(stages, key=lambda each: -each.seconds):
        if sum(each.seconds for each in found) >= share * total:
            break
        found.append(stage)
    return found


def _lines(log: str) -> Iterator[tuple[float, str]]:
    for line in log.splitlines():
        try:
            values = json.loads(line)
            yield (
                datetime.fromisoformat(values["ts"].replace("Z", "+00:00")).timestamp(),
                str(values["event"]),
            )
        except (ValueError, KeyError, TypeError):
            continue  # a library's own line
