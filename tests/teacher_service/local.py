"""A teacher in this process, over gRPC, with a model that can be paused, so that tests see the state of a call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.protos.rpc.server import Server
from stillhouse.protos.stillhouse.v1 import teacher_pb2_grpc
from stillhouse.teacher_service.adapters.registry import AdapterRegistry
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engines.hf.engine import HfEngine
from stillhouse.teacher_service.lifecycle import SERVICE
from stillhouse.teacher_service.models.tokenizer import TextCodec
from stillhouse.teacher_service.rpc.servicer import LIMITED, TeacherServicer
from tests.conftest import Models
from tests.support.networks.async_channel import connect_async

MAX_INFLIGHT = 5


@dataclass(frozen=True, kw_only=True)
class Local:
    """A teacher in this process."""

    stub: Any
    engine: HfEngine
    servicer: TeacherServicer
    server: Server
    adapters: AdapterRegistry
    go_on: threading.Event
    target: str

    async def pause(self) -> asyncio.Task[bool]:
        """Pauses the model until `go_on` is set."""
        self.go_on.clear()
        paused = threading.Event()

        def pause() -> bool:
            paused.set()
            return self.go_on.wait()

        task = asyncio.create_task(self.engine._worker.call(pause))
        assert await asyncio.to_thread(paused.wait, 60)
        return task


@asynccontextmanager
async def serving(models: Models, directory: Path, **fields: Any) -> AsyncIterator[Local]:
    socket = f"unix:{directory / 'socket'}"
    config = TeacherConfig(
        model=str(models.teacher),
        threads=1,
        listen=socket,
        **{"max_inflight_sequences": MAX_INFLIGHT, **fields},
    )
    engine = await HfEngine.load(config)
    adapters = AdapterRegistry(engine, (models.adapter_a.parent,))
    servicer = TeacherServicer(config)
    servicer.serve(engine, TextCodec.load(config.model), adapters)
    server = Server(
        listen=socket,
        tls=None,
        insecure=False,
        reflection=None,
        services=[SERVICE],
        max_calls=config.max_calls,
        limited=LIMITED,
    )
    teacher_pb2_grpc.add_TeacherServiceServicer_to_server(servicer, server.aio)
    await server.start()
    go_on = threading.Event()
    try:
        async with connect_async(socket) as channel:
            stub = teacher_pb2_grpc.TeacherServiceStub(channel)
            yield Local(
                stub=stub,
                engine=engine,
                servicer=servicer,
                server=server,
                adapters=adapters,
                go_on=go_on,
                target=socket,
            )
    finally:
        go_on.set()
        await server.stop(0)
        await engine.close()


async def until(condition: Callable[[], bool]) -> None:
    """Returns once `condition` holds."""
    async with asyncio.timeout(240):
        while not condition():  # noqa: ASYNC110 - counters wake nobody
            await asyncio.sleep(0.01)
