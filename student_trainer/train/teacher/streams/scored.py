"""Queries a teacher for distributions ahead of the student, over one Score stream to each of its services."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError, from_status
from stillhouse.protos.rpc.pool.service_pool import Call
from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    ClassDistribution,
    DistributionConfig,
    ScoreRequest,
    ScoreResult,
    ScoreSequence,
)
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.classes import decode_classes
from stillhouse.protos.tensors.differences import are_coded
from stillhouse.protos.tensors.distributions import Distributions, decode_distributions, encode
from stillhouse.protos.tensors.layout import encode_differences
from stillhouse.student_trainer.train.batching.collate import sent_states
from stillhouse.student_trainer.train.teacher.endpoints import Endpoint
from stillhouse.student_trainer.train.teacher.query import TeacherQuery
from stillhouse.student_trainer.train.teacher.streams.teacher_stream import TeacherStream
from stillhouse.student_trainer.train.teacher.teacher import TeacherClient


class ScoreStream(TeacherStream[TeacherQuery, Distributions]):
    """A teacher's distributions for sequences, by the ids that the caller gives them."""

    def __init__(self, teacher: TeacherClient, config: DistributionConfig) -> None:
        """Starts the threads; `teacher` has been reached once."""
        self._config = config
        super().__init__(teacher, name="score-stream", cost_of=lambda query: len(query.token_ids))

    def submit(self, sequence_id: int, asked: TeacherQuery) -> None:
        """Asks for the distributions of a sequence."""
        self._pool.put({sequence_id: asked})

    def _serve(self, endpoint: Endpoint, call: Call[TeacherQuery, Distributions]) -> None:
        """Keeps one stream open until it breaks or ends; half an answer is dropped with it."""
        parts: dict[int, list[Distributions]] = {}
        classes: dict[int, list[ClassDistribution]] = {}
        with endpoint.errors():
            coded = are_coded() and self._teacher.reads_coded_queries(endpoint.target)
            stream = endpoint.stub().Score(self._requests(call, encode_differences if coded else encode))
            call.on_cancel(stream.cancel)
            try:
                for response in stream:
                    for result in response.results:
                        if self._config.classes:
                            self._accept_classes(call, result, classes)
                        else:
                            self._accept(endpoint, call, result, parts)
            finally:
                stream.cancel()

    def _requests(
        self, call: Call[TeacherQuery, Distributions], encode_queried: Callable[[NDArray[np.int32]], Tensor]
    ) -> Iterator[ScoreRequest]:
        """Yields the configuration, then sequences as the service is given them; read by a thread of gRPC."""
        yield ScoreRequest(config=self._config)
        while (found := call.next_item()) is not None:
            sequence_id, asked = found
            queried, types = asked.query_token_ids, self._types(asked)
            yield ScoreRequest(
                sequence=ScoreSequence(
                    sequence_id=sequence_id,
                    token_ids=encode(asked.token_ids),
                    start=0 if self._config.classes else asked.start,
                    adapter=self._teacher.config.adapter,
                    query_token_ids=None if queried is None else encode_queried(queried),
                    token_type_ids=None if types is None else encode(types),
                )
            )

    def _types(self, asked: TeacherQuery) -> NDArray[np.int32] | None:
        """Segments of a pair of texts, for a teacher that tells them apart."""
        return asked.token_type_ids if self._teacher.info.num_token_types > 1 else None

    def _open_query(
        self, call: Call[TeacherQuery, Distributions], result: ScoreResult
    ) -> TeacherQuery | None:
        """The query that a part answers; None if it waits for none, or is refused by this part."""
        asked = call.item(result.sequence_id)
        if asked is not None and result.HasField("error"):
            self._refuse(call, result.sequence_id, asked.place, from_status(result.error))
            return None
        return asked

    def _accept(
        self,
        endpoint: Endpoint,
        call: Call[TeacherQuery, Distributions],
        result: ScoreResult,
        parts: dict[int, list[Distributions]],
    ) -> None:
        """Takes in one part of an answer; `parts` holds the earlier ones of this stream."""
        sequence_id, asked = result.sequence_id, self._open_query(call, result)
        if asked is None:
            return
        found = parts.setdefault(sequence_id, [])
        part = decode_distributions(
            result.distributions,
            vocab_size=self._teacher.info.vocab_size,
            max_rows=asked.num_rows - sum(each.num_rows for each in found),
            max_top_k=self._config.top_k,
            queried_ids=asked.query_token_ids,
            queried_from=asked.start,
        )
        found.append(part)
        if not result.last:
            if part.num_rows == 0:  # such parts could go on for ever
                raise StillhouseError(
                    Reason.TENSOR_INVALID,
                    f"The teacher answered a part without rows of {asked.place}. Bring both sides to the same version of "
                    "Stillhouse.",
                )
            return
        if asked.num_scored and result.HasField("reused_tokens"):
            self._teacher.prefix_reuse.add(
                num_scored=asked.num_scored,
                num_reused=result.reused_tokens,
                num_new=asked.num_rows,
                target=endpoint.target,
            )
        whole = Distributions.concat(parts.pop(sequence_id))
        self._check_states(sent_states(whole), asked)
        call.answer(sequence_id, _checked(whole, asked))

    def _check_states(self, states: NDArray[np.float32] | None, asked: TeacherQuery) -> None:
        """Raises StillhouseError(TENSOR_INVALID) unless all hidden states came that were asked for."""
        number, width = (
            len(self._config.hidden_layers) or int(self._config.hidden_states),
            self._teacher.info.hidden_size,
        )
        found = None if states is None else states.shape[-2:]
        if number and found != (number, width):
            raise StillhouseError(
                Reason.TENSOR_INVALID,
                f"The teacher answered hidden states of {found} for {asked.place}; {(number, width)} were asked for. Bring both "
                "sides to the same version of Stillhouse.",
            )

    def _accept_classes(
        self,
        call: Call[TeacherQuery, Distributions],
        result: ScoreResult,
        parts: dict[int, list[ClassDistribution]],
    ) -> None:
        """Takes in one part of a class row; `parts` holds the earlier ones of this stream."""
        sequence_id, asked = result.sequence_id, self._open_query(call, result)
        if asked is None:
            return
        found = parts.setdefault(sequence_id, [])
        found.append(result.classes)
        num_tokens = len(asked.token_ids)
        if not result.last and len(found) <= num_tokens:  # each further part has a token at least
            return
        del parts[sequence_id]
        info = self._teacher.info
        row = decode_classes(
            found,
            num_classes=len(info.class_names),
            num_tokens=num_tokens,
            num_layers=len(self._config.hidden_layers),
        )
        self._check_states(row.layer_states, asked)
        call.answer(sequence_id, row)


def _checked(answer: Distributions, asked: TeacherQuery) -> Distributions:
    """Returns the answer if it covers every position that was asked for."""
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
