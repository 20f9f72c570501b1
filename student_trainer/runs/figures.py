"""What the run service shows Prometheus: runs by state, the queue, devices, attempts and learnt tokens, read from the store."""

from __future__ import annotations

from collections.abc import Iterator

from protos.metrics import Reading
from student_trainer.runs.database import DatabaseThread
from student_trainer.runs.slots import Slots
from student_trainer.runs.state import name_of
from student_trainer.runs.store import Store

TIMEOUT_S = 5.0
"""How long the page waits for the store."""


class Figures:
    """Takes the readings; called from the thread that serves the page."""

    def __init__(self, store: Store, db: DatabaseThread, slots: Slots) -> None:
        self._store = store
        self._db = db
        self._slots = slots

    def __call__(self) -> Iterator[Reading]:
        """The readings as they are at present."""
        totals = self._db.submit(self._store.totals).result(TIMEOUT_S)
        for state, number in totals.states.items():
            yield Reading(
                name="runs", help="Runs by state.", value=number, labels={"state": name_of(state).lower()}
            )
        yield Reading(
            name="oldest_queued_seconds",
            help="How long the first run of the queue has waited; 0 if there is none.",
            value=totals.oldest_queued_s,
        )
        yield Reading(
            name="waiting_for_teacher",
            help="Live runs that make no progress because no teacher answers.",
            value=totals.waiting_for_teacher,
        )
        yield Reading(
            name="run_tokens_per_second",
            help="Completion tokens learnt from in a second, lately, by all live runs.",
            value=totals.tokens_per_second,
        )
        yield Reading(
            name="trained_tokens",
            help="Completion tokens learnt from by the runs that the store knows.",
            value=totals.trained_tokens,
            kind="counter",
        )
        yield Reading(
            name="attempts", help="Training processes started.", value=totals.attempts, kind="counter"
        )
        yield Reading(
            name="attempts_retried",
            help="Of these, those that followed an earlier one of the same run.",
            value=totals.retries,
            kind="counter",
        )
        for kind, total, free in (
            ("gpu", len(self._slots.gpus), self._slots.num_free_gpus),
            ("cpu", self._slots.cpu_slots, self._slots.num_free_cpu),
        ):
            yield Reading(name="slots", help="Places for runs.", value=total, labels={"device": kind})
            yield Reading(
                name="slots_free", help="Places that no run has.", value=free, labels={"device": kind}
            )
