"""A teacher whose engine does not draw, of an earlier version: a real one behind a proxy that hides what it gives."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from benchmarks.distillation.teacher_proxy import TeacherProxy
from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    CAPABILITY_CODED_QUERIES,
    CAPABILITY_COMPACT_LOGPROBS,
    CAPABILITY_SAMPLED_TOKENS,
    CAPABILITY_STRATIFIED_SAMPLES,
    CAPABILITY_TAIL_SAMPLES,
    GetTeacherInfoResponse,
    ScoreRequest,
    ScoreResponse,
)
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor

INFO_METHOD = "/stillhouse.v1.TeacherService/GetTeacherInfo"


class _Watch:
    def __init__(self, hidden: frozenset[int]) -> None:
        self._hidden = hidden

    def request(self, request: ScoreRequest) -> None:
        config = request.config
        asked: dict[int, bool] = {
            CAPABILITY_SAMPLED_TOKENS: config.num_sampled_tokens > 0,
            CAPABILITY_TAIL_SAMPLES: config.sample_tail,
            CAPABILITY_COMPACT_LOGPROBS: config.logprob_dtype == Tensor.DATA_TYPE_FALLING,
            CAPABILITY_CODED_QUERIES: request.sequence.query_token_ids.dtype == Tensor.DATA_TYPE_DIFFERENCES,
            CAPABILITY_STRATIFIED_SAMPLES: config.stratified_samples or config.sort_samples,
        }
        assert not any(asked[each] for each in self._hidden), "what the teacher does not give is requested"

    def response(self, response: ScoreResponse) -> ScoreResponse:
        return response


class TeacherWithoutDraws(TeacherProxy):
    """Forwards every call to `target`; its capabilities lack draws."""

    def __init__(self, target: str, *hidden: int) -> None:
        """`hidden` are the capabilities to hide, of draws: all by default, and always the later ones."""
        every = hidden or (CAPABILITY_SAMPLED_TOKENS, CAPABILITY_TAIL_SAMPLES)
        self._hidden = frozenset(
            {*every, CAPABILITY_STRATIFIED_SAMPLES, CAPABILITY_COMPACT_LOGPROBS, CAPABILITY_CODED_QUERIES}
        )
        super().__init__(target, lambda: _Watch(self._hidden))

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Handles any method."""
        handler = super().service(details)
        if details.method != INFO_METHOD:
            return handler
        forward = handler.stream_stream
        assert forward is not None

        def hide(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            for response in forward(requests, context):
                info = GetTeacherInfoResponse.FromString(response)
                kept = [each for each in info.capabilities if each not in self._hidden]
                del info.capabilities[:]
                info.capabilities.extend(kept)
                yield info.SerializeToString()

        return grpc.stream_stream_rpc_method_handler(hide)
