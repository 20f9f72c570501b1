"""Says when a run learns slowly because its teacher is slow: once for each window of steps of which most was waiting."""

from __future__ import annotations

from collections.abc import Mapping

import structlog

log = structlog.get_logger()

WINDOW_STEPS = 20
SHARE = 0.5
"""Of a window's time that may pass with waiting before it is said."""
LEAST_S = 1.0
"""Shorter windows are not worth a word."""


class Waits:
    """Counts what metrics say of each step."""

    def __init__(self) -> None:
        self._waited_s = self._time_s = 0.0
        self._steps = 0

    def note(self, step: int, metrics: Mapping[str, float]) -> float | None:
        """The share of the window that ends with this step that was waiting, if it was said; else None."""
        if "train/step_time_s" not in metrics:
            return None
        self._waited_s += metrics.get("train/teacher_wait_s", 0.0)
        self._time_s += metrics["train/step_time_s"]
        self._steps += 1
        if self._steps < WINDOW_STEPS:
            return None
        share, waited_s = self._waited_s / max(self._time_s, 1e-9), self._waited_s
        self._waited_s = self._time_s = 0.0
        self._steps = 0
        if share <= SHARE or waited_s < LEAST_S:
            return None
        log.warning(
            "the student waits for its teacher",
            step=step,
            share=round(share, 2),
            waited_s=round(waited_s, 1),
            remedy="name more services in teachers.targets, keep answers in a cache, or raise teachers.prefetch_steps",
        )
        return share
