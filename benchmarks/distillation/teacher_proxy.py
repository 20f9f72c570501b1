"""gRPC proxy between a trainer and its teacher that may inspect or change Score streams.

All other rpcs are forwarded as bytes, including health and later ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import grpc

from stillhouse.protos.stillhouse.v1.teacher_pb2 import ScoreRequest, ScoreResponse

SCORE_METHOD = "/stillhouse.v1.TeacherService/Score"
MAX_CALLS = 32
MESSAGE_LIMIT_BYTES = 32 * 2**20
OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
]


class ScoreHook(Protocol):
    """Hook on one Score stream; one object per stream."""

    def request(self, request: ScoreRequest) -> None:
        """Sees a request before it is forwarded."""
        ...

    def response(self, response: ScoreResponse) -> ScoreResponse:
        """Returns the response to forward instead of `response`."""
        ...


class TeacherProxy(grpc.GenericRpcHandler):
    """Listens on a free local port and forwards every call to `target`.

    `make_hook` is called once per Score stream. As a context manager it listens until the block ends.
    """

    def __init__(
        self, target: str, make_hook: Callable[[], ScoreHook], *, listen: str = "127.0.0.1:0"
    ) -> None:
        self._channel = grpc.insecure_channel(target, options=OPTIONS)
        self._make_hook = make_hook
        self._server = grpc.server(ThreadPoolExecutor(MAX_CALLS), handlers=[self], options=OPTIONS)
        host = listen.rsplit(":", 1)[0]
        self.target = f"{host}:{self._server.add_insecure_port(listen)}"

    def __enter__(self) -> TeacherProxy:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(grace=None).wait()
        self._channel.close()

    def wait(self) -> None:
        """Serves until the process ends."""
        self._server.wait_for_termination()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Handles any method: on the wire, a unary call is a stream of one message."""

        def forward(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            hook = self._make_hook() if details.method == SCORE_METHOD else None
            method: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(details.method)
            call = method(_seen(requests, hook), metadata=_forwarded(details.invocation_metadata))

            def give_up() -> None:
                call.cancel()

            context.add_callback(give_up)
            try:
                for response in call:
                    yield response if hook is None else _changed(response, hook)
            except grpc.RpcError as error:
                _hand_on(error, context)

        return grpc.stream_stream_rpc_method_handler(forward)


def _seen(requests: Iterator[bytes], hook: ScoreHook | None) -> Iterator[bytes]:
    # When the caller disconnects its request iterator raises; the upstream call ends by its own cancellation.
    with contextlib.suppress(grpc.RpcError):
        for request in requests:
            if hook is not None:
                hook.request(ScoreRequest.FromString(request))
            yield request


def _changed(response: bytes, hook: ScoreHook) -> bytes:
    return hook.response(ScoreResponse.FromString(response)).SerializeToString()


def _forwarded(metadata: Any) -> tuple[tuple[str, str | bytes], ...]:
    """Metadata without gRPC's own keys."""
    return tuple((key, value) for key, value in metadata or () if not key.startswith(("grpc-", "user-agent")))


def _hand_on(error: Any, context: grpc.ServicerContext) -> None:
    """Ends the call as the teacher ended it, with its details in the trailing metadata."""
    context.set_trailing_metadata(tuple(error.trailing_metadata() or ()))
    context.set_code(error.code())
    context.set_details(error.details() or "")
