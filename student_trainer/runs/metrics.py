"""What the run service shows Prometheus: runs by state, the queue, devices, attempts and learnt tokens, read from the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from stillhouse.protos.telemetry.metrics import MetricSample
from stillhouse.student_trainer.runs.store.database import DatabaseThread
from stillhouse.student_trainer.runs.store.run_state import state_name
from stillhouse.student_trainer.runs.store.store import Store
from stillhouse.student_trainer.runs.supervision.device_slots import DeviceSlots

TIMEOUT_S = 5.0
"""How long the page waits for the store."""
RUN_READINGS: Mapping[str, tuple[str, str]] = {
    "train/step_time_s": ("run_step_seconds", "Time of the last step, with the wait for its data."),
    "train/teacher_wait_s": ("run_teacher_wait_seconds", "Of that, what the student waited for a teacher."),
    "teacher/outstanding": (
        "run_teacher_in_flight",
        "Sequences and prompts that teachers have not answered.",
    ),
    "teacher/outstanding_tokens": ("run_teacher_in_flight_tokens", "Tokens of these."),
    "teacher/asked_again": (
        "run_teacher_asked_again",
        "Sequences and prompts that a broken service left unanswered.",
    ),
    "teacher/breaks": ("run_teacher_breaks", "Streams and calls to teachers that broke."),
    "train/rollouts_dropped": ("run_rollouts_stale", "Texts of the student that were too old to learn from."),
    "cache/found": ("run_cache_hits", "Answers that came out of a cache."),
    "cache/missed": ("run_cache_misses", "Answers that a cache lacked, and a teacher gave."),
    "device/memory_bytes": (
        "run_device_memory_bytes",
        "Memory that the training process holds on its device.",
    ),
    "device/memory_peak_bytes": ("run_device_memory_peak_bytes", "The most that its tensors took of it."),
}
"""Metric of a run to name and help of its reading; what the process counts begins again with each attempt."""


class RunMetrics:
    """Takes the readings; called from the thread that serves the page."""

    def __init__(self, store: Store, db: DatabaseThread, slots: DeviceSlots) -> None:
        self._store = store
        self._db = db
        self._slots = slots

    def __call__(self) -> Iterator[MetricSample]:
        """The readings as they are at present."""
        totals = self._db.submit(self._store.totals).result(TIMEOUT_S)
        for state, number in totals.states.items():
            yield MetricSample(
                name="runs", help="Runs by state.", value=number, labels={"state": state_name(state).lower()}
            )
        yield MetricSample(
            name="oldest_queued_seconds",
            help="How long the first run of the queue has waited; 0 if there is none.",
            value=totals.oldest_queued_s,
        )
        yield MetricSample(
            name="waiting_for_teacher",
            help="Live runs that make no progress because no teacher answers.",
            value=totals.waiting_for_teacher,
        )
        yield MetricSample(
            name="run_tokens_per_second",
            help="Completion tokens learnt from in a second, lately, by all live runs.",
            value=totals.tokens_per_second,
        )
        yield MetricSample(
            name="trained_tokens",
            help="Completion tokens learnt from by the runs that the store knows.",
            value=totals.trained_tokens,
            kind="counter",
        )
        yield MetricSample(
            name="attempts", help="Training processes started.", value=totals.attempts, kind="counter"
        )
        yield MetricSample(
            name="attempts_retried",
            help="Of these, those that followed an earlier one of the same run.",
            value=totals.retries,
            kind="counter",
        )
        for run_id, values in totals.live.items():
            for metric, (name, text) in RUN_READINGS.items():
                if metric in values:
                    yield MetricSample(name=name, help=text, value=values[metric], labels={"run": run_id})
        for kind, total, free in (
            ("gpu", len(self._slots.gpus), self._slots.num_free_gpus),
            ("cpu", self._slots.cpu_slots, self._slots.num_free_cpu),
        ):
            yield MetricSample(name="slots", help="Places for runs.", value=total, labels={"device": kind})
            yield MetricSample(
                name="slots_free", help="Places that no run has.", value=free, labels={"device": kind}
            )
