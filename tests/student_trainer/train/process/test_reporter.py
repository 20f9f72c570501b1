"""A slow teacher is warned of once a window, and only if waiting takes most of it."""

from __future__ import annotations

import pytest

from stillhouse.student_trainer.train.process.reporter import WINDOW_STEPS, TeacherWaitMonitor


@pytest.mark.parametrize(("waited_s", "said"), [(0.9, True), (0.4, False), (0.0, False)])
def test_most_of_a_window_spent_waiting_is_said_once(waited_s: float, said: bool) -> None:
    waits = TeacherWaitMonitor()
    metrics = {"train/step_time_s": 1.0, "train/teacher_wait_s": waited_s}
    found = [waits.record(step, metrics) for step in range(1, 2 * WINDOW_STEPS + 1)]
    shares = [share for share in found if share is not None]
    assert shares == ([pytest.approx(waited_s)] * 2 if said else [])
    assert (found[WINDOW_STEPS - 1] is not None) == said


def test_evaluations_and_moments_are_no_waiting() -> None:
    waits = TeacherWaitMonitor()
    short = {"train/step_time_s": 0.01, "train/teacher_wait_s": 0.009}
    assert all(waits.record(step, {"eval/kl": 1.0}) is None for step in range(WINDOW_STEPS))
    assert all(waits.record(step, short) is None for step in range(2 * WINDOW_STEPS))
