"""Prometheus metrics of the run service: runs by state, queue, devices, attempts and trained tokens, from the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from stillhouse.protos.telemetry.metrics import MetricSample
from stillhouse.student_trainer.runs.store.database import DatabaseThread
from stillhouse.student_trainer.runs.store.run_state import state_name
from stillhouse.student_trainer.runs.store.store import Store
from stillhouse.student_trainer.runs.supervision.device_slots import DeviceSlots

TIMEOUT_S = 5.0
"""Time that the metrics page waits for the store."""
RUN_READINGS: Mapping[str, tuple[str, str]] = {
    "train/step_time_s": ("run_step_seconds", "Time of the last step, waiting for data included."),
    "train/teacher_wait_s": ("run_teacher_wait_seconds", "Part of that spent waiting for a teacher."),
    "teacher/outstanding": (
        "run_teacher_in_flight",
        "Outstanding sequences and prompts at teachers.",
    ),
    "teacher/outstanding_tokens": (
        "run_teacher_in_flight_tokens",
        "Tokens of outstanding sequences and prompts.",
    ),
    "teacher/asked_again": (
        "run_teacher_asked_again",
        "Sequences and prompts requeued after a service failed.",
    ),
    "teacher/breaks": ("run_teacher_breaks", "Failed streams and calls to teachers."),
    "train/rollout_idle": (
        "run_rollout_services_idle",
        "Share of its time in which a rollout service has nothing to write.",
    ),
    "train/rollouts_dropped": ("run_rollouts_stale", "Rollouts dropped as stale."),
    "cache/found": ("run_cache_hits", "Teacher outputs read from a cache."),
    "cache/missed": ("run_cache_misses", "Teacher outputs missing in a cache and requested."),
    "device/memory_bytes": (
        "run_device_memory_bytes",
        "Device memory reserved by the training process.",
    ),
    "device/memory_peak_bytes": ("run_device_memory_peak_bytes", "Peak device memory of its tensors."),
}
"""Run metric to name and help of its sample; counts restart with each attempt."""


class RunMetrics:
    """Takes the samples; called from the thread that serves the metrics page."""

    def __init__(self, store: Store, db: DatabaseThread, slots: DeviceSlots) -> None:
        self._store = store
        self._db = db
        self._slots = slots

    def __call__(self) -> Iterator[MetricSample]:
        """The current samples."""
        totals = self._db.submit(self._store.totals).result(TIMEOUT_S)
        for state, number in totals.states.items():
            yield MetricSample(
                name="runs", help="Runs by state.", value=number, labels={"state": state_name(state).lower()}
            )
        yield MetricSample(
            name="oldest_queued_seconds",
            help="Time that the oldest queued run has waited; 0 if there is none.",
            value=totals.oldest_queued_s,
        )
        yield MetricSample(
            name="waiting_for_teacher",
            help="Live runs waiting for a teacher.",
            value=totals.waiting_for_teacher,
        )
        yield MetricSample(
            name="run_tokens_per_second",
            help="Completion tokens trained on per second by all live runs.",
            value=totals.tokens_per_second,
        )
        yield MetricSample(
            name="trained_tokens",
            help="Completion tokens trained on by all stored runs.",
            value=totals.trained_tokens,
            kind="counter",
        )
        yield MetricSample(
            name="attempts", help="Training processes started.", value=totals.attempts, kind="counter"
        )
        yield MetricSample(
            name="attempts_retried",
            help="Training processes started as a retry or resume.",
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
            yield MetricSample(name="slots", help="Slots for runs.", value=total, labels={"device": kind})
            yield MetricSample(name="slots_free", help="Free slots.", value=free, labels={"device": kind})
