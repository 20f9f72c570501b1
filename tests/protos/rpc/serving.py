"""A server for transport tests: a teacher service with scripted replies for each of the four kinds of rpc."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from stillhouse.protos.rpc.server import Server
from stillhouse.protos.rpc.tls import ServerTls
from stillhouse.protos.stillhouse.v1 import teacher_pb2, teacher_pb2_grpc

SERVICE = "stillhouse.v1.TeacherService"
Step = Callable[[], Awaitable[None]]


async def nothing() -> None:
    """A step that succeeds."""


class Told(teacher_pb2_grpc.TeacherServiceServicer):
    """Runs `step` before the response of a unary call, and after the first response of a stream."""

    def __init__(self, step: Step = nothing) -> None:
        self.step = step
        self.num_calls = 0
        self.closed = asyncio.Event()
        self.metadata: dict[str, str] = {}

    def _note(self, context: Any) -> None:
        self.num_calls += 1
        self.metadata = dict(context.invocation_metadata())

    async def GetTeacherInfo(self, request: Any, context: Any) -> teacher_pb2.GetTeacherInfoResponse:
        self._note(context)
        await self.step()
        return teacher_pb2.GetTeacherInfoResponse(model="m")

    async def UnloadAdapter(self, request: Any, context: Any) -> teacher_pb2.UnloadAdapterResponse:
        self._note(context)
        await self.step()
        return teacher_pb2.UnloadAdapterResponse()

    async def UploadAdapter(self, request_iterator: Any, context: Any) -> teacher_pb2.UploadAdapterResponse:
        self._note(context)
        async for _ in request_iterator:
            await self.step()
        return teacher_pb2.UploadAdapterResponse()

    async def GetTokenizer(
        self, request: Any, context: Any
    ) -> AsyncIterator[teacher_pb2.GetTokenizerResponse]:
        self._note(context)
        try:
            yield teacher_pb2.GetTokenizerResponse(file_name="a")
            await self.step()
            yield teacher_pb2.GetTokenizerResponse(file_name="b")
        finally:
            self.closed.set()

    async def Score(self, request_iterator: Any, context: Any) -> AsyncIterator[teacher_pb2.ScoreResponse]:
        self._note(context)
        async for request in request_iterator:
            result = teacher_pb2.ScoreResult(sequence_id=request.sequence.sequence_id)
            yield teacher_pb2.ScoreResponse(results=[result])
            await self.step()


class Written(Told):
    """Servicer with a stream that writes its responses instead of yielding them."""

    async def GetTokenizer(self, request: Any, context: Any) -> None:  # type: ignore[override]
        await context.write(teacher_pb2.GetTokenizerResponse(file_name="a"))
        await self.step()


def make_server(servicer: Told, *, listen: str = "127.0.0.1:0", **options: Any) -> Server:
    """A server with the servicer added, on a free port of this machine."""
    settings: dict[str, Any] = {
        "tls": None,
        "insecure": False,
        "reflection": None,
        "max_calls": 256,
    }
    server = Server(listen=listen, services=[SERVICE], **(settings | options))
    teacher_pb2_grpc.add_TeacherServiceServicer_to_server(servicer, server.aio)
    return server


@asynccontextmanager
async def serving(servicer: Told, *, tls: ServerTls | None = None) -> AsyncIterator[str]:
    """The address of a server that runs until the block ends."""
    server = make_server(servicer, tls=tls)
    address = await server.start()
    server.set_serving(True)
    try:
        yield address
    finally:
        await server.stop(0)


def stub_of(channel: grpc.aio.Channel | grpc.Channel) -> Any:
    """A stub for a blocking or async channel."""
    return teacher_pb2_grpc.TeacherServiceStub(channel)
