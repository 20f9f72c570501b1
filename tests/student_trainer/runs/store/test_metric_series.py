"""Metric series for plots, and the small curve that lists show."""

from __future__ import annotations

import random

import pytest

from stillhouse.protos.stillhouse.v1.run_pb2 import MetricPoint, MetricSeries
from stillhouse.student_trainer.runs.store.loss_curve import MOST_POINTS, extended
from stillhouse.student_trainer.runs.store.metric_series import thin, to_series


def points(*values: tuple[int, int, float]) -> list[MetricPoint]:
    return [MetricPoint(attempt=attempt, step=step, values={"a": value}) for attempt, step, value in values]


def test_the_last_attempt_counts_after_a_rollback() -> None:
    measured = points((1, 1, 1.0), (1, 2, 2.0), (1, 3, 3.0), (1, 4, 4.0), (2, 3, 30.0))
    (series,) = to_series(measured, keys=(), max_points=100)
    assert (list(series.steps), list(series.values)) == ([1, 2, 3], [1.0, 2.0, 30.0])


def test_a_rollback_of_one_metric_leaves_the_others() -> None:
    measured = [*points((1, 1, 1.0), (1, 2, 2.0)), MetricPoint(step=2, attempt=2, values={"b": 5.0})]
    series = {each.key: list(each.steps) for each in to_series(measured, keys=(), max_points=100)}
    assert series == {"a": [1, 2], "b": [2]}
    assert [each.key for each in to_series(measured, keys={"b"}, max_points=100)] == ["b"]


@pytest.mark.parametrize("max_points", [1, 2, 3, 4, 5, 50, 999, 1000, 1001])
def test_downsampling_keeps_order_ends_and_spikes(max_points: int) -> None:
    generator = random.Random(0)
    column = [(step, generator.random()) for step in range(1000)]
    column[437] = (437, 9.0)
    kept = thin(column, max_points)
    assert len(kept) <= max_points
    assert kept == sorted(kept)
    assert set(kept) <= set(column)
    assert kept[-1] == column[-1]
    if max_points >= 4:
        assert kept[0] == column[0]
        assert (437, 9.0) in kept


def losses(*steps: int) -> list[MetricPoint]:
    return [MetricPoint(step=step, values={"train/loss": 1 / step}) for step in steps]


def test_the_small_curve_spans_the_run_and_ends_with_its_newest_loss() -> None:
    stored: bytes | None = None
    for step in range(1, 5000):
        stored = extended(stored, losses(step))
        curve = MetricSeries.FromString(stored or b"")
        assert (curve.steps[0], curve.steps[-1], curve.values[-1]) == (1, step, 1 / step)
        assert len(curve.steps) <= MOST_POINTS
    distances = [later - earlier for earlier, later in zip(curve.steps[:-2], curve.steps[1:-1], strict=True)]
    assert len(curve.steps) > MOST_POINTS // 3
    assert max(distances) < 8 * min(distances)


def test_the_small_curve_follows_a_rollback_and_leaves_out_what_is_no_number() -> None:
    stored = extended(extended(None, losses(*range(1, 40))), losses(20, 21))
    assert list(MetricSeries.FromString(stored or b"").steps) == list(range(1, 22))
    no_number = [
        MetricPoint(step=22, values={"train/loss": float("nan")}),
        MetricPoint(step=23, values={"a": 1}),
    ]
    assert extended(stored, no_number) is stored
