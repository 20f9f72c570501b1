"""Attempts and events of a run on an axis of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from google.protobuf.timestamp_pb2 import Timestamp

from stillhouse.client.web.pages.run_summary import CONDITIONS
from stillhouse.client.web.pages.text import precise_duration
from stillhouse.protos.stillhouse.v1.run_pb2 import Attempt, Run, RunChange

STATES = {
    Run.STATE_PENDING: "queued",
    Run.STATE_STARTING: "attempt starts",
    Run.STATE_RUNNING: "training begins",
    Run.STATE_STOPPING: "stop requested",
    Run.STATE_STOPPED: "stopped",
    Run.STATE_COMPLETED: "completed",
    Run.STATE_FAILED: "failed",
}
_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
MOST_TICKS = 6
LISTED = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """An attempt, from `left` percent of the axis on."""

    left: float
    width: float
    number: int
    kind: str
    """"live", "ended" or "failed"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A change of the run."""

    left: float
    """Percent of the axis."""
    time: Timestamp
    text: str
    step: int
    kind: str
    """"state", "wait" or "checkpoint"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """Bars, events and ticks of the picture."""

    bars: Sequence[Bar]
    events: Sequence[Event]
    ticks: Sequence[tuple[float, str]]
    """Percent of the axis, and the time since the run's creation."""

    @property
    def newest(self) -> Sequence[Event]:
        """The last LISTED events, newest first."""
        return self.events[: -LISTED - 1 : -1]


def timeline_of(run: Run) -> Timeline | None:
    """The timeline from a run's creation to its end, or to the present; None without the time of its creation."""
    if not run.create_time.seconds:
        return None
    start = _seconds(run.create_time)
    marks = [_seconds(each.time) for each in run.history]
    end = _seconds(run.end_time) if run.end_time.seconds else time.time()
    span = max(end, *marks) - start or 1.0

    def place(seconds: float) -> float:
        return round(100 * min(1.0, max(0.0, (seconds - start) / span)), 2)

    return Timeline(
        bars=[_bar(each, place, end) for each in run.attempts],
        events=[
            Event(left=place(_seconds(each.time)), time=each.time, text=text, step=each.step, kind=kind)
            for each, kind, text in _told(run.history)
        ],
        ticks=list(_ticks(span)),
    )


def _bar(attempt: Attempt, place: Callable[[float], float], present: float) -> Bar:
    ended = bool(attempt.end_time.seconds)
    left = place(_seconds(attempt.start_time))
    right = place(_seconds(attempt.end_time) if ended else present)
    failed = bool(attempt.exit_code or attempt.signal or attempt.error.message)
    kind = ("failed" if failed else "ended") if ended else "live"
    return Bar(left=left, width=round(max(0.4, right - left), 2), number=attempt.number, kind=kind)


def _told(history: Sequence[RunChange]) -> Iterator[tuple[RunChange, str, str]]:
    """Change, kind and text of what differs from the change before."""
    before = RunChange()
    for each in history:
        if each.state != before.state:
            yield each, "state", STATES.get(each.state, "unknown state")
        if each.condition != before.condition and each.condition:
            yield each, "wait", CONDITIONS.get(each.condition, "makes no progress")
        elif each.condition != before.condition and each.state == before.state:
            yield each, "wait", "goes on"
        if each.checkpoint_step != before.checkpoint_step:
            yield each, "checkpoint", f"checkpoint at step {each.checkpoint_step:,}"
        before = each


def _ticks(span_s: float) -> Iterator[tuple[float, str]]:
    """Round times along the axis."""
    step_s = next((each for each in _STEPS_S if span_s / each <= MOST_TICKS), None)
    if step_s is None:
        step_s = 86400 * max(1, round(span_s / 86400 / MOST_TICKS))
    for number in range(int(span_s // step_s) + 1):
        yield round(100 * number * step_s / span_s, 2), precise_duration(number * step_s)


def _seconds(moment: Timestamp) -> float:
    return moment.seconds + moment.nanos / 1e9
