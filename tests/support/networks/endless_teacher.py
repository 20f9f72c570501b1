"""A teacher in front of a real one that repeats the first answer of a stream until its caller leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc

from benchmarks.distillation.teacher_proxy import SCORE_METHOD, TeacherProxy
from stillhouse.protos.stillhouse.v1.teacher_pb2 import GenerateResponse, ScoreRequest, ScoreResponse

GENERATE_METHOD = "/stillhouse.v1.TeacherService/Generate"
Change = Callable[[ScoreResponse | GenerateResponse], None]
"""Changes the answer that is repeated."""
_PARSE: dict[str, Callable[[bytes], ScoreResponse | GenerateResponse]] = {
    SCORE_METHOD: ScoreResponse.FromString,
    GENERATE_METHOD: GenerateResponse.FromString,
}


class _Unchanged:
    def request(self, _request: ScoreRequest) -> None:
        """Does nothing."""

    def response(self, response: ScoreResponse) -> ScoreResponse:
        return response


class EndlessTeacher(TeacherProxy):
    """Forwards every call to `target`; answers of Score and Generate never end."""

    def __init__(self, target: str, change: Change) -> None:
        self._change = change
        super().__init__(target, _Unchanged)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Handles any method."""
        handler = super().service(details)
        parse = _PARSE.get(details.method)
        if parse is None:
            return handler
        forward = handler.stream_stream
        assert forward is not None

        def repeat(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            for response in forward(requests, context):
                answer = parse(response)
                self._change(answer)
                while context.is_active():
                    yield answer.SerializeToString()

        return grpc.stream_stream_rpc_method_handler(repeat)


def without_end(answer: ScoreResponse | GenerateResponse) -> None:
    """No part says that it is the last."""
    for result in getattr(answer, "results", ()):
        result.last = False
    for chunk in getattr(answer, "chunks", ()):
        chunk.ClearField("finish_reason")


def without_rows(answer: ScoreResponse | GenerateResponse) -> None:
    """Parts that have nothing and are not the last."""
    without_end(answer)
    for result in getattr(answer, "results", ()):
        found = result.distributions
        for name, _ in found.ListFields():
            if name.name != "start":
                tensor = getattr(found, name.name)
                tensor.data = b""
                if tensor.shape:
                    tensor.shape[0] = 0
    for chunk in getattr(answer, "chunks", ()):
        for field in ("token_ids", "sampling_logprobs", "distributions"):
            chunk.ClearField(field)
