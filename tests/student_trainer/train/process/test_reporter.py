"""Reports of a run's pace come once a window, and only if something takes most of it or leaves services idle."""

from __future__ import annotations

import pytest

from stillhouse.student_trainer.train.process.reporter import WINDOW_STEPS, PaceMonitor


def _said(metrics: dict[str, float]) -> list[str]:
    """What is said in two windows of equal steps."""
    monitor = PaceMonitor()
    found = [monitor.record(step, metrics) for step in range(1, 2 * WINDOW_STEPS + 1)]
    assert all(not each for number, each in enumerate(found, 1) if number % WINDOW_STEPS)
    return [each for each in found if each]


@pytest.mark.parametrize(("waited_s", "said"), [(0.9, True), (0.4, False), (0.0, False)])
def test_most_of_a_window_spent_waiting_is_said_once(waited_s: float, said: bool) -> None:
    found = _said({"train/step_time_s": 1.0, "train/teacher_wait_s": waited_s})
    assert len(found) == (2 if said else 0)
    assert all(f"waits for its teacher {waited_s:.0%}" in each for each in found)


def test_evaluations_and_moments_are_no_waiting() -> None:
    assert not _said({"eval/kl": 1.0})
    assert not _said({"train/step_time_s": 0.01, "train/teacher_wait_s": 0.009})


@pytest.mark.parametrize(
    ("services", "texts_s", "waited_s", "idle", "says"),
    [
        (1, 0.7, 0.8, 0.02, "the rollout service is idle 2%: name more services"),
        (2, 0.05, 0.1, 0.32, "2 rollout services write 1.5 times what the run takes, as training takes 90%"),
        (3, 0.05, 0.5, 0.5, "3 rollout services write 2.0 times what the run takes"),
        (1, 0.05, 0.1, 0.32, ""),
        (1, 0.2, 0.4, 0.13, "with a larger max_staleness they write"),
        (2, 0.05, 0.1, 0.08, ""),
        # A process that writes by itself has no service to wait for.
        (0, 3.0, 0.1, 0.0, ""),
    ],
)
def test_services_that_are_too_many_or_too_few_are_told(
    services: int, texts_s: float, waited_s: float, idle: float, says: str
) -> None:
    metrics = {"train/step_time_s": 1.0, "train/teacher_wait_s": waited_s, "train/rollout_time_s": texts_s}
    if services:
        metrics |= {"train/rollout_services": services, "train/rollout_idle": idle}
    found = _said(metrics)
    assert [says in each for each in found] == ([True, True] if says else [])
