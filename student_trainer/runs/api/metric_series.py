"""Metric series: without rolled-back points, downsampled for plots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from stillhouse.protos.stillhouse.v1.run_pb2 import MetricPoint, MetricSeries

Point = tuple[int, float]
"""Step and value."""


def to_series(points: Iterable[MetricPoint], *, keys: Collection[str], max_points: int) -> list[MetricSeries]:
    """One series per metric, sorted by name; all of them if `keys` is empty.

    `points` are in order of measurement.
    """
    columns: defaultdict[str, list[Point]] = defaultdict(list)
    for point in points:
        for key, value in point.values.items():
            if not keys or key in keys:
                _append(columns[key], (point.step, value))
    return [_series(key, thin(columns[key], max_points)) for key in sorted(columns)]


def _append(column: list[Point], point: Point) -> None:
    """Appends a point; earlier points at its step or later were rolled back and go."""
    while column and column[-1][0] >= point[0]:
        column.pop()
    column.append(point)


def thin(column: Sequence[Point], max_points: int) -> list[Point]:
    """Downsamples to `max_points`: first and last point, and minimum and maximum of equal parts between.

    Spikes stay visible, which a stride would hide.
    """
    if len(column) <= max_points:
        return list(column)
    if max_points < 4:
        return list(column[len(column) - max_points :])
    inner, parts = column[1:-1], (max_points - 2) // 2
    kept: list[Point] = [column[0]]
    for part in range(parts):
        bucket = inner[part * len(inner) // parts : (part + 1) * len(inner) // parts]
        extremes = {min(bucket, key=_value), max(bucket, key=_value)}
        kept.extend(sorted(extremes))
    return [*kept, column[-1]]


def _value(point: Point) -> float:
    return point[1]


def _series(key: str, column: Sequence[Point]) -> MetricSeries:
    return MetricSeries(key=key, steps=[step for step, _ in column], values=[value for _, value in column])
