"""A teacher whose engine does not draw, as vLLM without the worker extension: a real one behind a proxy that hides it."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from benchmarks.distillation.teacher_proxy import TeacherProxy
from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    CAPABILITY_SAMPLED_TOKENS,
    CAPABILITY_STRATIFIED_SAMPLES,
    CAPABILITY_TAIL_SAMPLES,
    GetTeacherInfoResponse,
    ScoreRequest,
    ScoreResponse,
)

INFO_METHOD = "/stillhouse.v1.TeacherService/GetTeacherInfo"


class _Watch:
    def __init__(self, hidden: frozenset[int]) -> None:
        self._hidden = hidden

    def request(self, request: ScoreRequest) -> None:
        config = request.config
        asked: dict[int, bool] = {
            CAPABILITY_SAMPLED_TOKENS: config.num_sampled_tokens > 0,
            CAPABILITY_TAIL_SAMPLES: config.sample_tail,
            CAPABILITY_STRATIFIED_SAMPLES: config.stratified_samples or config.sort_samples,
        }
        assert not any(asked[each] for each in self._hidden), "draws of a teacher that has none"

    def response(self, response: ScoreResponse) -> ScoreResponse:
        return response


class TeacherWithoutDraws(TeacherProxy):
    """Forwards every call to `target`; its capabilities lack draws."""

    def __init__(self, target: str, *hidden: int) -> None:
        """`hidden` are the capabilities to hide, of draws: all of them by default, and stratified ones always."""
        every = hidden or (CAPABILITY_SAMPLED_TOKENS, CAPABILITY_TAIL_SAMPLES)
        self._hidden = frozenset({*every, CAPABILITY_STRATIFIED_SAMPLES})
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
