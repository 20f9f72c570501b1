"""The small picture of a run's loss in the list."""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.client.web.pages.text import number
from stillhouse.protos.stillhouse.v1.run_pb2 import MetricSeries

WIDTH, HEIGHT, MARGIN = 96.0, 24.0, 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sparkline:
    """A line within WIDTH x HEIGHT, and the sentence that says the same."""

    points: str
    """Coordinates, as an SVG polyline has them."""
    text: str


def sparkline_of(loss: MetricSeries) -> Sparkline | None:
    """The picture of a loss; None with fewer than two points."""
    if len(loss.steps) < 2:
        return None
    first, span = loss.steps[0], max(1, loss.steps[-1] - loss.steps[0])
    least, most = min(loss.values), max(loss.values)
    height = (most - least) or 1.0
    places = (
        (
            MARGIN + (WIDTH - 2 * MARGIN) * (step - first) / span,
            MARGIN + (HEIGHT - 2 * MARGIN) * (most - value) / height,
        )
        for step, value in zip(loss.steps, loss.values, strict=True)
    )
    return Sparkline(
        points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places),
        text=f"Loss from {number(loss.values[0])} to {number(loss.values[-1])}",
    )
