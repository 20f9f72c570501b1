"""Server lifecycle: addresses, health, reflection and graceful shutdown."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from stillhouse.protos.errors import Reason, StillhouseError, from_rpc_error
from stillhouse.protos.rpc.channel import is_loopback
from stillhouse.protos.rpc.server import Server
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from tests.protos.rpc.serving import SERVICE, Told, make_server, nothing, serving, stub_of
from tests.support.networks.async_channel import connect_async

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNLOAD = teacher_pb2.UnloadAdapterRequest()


async def health_of(channel: grpc.aio.Channel, service: str = "") -> Any:
    request = health_pb2.HealthCheckRequest(service=service)
    return (await health_pb2_grpc.HealthStub(channel).Check(request, timeout=60)).status


@asynccontextmanager
async def life_of(
    servicer: Told, drain: Any = nothing, grace_s: float = 20
) -> AsyncIterator[tuple[Any, Any, Server]]:
    """A serving server in `run_until_signal`, as (channel, task, server); the block must end it."""
    server = make_server(servicer)
    address = await server.start()
    server.set_serving(True)
    life = asyncio.create_task(server.run_until_signal(drain, grace_s))
    await asyncio.sleep(0)
    async with connect_async(address) as channel:
        yield channel, life, server
    assert life.done()
    await server.stop(0)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


async def until_draining(channel: grpc.aio.Channel) -> None:
    async with asyncio.timeout(5):
        async for answer in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
            if answer.status == NOT_SERVING:
                return


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:7401", True),
        ("127.8.9.1:1", True),
        ("localhost:7401", True),
        ("[::1]:7401", True),
        ("unix:/tmp/x", True),
        ("0.0.0.0:7401", False),
        ("[::]:7401", False),
        ("10.0.0.7:7401", False),
        ("trainer.lab:7401", False),
        ("localhost.evil.org:7401", False),
        ("127.0.0.1.evil.org:7401", False),
        ("", False),
    ],
)
def test_loopback_is_what_no_other_machine_reaches(address: str, loopback: bool) -> None:
    assert is_loopback(address) == loopback


async def test_plaintext_beyond_loopback_needs_insecure() -> None:
    with pytest.raises(StillhouseError, match=r"--tls-cert.*--insecure") as caught:
        make_server(Told(), listen="0.0.0.0:0")
    assert caught.value.reason == Reason.INVALID_CONFIG
    server = make_server(Told(), listen="0.0.0.0:0", insecure=True)
    address = await server.start()
    async with connect_async(address.replace("0.0.0.0", "127.0.0.1")) as channel:
        await stub_of(channel).UnloadAdapter(UNLOAD, timeout=60)
    await server.stop(0)


async def test_a_taken_port_is_reported() -> None:
    async with serving(Told()) as address:
        with pytest.raises(StillhouseError, match=f"cannot listen on {address}"):
            await make_server(Told(), listen=address).start()


async def test_a_unix_socket_serves(tmp_path: Path) -> None:
    server = make_server(Told(), listen=f"unix:{tmp_path}/socket")
    address = await server.start()
    assert address == f"unix:{tmp_path}/socket"
    async with connect_async(address) as channel:
        await stub_of(channel).UnloadAdapter(UNLOAD, timeout=60)
    await server.stop(0)


async def test_health_is_serving_only_once_set() -> None:
    server = make_server(Told())
    async with connect_async(await server.start()) as channel:
        assert await health_of(channel) == await health_of(channel, SERVICE) == NOT_SERVING
        server.set_serving(True)
        assert await health_of(channel) == await health_of(channel, SERVICE) == SERVING
        server.set_serving(False)
        assert await health_of(channel) == NOT_SERVING
        with pytest.raises(grpc.RpcError) as unknown:
            await health_of(channel, "stillhouse.v1.NoService")
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
    await server.stop(0)


async def services_by_reflection(channel: grpc.aio.Channel) -> list[str]:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), timeout=60)
    return [service.name async for answer in call for service in answer.list_services_response.service]


async def test_reflection_is_on_for_loopback_and_can_be_off() -> None:
    server, silent = make_server(Told()), make_server(Told(), reflection=False)
    async with connect_async(await server.start()) as channel:
        assert {SERVICE, "grpc.health.v1.Health"} <= set(await services_by_reflection(channel))
    async with connect_async(await silent.start()) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            await services_by_reflection(channel)
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    await server.stop(0)
    await silent.stop(0)


async def test_calls_beyond_the_limit_are_refused() -> None:
    servicer = Told(asyncio.Event().wait)  # type: ignore[arg-type]
    server = make_server(servicer, max_calls=1)
    address = await server.start()
    async with connect_async(address) as channel:
        first = stub_of(channel).GetTokenizer(teacher_pb2.GetTokenizerRequest())
        await first.read()
        with pytest.raises(grpc.RpcError) as refused:
            await stub_of(channel).UnloadAdapter(UNLOAD, timeout=60)
        assert (
            from_rpc_error(refused.value, target=address, service="teacher").reason == Reason.TOO_MANY_CALLS
        )
        first.cancel()
    await server.stop(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_calls_finish_and_refuses_further_ones(number: signal.Signals) -> None:
    finish = asyncio.Event()
    servicer = Told(finish.wait)  # type: ignore[arg-type]
    async with life_of(servicer) as (channel, life, _):
        stub = stub_of(channel)
        running = stub.GetTokenizer(teacher_pb2.GetTokenizerRequest())
        await running.read()
        send(number)
        await until_draining(channel)
        with pytest.raises(grpc.RpcError) as refused:
            await stub.UnloadAdapter(UNLOAD, timeout=60)
        error = from_rpc_error(refused.value, target="", service="teacher")
        assert error.reason == Reason.DRAINING
        assert error.retry_after_s
        assert not life.done()
        finish.set()
        assert (await running.read()).file_name == "b"
        assert await running.read() == grpc.aio.EOF
        await asyncio.wait_for(life, 60)


async def test_drain_is_awaited_before_the_end() -> None:
    steps: list[str] = []

    async def drain() -> None:
        await asyncio.sleep(0.05)
        steps.append("drained")

    async with life_of(Told(), drain) as (_, life, _):
        send(signal.SIGTERM)
        await asyncio.wait_for(life, 60)
    assert steps == ["drained"]


async def test_a_second_signal_cancels_the_remaining_calls() -> None:
    servicer = Told(asyncio.Event().wait)  # type: ignore[arg-type]
    async with life_of(servicer, grace_s=600) as (channel, life, _):
        running = stub_of(channel).GetTokenizer(teacher_pb2.GetTokenizerRequest())
        await running.read()
        send(signal.SIGTERM)
        await until_draining(channel)
        send(signal.SIGTERM)
        await asyncio.wait_for(life, 60)
        await asyncio.wait_for(servicer.closed.wait(), 60)


async def test_the_grace_period_ends() -> None:
    servicer = Told(asyncio.Event().wait)  # type: ignore[arg-type]
    async with life_of(servicer, asyncio.Event().wait, grace_s=0.2) as (channel, life, _):
        running = stub_of(channel).GetTokenizer(teacher_pb2.GetTokenizerRequest())
        await running.read()
        send(signal.SIGTERM)
        await asyncio.wait_for(life, 60)
        await asyncio.wait_for(servicer.closed.wait(), 60)


async def test_a_health_watcher_does_not_delay_shutdown() -> None:
    async with life_of(Told(), grace_s=600) as (channel, life, _):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        send(signal.SIGTERM)
        await asyncio.wait_for(life, 60)


async def test_a_failing_drain_ends_the_server_and_is_raised() -> None:
    async def drain() -> None:
        raise RuntimeError("disk")

    async with life_of(Told(), drain) as (_, life, _):
        send(signal.SIGTERM)
        with pytest.raises(RuntimeError, match="disk"):
            await asyncio.wait_for(life, 60)


async def test_stop_ends_the_life_without_a_signal() -> None:
    async with life_of(Told()) as (_, life, server):
        await server.stop(0)
        await asyncio.wait_for(life, 60)
