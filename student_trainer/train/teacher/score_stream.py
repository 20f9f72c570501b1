"""Asks a teacher ahead of the student: sequences go out and answers come in on threads of their own.

Every sequence submitted is answered once, however often a stream breaks: after a break only what is unanswered is sent
again, to whichever service of the teacher has room, and half an answer is thrown away. The caller bounds what is in flight.
"""

from __future__ import annotations

from collections.abc import Iterator

from stillhouse.protos.errors import Reason, StillhouseError, from_status
from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    DistributionConfig,
    ScoreRequest,
    ScoreResult,
    ScoreSequence,
)
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from stillhouse.protos.tensors.distributions import Distributions, decode_distributions, encode
from stillhouse.student_trainer.train.teacher.dispatcher import Lane, Lanes
from stillhouse.student_trainer.train.teacher.query import TeacherQuery
from stillhouse.student_trainer.train.teacher.teacher import TeacherClient


class ScoreStream(Lanes[TeacherQuery, Distributions]):
    """A teacher's answers to sequences, by the ids that the caller gives them: one stream to each of its services."""

    def __init__(self, teacher: TeacherClient, config: DistributionConfig) -> None:
        """Starts the threads; `teacher` has been reached once."""
        super().__init__(teacher, name="score-stream")
        self._config = config
        self._start()

    def submit(self, sequence_id: int, asked: TeacherQuery) -> None:
        """Ask for the distributions of a sequence."""
        self._submit(sequence_id, asked)

    def _ready(self, lane: Lane) -> bool:  # noqa: ARG002 - a stream is opened before there is anything to send
        return not self._closed

    def _serve(self, lane: Lane, stub: TeacherServiceStub) -> None:
        """One stream, until it breaks; always raises unless closed."""
        requests = _Requests()
        call = stub.Score(self._requests(lane, requests))
        with self._lock:
            lane.calls.add(call)
            closed = self._closed
        parts: dict[int, list[Distributions]] = {}
        try:
            if closed:
                return
            for response in call:
                for result in response.results:
                    self._accept(lane, result, parts)
        finally:
            call.cancel()
            with self._lock:
                lane.calls.discard(call)
                requests.ended = True
                lane.work.notify_all()
        if not self._closed:
            raise StillhouseError(
                Reason.TEACHER_UNREACHABLE,
                f"The teacher at {lane.endpoint.target} ended the stream; it may be restarting.",
            )

    def _requests(self, lane: Lane, requests: _Requests) -> Iterator[ScoreRequest]:
        """The configuration, then sequences as they are given to the lane; gRPC reads it on a thread of its own."""
        yield ScoreRequest(config=self._config)
        while True:
            with self._lock:
                while not (lane.queue or requests.ended):
                    lane.work.wait()
                if requests.ended:
                    return
                sequence_id = lane.queue.popleft()
                asked = self._pieces.get(sequence_id)
                if asked is None or self._owner.get(sequence_id) is not lane:
                    continue
                lane.num_sent += 1
            queried = asked.query_token_ids
            yield ScoreRequest(
                sequence=ScoreSequence(
                    sequence_id=sequence_id,
                    token_ids=encode(asked.token_ids),
                    start=asked.start,
                    adapter=self._teacher.config.adapter,
                    query_token_ids=None if queried is None else encode(queried),
                )
            )

    def _accept(self, lane: Lane, result: ScoreResult, parts: dict[int, list[Distributions]]) -> None:
        """Takes in one part of an answer; `parts` are the others of this stream. Raises StillhouseError for an answer that asks to come again later."""
        sequence_id = result.sequence_id
        asked = self._pieces.get(sequence_id)
        if asked is None or self._owner.get(sequence_id) is not lane:
            return
        if result.HasField("error"):
            self._finish(sequence_id, self._refusal(sequence_id, asked, from_status(result.error)))
            return
        part = decode_distributions(
            result.distributions,
            vocab_size=self._teacher.info.vocab_size,
            max_rows=asked.num_rows,
            max_top_k=self._config.top_k,
        )
        if not result.last:
            parts.setdefault(sequence_id, []).append(part)
            return
        before = parts.pop(sequence_id, [])
        self._finish(sequence_id, _whole(Distributions.concat([*before, part]), asked))


class _Requests:
    """Whether the requests of one stream are over."""

    ended = False


def _whole(answer: Distributions, asked: TeacherQuery) -> Distributions:
    """The answer, if it speaks of every position that was asked for."""
    if answer.start != asked.start or answer.num_rows != asked.num_rows:
        raise StillhouseError(
            Reason.TENSOR_INVALID,
            f"The teacher answered positions [{answer.start}, {answer.start + answer.num_rows}) of {asked.place}; "
            f"[{asked.start}, {len(asked.token_ids)}) was asked for. Bring both sides to the same version of Stillhouse.",
        )
    if asked.query_token_ids is not None:
        found = None if answer.query_logprobs is None else answer.query_logprobs.shape
        if found != asked.query_token_ids.shape:
            raise StillhouseError(
                Reason.TENSOR_INVALID,
                f"The teacher answered {found} queried tokens of {asked.place}; {asked.query_token_ids.shape} were asked for. "
                "Bring both sides to the same version of Stillhouse.",
            )
    return answer
