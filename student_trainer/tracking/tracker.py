"""A tracker, and what it is told: points, tables, links and the end of a run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from stillhouse.student_trainer.config.resources import TrackerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Metrics of one step."""

    step: int
    time_ms: int
    """Milliseconds since 1970 at which the training process wrote them."""
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of examples."""

    name: str
    step: int
    """Step to log it at, which is not below that of any point before."""
    of_step: int
    """Step that it is of."""
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]

    @property
    def key(self) -> str:
        """Name that no other table of the run has: several may be logged at one step."""
        return f"{self.name}/{self.of_step}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """A run as trackers know it."""

    id: str
    """Id of the run here."""
    tracker: TrackerConfig
    folder: Path
    """Folder for the files of a tracker without a server."""
    name: str
    """Name for people."""
    settings: Mapping[str, Any]
    """Effective settings, nested as in the run file."""
    labels: Mapping[str, str] = field(default_factory=dict)

    def flat_settings(self) -> dict[str, str]:
        """The settings by path, such as "optimizer.learning_rate", as text."""
        return dict(_flat("", self.settings))


def _flat(path: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        below = value.items()
        return [pair for name, each in below for pair in _flat(f"{path}.{name}" if path else str(name), each)]
    if isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value):
        return [pair for at, each in enumerate(value) for pair in _flat(f"{path}[{at}]", each)]
    return [(path, str(list(value)) if isinstance(value, tuple) else str(value))]


class Tracker(Protocol):
    """One kind of tracker. Any method may raise whatever its library raises, or never return."""

    repeats_safely: bool
    """True if points that are logged twice count once."""

    def open(self, run: TrackedRun, known: str) -> str:
        """Begins or continues the tracker's run, whose id is `known` unless it is empty; returns the id."""
        ...

    def log(self, points: Sequence[Point]) -> None:
        """Adds points, whose steps never fall."""
        ...

    def add_table(self, table: Table) -> None:
        """Adds a table."""
        ...

    def add_links(self, links: Mapping[str, str]) -> None:
        """Adds places of the final model, by name."""
        ...

    def close(self, state: str) -> None:
        """Sends all that waits. `state` is COMPLETED, FAILED or STOPPED, or empty for a run that goes on."""
        ...


def tracker_of(kind: str) -> Tracker:
    """A new tracker. Raises ImportError if its library is not installed."""
    module = importlib.import_module(f"stillhouse.student_trainer.tracking.kinds.{kind}")
    return cast("Tracker", module.make())
