"""Async channels to the run service and the teachers; each call carries the token of its own caller."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from stillhouse.client.core.settings import Settings
from stillhouse.protos.errors import Reason, StillhouseError, from_rpc_error
from stillhouse.protos.rpc.channel import ChannelOptions, call_metadata, connect, connect_async, process_name
from stillhouse.protos.stillhouse.v1 import run_pb2, teacher_pb2
from stillhouse.protos.telemetry.tracing import trace_metadata

CALL_TIMEOUT_S = 60.0
CHECK_S = 10.0
"""Time for which it is remembered whether a service checks tokens."""
NO_TOKEN = "sth_none_none"  # noqa: S105 - a token that no service has
RUN_SERVICE: ServiceDescriptor = run_pb2.DESCRIPTOR.services_by_name["RunService"]
TEACHER_SERVICE: ServiceDescriptor = teacher_pb2.DESCRIPTOR.services_by_name["TeacherService"]
_HARMLESS: Mapping[str, Message] = {
    "RunService": run_pb2.ListRunsRequest(page_size=1),
    "TeacherService": teacher_pb2.GetTeacherInfoRequest(),
}
"""A call that changes nothing, by service."""


class Service:
    """One service and the channel to it. Create it in the running loop."""

    def __init__(self, kind: str, descriptor: ServiceDescriptor, options: ChannelOptions) -> None:
        """`kind` is "trainer" or "teacher"; `options` have no token."""
        self.kind, self.target = kind, options.target
        self._descriptor, self._options = descriptor, options
        self._channel = connect_async(options)
        self._calls: dict[str, Any] = {}
        self._checked: tuple[float, bool] | None = None
        self._blocking: grpc.Channel | None = None

    def method(self, rpc: str) -> MethodDescriptor:
        """The descriptor of an rpc."""
        return self._descriptor.methods_by_name[rpc]

    async def call(
        self, rpc: str, request: Message, token: str | None, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        """The response of a unary rpc. Raises StillhouseError."""
        try:
            return await self._multi_callable(rpc)(request, timeout=timeout_s, metadata=self._metadata(token))
        except grpc.RpcError as error:
            raise self.error(error) from error

    async def stream(
        self, rpc: str, request: Message | Iterable[Message], token: str | None
    ) -> AsyncIterator[Any]:
        """Yields the responses of a streaming rpc; closing the iterator cancels it. Raises StillhouseError.

        `request` is several for an rpc that streams them too.
        """
        call = self._multi_callable(rpc)(request, metadata=self._metadata(token))
        try:
            async for response in call:
                yield response
        except grpc.RpcError as error:
            raise self.error(error) from error
        finally:
            call.cancel()

    def upload(self, rpc: str, requests: Iterator[Message], token: str | None) -> grpc.Future[Any]:
        """The response to come of an rpc that streams its requests, which a thread of gRPC takes from `requests`.

        It is a blocking channel's: in an async one a call that the service ends while it sends loses the service's status.
        """
        if self._blocking is None:
            self._blocking = connect(self._options)
        method = self.method(rpc)
        call: Any = self._blocking.stream_unary(
            f"/{self._descriptor.full_name}/{rpc}",
            request_serializer=GetMessageClass(method.input_type).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        metadata = call_metadata(replace(self._options, client_name=None, token=token))
        future: grpc.Future[Any] = call.future(requests, metadata=metadata)
        return future

    async def checks_tokens(self) -> bool:
        """True if the service refuses a token that it does not know. Raises StillhouseError if it does not answer."""
        now_s = time.monotonic()
        if self._checked is None or now_s - self._checked[0] > CHECK_S:
            self._checked = now_s, await self.access(NO_TOKEN) == Reason.UNAUTHENTICATED
        return self._checked[1]

    async def access(self, token: str | None) -> Reason | None:
        """None if the service lets `token` read, else UNAUTHENTICATED or PERMISSION_DENIED. Raises other errors."""
        try:
            await self.probe(token)
        except StillhouseError as error:
            if error.reason in (Reason.UNAUTHENTICATED, Reason.PERMISSION_DENIED):
                return error.reason
            raise
        return None

    async def probe(self, token: str | None) -> None:
        """Makes a call that changes nothing. Raises its error."""
        name = self._descriptor.name
        rpc = "ListRuns" if name == "RunService" else "GetTeacherInfo"
        await self.call(rpc, _HARMLESS[name], token, timeout_s=10.0)

    def error(self, error: grpc.RpcError) -> StillhouseError:
        """The error of a failed call."""
        return from_rpc_error(error, target=self.target, service=self.kind)

    async def close(self) -> None:
        """Ends every call."""
        await self._channel.close()
        if self._blocking is not None:
            self._blocking.close()

    def _metadata(self, token: str | None) -> tuple[tuple[str, str], ...]:
        return (*call_metadata(replace(self._options, token=token)), *trace_metadata())

    def _multi_callable(self, rpc: str) -> Any:
        if rpc not in self._calls:
            method = self.method(rpc)
            kinds = ("unary", "stream")
            make = getattr(
                self._channel, f"{kinds[method.client_streaming]}_{kinds[method.server_streaming]}"
            )
            self._calls[rpc] = make(
                f"/{self._descriptor.full_name}/{rpc}",
                request_serializer=GetMessageClass(method.input_type).SerializeToString,
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
        return self._calls[rpc]


class Upstream:
    """The services of one web server; an async context manager."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.trainer = Service("trainer", RUN_SERVICE, _options(settings, settings.trainer))
        self.teachers = tuple(
            Service("teacher", TEACHER_SERVICE, _options(settings, target)) for target in settings.teachers
        )

    @property
    def services(self) -> tuple[Service, ...]:
        """All of them."""
        return (self.trainer, *self.teachers)

    def teacher(self, number: str) -> Service:
        """The teacher of this number, from 1. Raises StillhouseError(NOT_FOUND)."""
        if number.isascii() and number.isdecimal() and 1 <= int(number[:9]) <= len(self.teachers):
            return self.teachers[int(number) - 1]
        raise StillhouseError(
            Reason.NOT_FOUND,
            f"there is no teacher {number[:80]!r}; this server knows {len(self.teachers)}, numbered from 1, by its --teacher.",
        )

    async def __aenter__(self) -> Upstream:
        return self

    async def __aexit__(self, *_: object) -> None:
        for service in self.services:
            await service.close()


def _options(settings: Settings, target: str) -> ChannelOptions:
    return ChannelOptions(
        target=target,
        tls=settings.tls,
        ca=settings.tls_ca,
        cert=settings.tls_cert,
        key=settings.tls_key,
        server_name=settings.tls_server_name,
        client_name=process_name("stillhouse-web"),
    )
