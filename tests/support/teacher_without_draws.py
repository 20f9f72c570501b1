"""A teacher whose engine does not draw, as vLLM without the worker extension: a real one behind a proxy that hides it."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from benchmarks.distillation.teacher_proxy import TeacherProxy
from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    CAPABILITY_SAMPLED_TOKENS,
    CAPABILITY_TAIL_SAMPLES,
    GetTeacherInfoResponse,
    ScoreRequest,
    ScoreResponse,
)

INFO_METHOD = "/stillhouse.v1.TeacherService/GetTeacherInfo"


class _Watch:
    def __init__(self, *, plain: bool) -> None:
        self._plain = plain

    def request(self, request: ScoreRequest) -> None:
        asked = request.config.num_sampled_tokens if self._plain else request.config.sample_tail
        assert not asked, "draws of a teacher that has none"

    def response(self, response: ScoreResponse) -> ScoreResponse:
        return response


class TeacherWithoutDraws(TeacherProxy):
    """Forwards every call to `target`; its capabilities lack draws."""

    def __init__(self, target: str, *hidden: int) -> None:
        """`hidden` are the capabilities to hide: those of draws, by default."""
        self._hidden = hidden or (CAPABILITY_SAMPLED_TOKENS, CAPABILITY_TAIL_SAMPLES)
        super().__init__(target, lambda: _Watch(plain=not hidden))

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
