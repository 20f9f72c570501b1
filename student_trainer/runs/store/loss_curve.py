"""The small curve of a run's loss that lists show, kept with the run so that a list reads no metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable

from stillhouse.protos.stillhouse.v1.run_pb2 import MetricPoint, MetricSeries

METRIC = "train/loss"
MOST_POINTS = 64


def extended(stored: bytes | None, points: Iterable[MetricPoint]) -> bytes | None:
    """The curve, a serialised MetricSeries, with further points; `stored` itself if none of them has the loss.

    Rolled-back points go. Of more than MOST_POINTS about half stay, at equal distances; the newest always does.
    """
    new = [
        (each.step, each.values[METRIC])
        for each in points
        if METRIC in each.values and math.isfinite(each.values[METRIC])
    ]
    if not new:
        return stored
    curve = MetricSeries.FromString(stored) if stored else MetricSeries(key=METRIC)
    column = list(zip(curve.steps, curve.values, strict=True))
    for step, value in new:
        while column and column[-1][0] >= step:
            column.pop()
        close = len(column) > 1 and column[-1][0] - column[-2][0] < (step - column[0][0]) / (MOST_POINTS - 1)
        if close:
            column.pop()
        column.append((step, value))
        if len(column) > MOST_POINTS:
            column = _spread(column)
    made = MetricSeries(key=METRIC, steps=[step for step, _ in column], values=[value for _, value in column])
    return made.SerializeToString(deterministic=True)


def _spread(column: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """First and last point, and those between that are a half's share of the whole apart."""
    distance = (column[-1][0] - column[0][0]) / (MOST_POINTS // 2)
    kept = column[:1]
    for each in column[1:-1]:
        if each[0] - kept[-1][0] >= distance:
            kept.append(each)
    return [*kept, column[-1]]
