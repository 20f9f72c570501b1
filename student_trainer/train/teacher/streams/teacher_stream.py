"""The base of the streams to a teacher: queries go out ahead of the student, and answers come in on a pool's threads."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Generic, TypeVar

import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.pool.replica import Loss, PoolOptions
from stillhouse.protos.rpc.pool.service_pool import Call, ServicePool
from stillhouse.student_trainer.train.process.waiting import TeacherWait
from stillhouse.student_trainer.train.teacher.endpoints import Endpoint, is_passing, is_suspicious
from stillhouse.student_trainer.train.teacher.teacher import TeacherClient

log = structlog.get_logger()

SILENCE_S = 30.0
"""Time without any answer that counts as no teacher."""
MAX_ITEM_TIMEOUTS = 3
"""ITEM_TIMEOUT answers after which a query is asked once more; the next one ends the run."""
MAX_FRUITLESS_BREAKS = 5
"""Breaks in a row without an answer, each looking like a bug, after which a service is not used as it is."""


Q = TypeVar("Q")
A = TypeVar("A")


class TeacherStream(abc.ABC, Generic[Q, A]):
    """Answers by the ids of their queries, however often services break; the caller bounds what is in flight."""

    def __init__(
        self, teacher: TeacherClient, *, name: str, cost_of: Callable[[Q], int], max_calls: int = 1
    ) -> None:
        """Starts the threads; `teacher` has been reached once, and `cost_of` a query is in tokens."""
        self._teacher = teacher
        options: PoolOptions[Q] = PoolOptions(
            name=name,
            cost_of=cost_of,
            max_calls=max_calls,
            max_attempts=MAX_ITEM_TIMEOUTS + 1,
            counts=lambda error: error.reason is Reason.ITEM_TIMEOUT,
            is_passing=_may_pass,
            silence_s=SILENCE_S,
        )
        self._pool: ServicePool[Q, A, Endpoint] = ServicePool(
            teacher.endpoints, self._serve, options, on_lost=_log_loss
        )

    @property
    def num_asked(self) -> int:
        """Queries sent, repetitions included."""
        return self._pool.num_sent

    def get_result(self, query_id: int, patience: TeacherWait) -> A:
        """Waits for the answer to a query; each can be got once.

        Raises:
            Stopped: the run shall stop.
            StillhouseError: a service's error for this query, with its file and row; or why there is no teacher.
        """
        return self._pool.get_result(query_id, patience)

    def close(self) -> None:
        """Ends calls and threads; what is unanswered is dropped."""
        self._pool.close()

    @abc.abstractmethod
    def _serve(self, endpoint: Endpoint, call: Call[Q, A]) -> None:
        """Makes one call to a service that was just checked. Raises StillhouseError when it breaks."""

    def _refuse(self, call: Call[Q, A], query_id: int, place: str, error: StillhouseError) -> None:
        """Takes in the error of one query. Raises it if the query is to be asked again later."""
        error = StillhouseError(
            error.reason,
            f"{place}: {error.message}",
            metadata={**error.metadata, "place": place},
            retry_after_s=error.retry_after_s,
        )
        if not error.retryable:
            call.answer(query_id, error)
        elif call.retry(query_id, error):
            raise error


def _may_pass(error: StillhouseError, num_same: int) -> bool:
    return is_passing(error) and not (is_suspicious(error) and num_same >= MAX_FRUITLESS_BREAKS)


def _log_loss(loss: Loss) -> None:
    if loss.was_open or not loss.is_passing:
        event = "a call to the teacher broke" if loss.is_passing else "a teacher's service is refused"
        log.warning(event, target=loss.target, why=loss.error.message, asked_again=loss.num_requeued)
