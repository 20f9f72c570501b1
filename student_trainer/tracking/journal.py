"""Reads new points of a run's metrics: each metric of a step once, also where a resumed attempt takes steps again."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.tracking.place import Place
from stillhouse.student_trainer.tracking.tracker import Point


def read_points(run_dir: RunDir, place: Place) -> Sequence[Point]:
    """The points after `place`, which moves behind them; at most as many as one read of the journal holds.

    Steps never fall: those below the highest one were sent by an earlier attempt.
    """
    lines, place.offset = run_dir.read_lines("metrics.jsonl", place.offset)
    points = []
    for line in lines:
        point = _point(line)
        if point is None or point.step < place.step:
            continue
        if point.step > place.step:
            place.step, place.names = point.step, []
        new = {name: value for name, value in point.values.items() if name not in place.names}
        place.names += new
        if new:
            points.append(Point(step=point.step, time_ms=point.time_ms, values=new))
    return points


def _point(line: dict[str, Any]) -> Point | None:
    try:
        time_ms = round(datetime.fromisoformat(line["time"]).timestamp() * 1000)
        return Point(step=int(line["step"]), time_ms=time_ms, values=dict(line["values"]))
    except (KeyError, TypeError, ValueError):
        return None
