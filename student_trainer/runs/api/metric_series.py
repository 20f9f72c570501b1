"""Metric history as series: the last attempt counts after a rollback, and no more points than a plot can show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from stillhouse.protos.stillhouse.v1.run_pb2 import MetricPoint, MetricSeries

Point = tuple[int, float]
"""Step and value."""


def to_series(points: Iterable[MetricPoint], *, keys: Collection[str], max_points: int) -> list[MetricSeries]:
    """One series for each metric, by name; all of them if `keys` is empty.

    `points` come in the order in which they were measured.
    """
    columns: defaultdict[str, list[Point]] = defaultdict(list)
    for point in points:
        for key, value in point.values.items():
            if not keys or key in keys:
                _append(columns[key], (point.step, value))
    return [_series(key, thin(columns[key], max_points)) for key in sorted(columns)]


def _append(column: list[Point], point: Point) -> None:
    """Add a point; whatever was measured before at its step or a later one was rolled back."""
    while column and column[-1][0] >= point[0]:
        column.pop()
    column.append(point)


def thin(column: Sequence[Point], max_points: int) -> list[Point]:
    """At most `max_points` of the points: the first and the last, and between them the smallest and largest of equal parts.

    Spikes stay visible, which a plain stride would hide.
    """
    if len(column) <= max_points:
        return list(column)
    if max_points < 4:
        return list(column[len(column) - max_points :])
    inner, parts = column[1:-1], (max_points - 2) // 2
    kept: list[Point] = [column[0]]
    for part in range(parts):
        piece = inner[part * len(inner) // parts : (part + 1) * len(inner) // parts]
        extremes = {min(piece, key=_value), max(piece, key=_value)}
        kept.extend(sorted(extremes))
    return [*kept, column[-1]]


def _value(point: Point) -> float:
    return point[1]


def _series(key: str, column: Sequence[Point]) -> MetricSeries:
    return MetricSeries(key=key, steps=[step for step, _ in column], values=[value for _, value in column])
