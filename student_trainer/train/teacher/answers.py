"""A sequence's answer from the teacher that is responsible for it, or from all of them, mixed by weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    CAPABILITY_ENTROPY,
    DistributionConfig,
    GetTeacherInfoResponse,
)
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor as TensorMessage
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.config.check_loss import DRAWN_TARGETS
from stillhouse.student_trainer.config.schema import LossConfig, TeacherConfig
from stillhouse.student_trainer.train.batching.supports import mix
from stillhouse.student_trainer.train.process.waiting import Patience
from stillhouse.student_trainer.train.teacher.query import TargetStream, TeacherQuery


class Answers:
    """The answers of a run's teachers to one kind of question."""

    def __init__(
        self,
        streams: Mapping[str, TargetStream],
        *,
        weights: Mapping[str, float] | None = None,
        vocab_size: int = 0,
    ) -> None:
        """`streams` by the teachers' names. With `weights` every sequence asks all of them, else the one that it names."""
        self._streams = streams
        self._weights = weights
        self._vocab_size = vocab_size
        self._asked: dict[int, Sequence[str]] = {}

    @property
    def num_asked(self) -> int:
        """Sequences that teachers were asked for in this process, counted for each teacher."""
        return sum(stream.num_asked for stream in self._streams.values())

    def submit(
        self,
        sequence_id: int,
        token_ids: NDArray[np.int32],
        start: int,
        place: str,
        *,
        teacher: str,
        query_token_ids: NDArray[np.int32] | None = None,
    ) -> None:
        """Ask for the distributions at positions [start, T); `teacher` is the row's, "" where rows name none."""
        asked = TeacherQuery(token_ids=token_ids, start=start, place=place, query_token_ids=query_token_ids)
        every = self._weights is not None or len(self._streams) == 1
        names = tuple(self._streams) if every else (teacher,)
        self._asked[sequence_id] = names
        for name in names:
            self._streams[name].submit(sequence_id, asked)

    def take(self, sequence_id: int, patience: Patience) -> Distributions:
        """The answer, mixed where several teachers were asked. Raises what the streams' `take` raises."""
        names = self._asked.pop(sequence_id)
        parts = [self._streams[name].take(sequence_id, patience) for name in names]
        if len(parts) == 1:
            return parts[0]
        assert self._weights is not None
        return mix(parts, [self._weights[name] for name in names], vocab_size=self._vocab_size)

    def close(self) -> None:
        """Ends the streams."""
        for stream in self._streams.values():
            stream.close()


RequestOf = Callable[[TeacherConfig], DistributionConfig]
"""What is asked of each teacher at each position."""


def training_request(loss: LossConfig, seed: int) -> RequestOf:
    """What `loss` asks; `seed` is that of draws, where it needs any."""
    tempered = loss.temperature != 1 and loss.temperature_mode == "exact"
    draws = loss.sparse_target in DRAWN_TARGETS
    weighted = any(term.weight > 0 and term.token_weighting != "uniform" for term in loss.terms)  # noqa: S105 (of text)

    def request(teacher: TeacherConfig) -> DistributionConfig:
        return DistributionConfig(
            top_k=0 if loss.foreign_tokenizer == "alm" else loss.top_k,
            logprob_dtype=_dtype(teacher),
            pack_token_ids=True,
            temperatures=[loss.temperature] if tempered else [],
            num_sampled_tokens=loss.num_samples if draws else 0,
            seed=seed if draws else 0,
            entropy=weighted,
        )

    return request


def offered(request: DistributionConfig, info: GetTeacherInfoResponse) -> DistributionConfig:
    """`request` without the entropy where the teacher does not tell it: then its lower bound weighs the tokens."""
    if not request.entropy or CAPABILITY_ENTROPY in info.capabilities:
        return request
    reduced = DistributionConfig()
    reduced.CopyFrom(request)
    reduced.entropy = False
    return reduced


def evaluation_request(top_k: int) -> RequestOf:
    """What held-out rows ask: likeliest tokens and tail, at temperature 1."""

    def request(teacher: TeacherConfig) -> DistributionConfig:
        return DistributionConfig(top_k=top_k, logprob_dtype=_dtype(teacher), pack_token_ids=True)

    return request


def _dtype(teacher: TeacherConfig) -> TensorMessage.DataType.ValueType:
    half = teacher.logprob_dtype == "float16"
    return TensorMessage.DATA_TYPE_FLOAT16 if half else TensorMessage.DATA_TYPE_FLOAT32
