"""The pace of a run: how its steps spend their time, from its metrics, and advice; the same words in logs, commands and benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

STEP, TEACHER_WAIT = "train/step_time_s", "train/teacher_wait_s"
TEXTS, NUM_SERVICES, IDLE = "train/rollout_time_s", "train/rollout_services", "train/rollout_idle"
NAMES = (STEP, TEACHER_WAIT, TEXTS, NUM_SERVICES, IDLE)

MAX_WAIT_SHARE = 0.5
"""Share of a step spent waiting above which that is worth saying."""
MAX_IDLE = 0.1
"""Share of its time that a rollout service may be idle, and of a step that texts may be waited for, unsaid."""


class Pace(NamedTuple):
    """Mean seconds of a step, in parts."""

    texts_s: float
    """Until the student's texts are there."""
    teacher_s: float
    """Until the targets are there, after that."""
    training_s: float
    num_services: int
    """Rollout services; 0 if the training process writes."""
    idle: float
    """Share of the time in which a rollout service has nothing to write."""

    @property
    def step_s(self) -> float:
        """Seconds of the whole step."""
        return self.texts_s + self.teacher_s + self.training_s

    @property
    def slowest(self) -> str:
        """The part that takes most of a step."""
        parts = {"texts": self.texts_s, "teacher": self.teacher_s, "training": self.training_s}
        return max(parts, key=lambda name: parts[name])

    @property
    def advice(self) -> str:
        """A sentence that says what to change; empty if nothing is to be said."""
        number = self.num_services
        waits = self.texts_s > MAX_IDLE * self.step_s
        services = "the rollout service" if number == 1 else f"each of {number} rollout services"
        if number and self.texts_s > MAX_WAIT_SHARE * self.step_s:
            return (
                f"The student waits for its texts {self.texts_s / self.step_s:.0%} of the time, and {services} is idle "
                f"{self.idle:.0%}: name more services in rollout_targets."
            )
        if self.teacher_s > MAX_WAIT_SHARE * self.step_s:
            return (
                f"The student waits for its teacher {self.teacher_s / self.step_s:.0%} of the time: name more services in "
                "teachers.targets, cache teacher outputs, or raise teachers.prefetch_steps."
            )
        if number and self.idle > MAX_IDLE and waits:
            return (
                f"The student waits for its texts {self.texts_s / self.step_s:.0%} of the time, though {services} is idle "
                f"{self.idle:.0%}: with a larger max_staleness they write while the student waits for targets."
            )
        if number > 1 and self.idle > MAX_IDLE:
            return (
                f"{number} rollout services write {1 / max(1 - self.idle, 0.01):.1f} times what the run takes, as {self.slowest} "
                f"takes {max(self.teacher_s, self.training_s) / self.step_s:.0%} of its time: {number - 1} may do."
            )
        return ""

    def sentence(self) -> str:
        """One line, such as "1.50 s a step: 0.40 for texts, 0.30 for the teacher, 0.80 of training; rollout services idle 13 %"."""
        parts = [f"{self.texts_s:.2f} for texts"] if self.texts_s else []
        parts += [f"{self.teacher_s:.2f} for the teacher"] if self.teacher_s else []
        idle = f"; rollout services idle {100 * self.idle:.0f} %" if self.num_services else ""
        return (
            f"{self.step_s:.2f} s a step: {', '.join([*parts, f'{self.training_s:.2f} of training'])}{idle}"
        )


def pace_of(series: Mapping[str, Sequence[float]]) -> Pace | None:
    """The mean pace of some steps from their values by metric, of which others are left alone; None without a step."""
    mean = {name: statistics.fmean(series[name]) for name in NAMES if series.get(name)}
    if STEP not in mean:
        return None
    num_services = round(mean.get(NUM_SERVICES, 0.0))
    texts_s = mean.get(TEXTS, 0.0)
    waited_s = mean.get(TEACHER_WAIT, 0.0)
    # A process that writes by itself does so before the step's time begins.
    teacher_s = max(0.0, waited_s - texts_s) if num_services else waited_s
    return Pace(
        texts_s=texts_s,
        teacher_s=teacher_s,
        training_s=max(0.0, mean[STEP] - waited_s),
        num_services=num_services,
        idle=mean.get(IDLE, 0.0),
    )
