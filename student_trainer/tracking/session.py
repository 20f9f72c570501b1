"""One process's work for a tracker: open its run, send what is new until the run ends, close it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import structlog

from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.tracking.journal import read_points
from stillhouse.student_trainer.tracking.place import Place
from stillhouse.student_trainer.tracking.run_facts import (
    ENDED,
    links,
    new_tables,
    page_of,
    state_of,
    tracked_run,
    trackers_path,
)
from stillhouse.student_trainer.tracking.tracker import Tracker

log = structlog.get_logger()

POLL_S = 2.0
"""Between two looks at the run directory."""
OPEN_S, SEND_S, CLOSE_S = 180.0, 120.0, 600.0
"""Longest time of one call to the tracker's library, after which the process is taken for hung."""

POINTS_AT_ONCE = 200
"""Points of one call."""

Watch = Callable[[float], AbstractContextManager[None]]
"""Bounds the time of a block, in seconds."""


def place_path(run_dir: RunDir, kind: str) -> Path:
    """File of the place that the tracker `kind` has reached."""
    return trackers_path(run_dir) / f"{kind}.json"


class Session:
    """A tracker of one run, in one process."""

    def __init__(
        self, run_dir: RunDir, kind: str, tracker: Tracker, *, watch: Watch = lambda _: nullcontext()
    ) -> None:
        """Raises KeyError if the run has no such tracker; OSError and ValueError if its files cannot be read."""
        self._run_dir, self._kind, self._tracker, self._watch = run_dir, kind, tracker, watch
        self._run = tracked_run(run_dir, kind)
        self._run.folder.mkdir(parents=True, exist_ok=True)
        self._path = place_path(run_dir, kind)
        self._place = Place.load(self._path)

    def run(self, stop: Callable[[float], bool]) -> bool:
        """Returns True once the run has ended and the tracker has all of it, False if `stop` says so before.

        `stop` waits for up to its argument's seconds. Raises whatever the tracker's library does.
        """
        place = self._place
        began_s = time.monotonic()
        with self._watch(OPEN_S):
            place.id = self._tracker.open(self._run, place.id)
        if place.pending and not self._tracker.repeats_safely:
            log.warning("some points may be missing at the tracker", tracker=self._kind, step=place.step)
        place.pending, place.ended = False, ""
        place.save(self._path)
        log.info(
            "tracker opened", tracker=self._kind, id=place.id, seconds=round(time.monotonic() - began_s, 1)
        )
        while True:
            state = state_of(self._run_dir)  # before the look, so that an ended run is read to its end
            if self._send_new(is_over=state in ENDED):
                continue
            if state in ENDED:
                break
            if stop(POLL_S):
                with self._watch(CLOSE_S):
                    self._tracker.close("")
                return False
        self._end(state)
        return True

    def _send_new(self, *, is_over: bool) -> bool:
        """Sends new points and tables; True if there were any.

        A table waits for the points up to its step, which the journal may hold by now: trackers refuse steps that fall. It
        waits for none that will not come: `is_over` says that the run writes no more.
        """
        before = self._place.offset
        points = read_points(self._run_dir, self._place)
        if points:
            if not self._tracker.repeats_safely:  # better a gap than a step twice
                self._place.pending = True
                self._place.save(self._path)
            for begin in range(0, len(points), POINTS_AT_ONCE):
                with self._watch(SEND_S):
                    self._tracker.log(points[begin : begin + POINTS_AT_ONCE])
        moved = self._place.offset != before
        for table, key, digest in new_tables(self._run_dir, max(self._place.step, 0), self._place.tables):
            if table.of_step > self._place.step and (points or not is_over):
                continue
            with self._watch(SEND_S):
                self._tracker.add_table(table)
            self._place.tables[key] = digest
            moved = True
        if moved:
            self._place.pending = False
            self._place.save(self._path)
        return moved

    def _end(self, state: str) -> None:
        with self._watch(SEND_S):
            if state == "COMPLETED" and (found := links(self._run_dir)):
                self._tracker.add_links(found)
        with self._watch(CLOSE_S):
            self._tracker.close(state)
        self._place.ended = state
        self._place.save(self._path)
        log.info(
            "tracker closed",
            tracker=self._kind,
            state=state,
            step=self._place.step,
            page=page_of(self._run_dir),
        )
