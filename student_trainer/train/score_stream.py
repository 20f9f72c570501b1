"""Asks the teacher ahead of the student: sequences go out and answers come in on a thread of their own.

Every sequence submitted is answered once, however often the stream breaks: after a break only what is unanswered is
sent again, and half an answer is thrown away. The caller bounds how much is in flight.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import numpy as np
import structlog
from numpy.typing import NDArray

from protos.errors import Reason, StillhouseError, from_rpc_error, from_status
from protos.stillhouse.v1.teacher_pb2 import DistributionConfig, ScoreRequest, ScoreResult, ScoreSequence
from protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from protos.tensor_codec import Distributions, decode_distributions, encode
from student_trainer.train.patience import POLL_S, Patience
from student_trainer.train.teacher_client import Teacher, backoff_s

log = structlog.get_logger()

SILENCE_S = 30.0
"""An open stream that answers nothing for so long counts as no teacher."""
MAX_ITEM_TIMEOUTS = 3
"""Times that a sequence may be answered with ITEM_TIMEOUT before the run gives up on it."""
MAX_FRUITLESS_BREAKS = 5
"""Streams in a row that may end with an internal error and without an answer."""
CLOSE_S = 5.0
"""Time that the thread gets to end."""

# What a broken connection or a restarting service looks like; anything else will not go away by asking again.
_PASSING = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    }
)
_SUSPICIOUS = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item:
    token_ids: NDArray[np.int32]
    start: int
    place: str
    query_token_ids: NDArray[np.int32] | None

    @property
    def num_rows(self) -> int:
        return len(self.token_ids) - self.start


class ScoreStream:
    """A teacher's answers to sequences, by the ids that the caller gives them."""

    def __init__(self, teacher: Teacher, config: DistributionConfig) -> None:
        """Starts the thread; `teacher` has been reached once."""
        self._teacher = teacher
        self._config = config
        self._changed = threading.Condition()
        self._pending: dict[int, _Item] = {}
        self._parts: dict[int, list[Distributions]] = {}
        self._answers: dict[int, Distributions | StillhouseError] = {}
        self._timeouts: dict[int, int] = {}
        self._outbox: _Outbox | None = None
        self._failure: BaseException | None = None
        self._broken_since: float | None = None
        self._why_broken = ""
        self._last_answer = time.monotonic()
        self._closed = False
        self._num_sent_before = 0
        self._thread = threading.Thread(target=self._run, name="score-stream", daemon=True)
        self._thread.start()

    @property
    def num_asked(self) -> int:
        """Sequences sent, repetitions included."""
        with self._changed:
            return self._num_sent_before + (self._outbox.num_sent if self._outbox else 0)

    def submit(
        self,
        sequence_id: int,
        token_ids: NDArray[np.int32],
        start: int,
        place: str,
        query_token_ids: NDArray[np.int32] | None = None,
    ) -> None:
        """Ask for the distributions at positions [start, T), with `query_token_ids` [T - start, Q] also for those ids.

        `place` is named in errors.
        """
        item = _Item(token_ids=token_ids, start=start, place=place, query_token_ids=query_token_ids)
        with self._changed:
            if not self._pending:
                self._last_answer = time.monotonic()
            self._pending[sequence_id] = item
            if self._outbox is not None:
                self._outbox.put(sequence_id, item)
            self._changed.notify_all()

    def take(self, sequence_id: int, patience: Patience) -> Distributions:
        """The answer to a submitted sequence, waiting for it; each can be taken once.

        Raises:
            Stopped: the run shall stop.
            StillhouseError: what the teacher says of this sequence, with its file and row; or why there is no teacher.
        """
        while True:
            with self._changed:
                if sequence_id not in self._answers and self._failure is None:
                    self._changed.wait(POLL_S)
                answer = self._answers.pop(sequence_id, None)
                failure, since, why = self._failure, self._silent_since(), self._why_broken
            if isinstance(answer, StillhouseError):
                raise answer
            if answer is not None:
                patience.clear()
                return answer
            if failure is not None:
                raise failure
            patience.check(since, why)

    def close(self) -> None:
        """Ends the stream and the thread; what is unanswered is dropped."""
        with self._changed:
            self._closed = True
            if self._outbox is not None:
                self._outbox.close()
            self._changed.notify_all()
        self._thread.join(CLOSE_S)

    def _silent_since(self) -> float | None:
        if self._broken_since is not None:
            return self._broken_since
        return self._last_answer if time.monotonic() - self._last_answer > SILENCE_S else None

    def _run(self) -> None:
        """The thread: one stream after the other until closed. What it cannot mend, the next `take` raises."""
        fruitless = attempt = 0
        try:
            while not self._closed:
                answered_before = self._last_answer
                try:
                    self._stream(self._teacher.reach())
                except StillhouseError as error:
                    if self._closed:
                        return
                    if error.code not in _PASSING:
                        raise
                    progressed = self._last_answer != answered_before
                    attempt = 0 if progressed else attempt + 1
                    fruitless = 0 if progressed or error.code not in _SUSPICIOUS else fruitless + 1
                    if fruitless >= MAX_FRUITLESS_BREAKS:
                        raise
                    self._pause(attempt, error)
        except BaseException as error:
            log.warning("the stream to the teacher ended", error=str(error))
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _pause(self, attempt: int, error: StillhouseError) -> None:
        with self._changed:
            if self._broken_since is None:
                self._broken_since = time.monotonic()
                log.warning("the stream to the teacher broke", why=error.message)
            self._why_broken = error.message
            self._changed.wait_for(lambda: self._closed, backoff_s(attempt, error))

    def _stream(self, stub: TeacherServiceStub) -> None:
        """One stream, until it breaks; always raises unless closed."""
        target = self._teacher.config.targets[0]
        outbox = _Outbox(self._config, self._teacher.config.adapter)
        with self._changed:
            self._parts.clear()
            for sequence_id, item in self._pending.items():
                outbox.put(sequence_id, item)
            self._outbox = outbox
        try:
            call = stub.Score(iter(outbox))
            outbox.on_close(call.cancel)
            with self._changed:
                self._broken_since = None
            for response in call:
                for result in response.results:
                    self._accept(result)
        except grpc.RpcError as error:
            raise from_rpc_error(error, target=target, service="teacher") from error
        finally:
            with self._changed:
                self._outbox = None
                self._num_sent_before += outbox.num_sent
            outbox.close()
        if not self._closed:
            raise StillhouseError(
                Reason.TEACHER_UNREACHABLE, f"The teacher at {target} ended the stream; it may be restarting."
            )

    def _accept(self, result: ScoreResult) -> None:
        """Takes in one part of an answer. Raises StillhouseError for an answer that asks to come again later."""
        sequence_id = result.sequence_id
        item = self._pending.get(sequence_id)
        if item is None:
            return
        answer: Distributions | StillhouseError
        if result.HasField("error"):
            answer = self._item_error(sequence_id, item, from_status(result.error))
        else:
            parts = self._parts.setdefault(sequence_id, [])
            parts.append(
                decode_distributions(
                    result.distributions,
                    vocab_size=self._teacher.info.vocab_size,
                    max_rows=item.num_rows,
                    max_top_k=self._config.top_k,
                )
            )
            if not result.last:
                return
            answer = _whole(Distributions.concat(parts), item)
        with self._changed:
            self._parts.pop(sequence_id, None)
            del self._pending[sequence_id]
            self._answers[sequence_id] = answer
            self._last_answer = time.monotonic()
            self._changed.notify_all()

    def _item_error(self, sequence_id: int, item: _Item, error: StillhouseError) -> StillhouseError:
        """The error as the caller gets it; raises it if the sequence is to be sent again on another stream."""
        timeouts = self._timeouts.get(sequence_id, 0)
        if error.retryable and timeouts < MAX_ITEM_TIMEOUTS:
            if error.reason is Reason.ITEM_TIMEOUT:
                self._timeouts[sequence_id] = timeouts + 1
            raise error
        return StillhouseError(
            error.reason,
            f"{item.place}: {error.message}",
            metadata={**error.metadata, "place": item.place},
        )


class _Outbox:
    """The requests of one stream: the configuration, then sequences as they are submitted."""

    def __init__(self, config: DistributionConfig, adapter: str) -> None:
        self._config = config
        self._adapter = adapter
        self._items: deque[tuple[int, _Item]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._cancel: object = None
        self.num_sent = 0

    def put(self, sequence_id: int, item: _Item) -> None:
        with self._changed:
            self._items.append((sequence_id, item))
            self._changed.notify()

    def on_close(self, cancel: object) -> None:
        """What ends the call whose requests these are."""
        with self._changed:
            self._cancel = cancel
            closed = self._closed
        if closed and callable(cancel):
            cancel()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            cancel = self._cancel
            self._changed.notify()
        if callable(cancel):
            cancel()

    def __iter__(self) -> Iterator[ScoreRequest]:
        yield ScoreRequest(config=self._config)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._closed)
                if self._closed:
                    return
                sequence_id, item = self._items.popleft()
                self.num_sent += 1
            yield ScoreRequest(
                sequence=ScoreSequence(
                    sequence_id=sequence_id,
                    token_ids=encode(item.token_ids),
                    start=item.start,
                    adapter=self._adapter,
                    query_token_ids=None if item.query_token_ids is None else encode(item.query_token_ids),
                )
            )


def _whole(answer: Distributions, item: _Item) -> Distributions:
    """The answer, if it speaks of every position that was asked for."""
    if answer.start != item.start or answer.num_rows != item.num_rows:
        raise StillhouseError(
            Reason.TENSOR_INVALID,
            f"The teacher answered positions [{answer.start}, {answer.start + answer.num_rows}) of {item.place}; "
            f"[{item.start}, {len(item.token_ids)}) was asked for. Bring both sides to the same version of Stillhouse.",
        )
    if item.query_token_ids is not None:
        found = None if answer.query_logprobs is None else answer.query_logprobs.shape
        if found != item.query_token_ids.shape:
            raise StillhouseError(
                Reason.TENSOR_INVALID,
                f"The teacher answered {found} queried tokens of {item.place}; {item.query_token_ids.shape} were asked for. "
                "Bring both sides to the same version of Stillhouse.",
            )
    return answer
