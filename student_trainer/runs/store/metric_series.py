"""Metric series: without rolled-back points, downsampled for plots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from stillhouse.protos.stillhouse.v1.run_pb2 import MetricPoint, MetricSeries, QueryMetricsResponse

Point = tuple[int, float]
"""Step and value."""
Measured = MetricPoint | QueryMetricsResponse
"""One measurement, or a block of consecutive ones, downsampled."""


def to_series(
    measured: Iterable[Measured],
    *,
    keys: Collection[str] = (),
    start: int = 0,
    end: int | None = None,
    max_points: int,
) -> list[MetricSeries]:
    """One series per metric, sorted by name, of the steps in [start, end); of all metrics if `keys` is empty.

    `measured` is in order of measurement. Earlier points at a point's step or later were rolled back, and are left out.
    """
    columns: defaultdict[str, list[Point]] = defaultdict(list)
    for each in measured:
        if isinstance(each, MetricPoint):
            step = each.step
            for key, value in each.values.items():
                column = columns[key]
                _roll_back(column, step)
                column.append((step, value))
        else:
            for series in each.series:
                column = columns[series.key]
                _roll_back(column, series.steps[0])
                column.extend(zip(series.steps, series.values, strict=True))
    found = ((key, _between(columns[key], start, end)) for key in sorted(columns) if not keys or key in keys)
    return [_series(key, thin(column, max_points)) for key, column in found if column]


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


def _roll_back(column: list[Point], step: int) -> None:
    """Removes the points at `step` and later."""
    while column and column[-1][0] >= step:
        column.pop()


def _between(column: list[Point], start: int, end: int | None) -> list[Point]:
    if start <= 0 and end is None:
        return column
    return [each for each in column if start <= each[0] and (end is None or each[0] < end)]


def _value(point: Point) -> float:
    return point[1]


def _series(key: str, column: Sequence[Point]) -> MetricSeries:
    return MetricSeries(key=key, steps=[step for step, _ in column], values=[value for _, value in column])
