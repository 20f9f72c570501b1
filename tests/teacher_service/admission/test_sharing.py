"""Several clients on one teacher, over gRPC: fair shares of tokens, no starvation, isolated cancels, and timeouts
while queued."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from stillhouse.protos.errors import Reason, from_rpc_error
from stillhouse.protos.rpc.channel import ChannelOptions
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from stillhouse.teacher_service.admission.fair_queue import ENGINE_UNITS
from tests.conftest import Models
from tests.support.networks.async_channel import connect_async
from tests.teacher_service.calls import distribution_config, prompt, random_ids, sequence
from tests.teacher_service.local import Local, serving, until

FLOOD, SMALL = (("stillhouse-client", "flood"),), (("stillhouse-client", "small"),)


def config() -> teacher_pb2.ScoreRequest:
    return teacher_pb2.ScoreRequest(config=distribution_config(4))


def to_score(number: int, length: int, timeout_ms: int = 0) -> teacher_pb2.ScoreRequest:
    one = sequence(random_ids(length), timeout_ms=timeout_ms)
    one.sequence_id = number
    return teacher_pb2.ScoreRequest(sequence=one)


async def sequences(count: int, length: int, timeout_ms: int = 0) -> AsyncIterator[teacher_pb2.ScoreRequest]:
    yield config()
    for number in range(count):
        yield to_score(number, length, timeout_ms)


async def read(call: Any, client: str, tokens: Counter[str], length: int) -> int:
    """Number of responses without error; `tokens` counts their tokens as they come."""
    count = 0
    async for response in call:
        for result in response.results:
            assert not result.HasField("error"), result.error.message
            count += 1
            tokens[client] += length
    return count


@pytest.mark.parametrize("calls", [1, 12])
@pytest.mark.faults(row=20)
async def test_two_clients_get_equal_tokens_however_many_calls_one_makes(
    models: Models, tmp_path: Path, calls: int
) -> None:
    """All that is compared waits before the engine starts, so that the shares do not depend on the network's speed."""
    tokens: Counter[str] = Counter()
    async with serving(models, tmp_path, max_inflight_sequences=64, max_inflight_tokens=4096) as local:
        paused = await local.pause()
        floods = [local.stub.Score(sequences(10_000, 500), metadata=FLOOD) for _ in range(calls)]
        reading = [asyncio.create_task(read(call, "flood", tokens, 500)) for call in floods]
        await until(lambda: admission(local).num_waiting("name:flood") >= 40 * calls)
        small = local.stub.Score(sequences(60, 500), metadata=SMALL)
        finished = asyncio.create_task(read(small, "small", tokens, 500))
        await until(lambda: admission(local).num_waiting("name:small") >= 50)
        local.go_on.set()
        await paused
        assert await finished == 60
        shares = tokens["small"] / tokens["flood"]
        for call in floods:
            call.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        await until(lambda: admission(local).free == ENGINE_UNITS)
    assert 0.5 < shares < 2


@pytest.mark.faults(row=20)
async def test_a_flood_of_samples_does_not_starve_scoring(models: Models, tmp_path: Path) -> None:
    tokens: Counter[str] = Counter()
    async with serving(models, tmp_path, max_inflight_sequences=64) as local:
        request = teacher_pb2.GenerateRequest(
            prompts=[prompt(random_ids(8, seed=number)) for number in range(64)],
            sampling=teacher_pb2.SamplingParams(max_new_tokens=500),
            num_samples=8,
        )
        writing = [local.stub.Generate(request, metadata=FLOOD) for _ in range(8)]
        reading = [asyncio.create_task(call.read()) for call in writing]
        await until(lambda: admission(local).num_waiting("name:flood") > 100)
        other = teacher_pb2.GenerateRequest(
            prompts=[prompt(random_ids(8))], sampling=teacher_pb2.SamplingParams(max_new_tokens=4, seed=1)
        )
        async with asyncio.timeout(60):
            assert await read(local.stub.Score(sequences(20, 50), metadata=SMALL), "small", tokens, 50) == 20
            written = [each async for each in local.stub.Generate(other, metadata=SMALL)]
        assert sum(len(chunk.token_ids.data) // 4 for each in written for chunk in each.chunks) == 4
        assert admission(local).num_waiting("name:flood") > 100
        for call in writing:
            call.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        await until(lambda: admission(local).free == ENGINE_UNITS)


@pytest.mark.faults(row=20)
async def test_one_clients_cancel_leaves_the_others_responses(models: Models, tmp_path: Path) -> None:
    tokens: Counter[str] = Counter()
    async with serving(models, tmp_path, max_inflight_sequences=64, max_inflight_tokens=512) as local:
        paused = await local.pause()
        flood = local.stub.Score(sequences(64, 60), metadata=FLOOD)
        starting = asyncio.create_task(flood.read())
        await until(lambda: admission(local).num_waiting("name:flood") > 40)
        small = asyncio.create_task(
            read(local.stub.Score(sequences(30, 60), metadata=SMALL), "small", tokens, 60)
        )
        await until(lambda: admission(local).num_waiting("name:small") > 10)
        flood.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await until(lambda: admission(local).num_waiting("name:flood") == 0)
        local.go_on.set()
        await paused
        assert await small == 30
        # What the cancelled call had inside the engine was aborted, what waited never entered.
        assert local.servicer.counters.tokens_scored == 30 * 59
        await until(lambda: admission(local).free == ENGINE_UNITS)


async def test_a_sequence_that_times_out_while_queued_never_reaches_the_engine(
    models: Models, tmp_path: Path
) -> None:
    async with serving(models, tmp_path, max_inflight_sequences=64, max_inflight_tokens=512) as local:
        paused = await local.pause()
        first = local.stub.Score(sequences(30, 60), metadata=SMALL)
        await until(lambda: admission(local).num_waiting("name:small") > 10)
        inside = len(local.engine._worker._sequences)
        assert inside < 10
        call = local.stub.Score(sequences(30, 60, timeout_ms=300), metadata=SMALL)
        codes = [result.error.code async for response in call for result in response.results]
        assert codes == [grpc.StatusCode.DEADLINE_EXCEEDED.value[0]] * 30
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in local.stub.Score(endless(), metadata=SMALL, timeout=0.5):
                pass
        assert from_rpc_error(caught.value, target="", service="teacher").reason == Reason.CALL_TIMEOUT
        await until(lambda: admission(local).num_waiting("name:small") == 30 - inside)
        assert len(local.engine._worker._sequences) == inside
        local.go_on.set()
        await paused
        assert len([result async for response in first for result in response.results]) == 30
        assert local.servicer.counters.tokens_scored == 30 * 59


async def endless() -> AsyncIterator[teacher_pb2.ScoreRequest]:
    async for request in sequences(30, 60):
        yield request
    await asyncio.Event().wait()


async def test_unread_responses_are_bounded_and_other_calls_continue(models: Models, tmp_path: Path) -> None:
    tokens: Counter[str] = Counter()

    async def wide(count: int) -> AsyncIterator[teacher_pb2.ScoreRequest]:
        yield teacher_pb2.ScoreRequest(config=distribution_config(256))
        for number in range(count):
            yield to_score(number, 500)

    async with serving(models, tmp_path, max_inflight_sequences=64) as local:
        memory = local.servicer.serving.budget  # type: ignore[union-attr]
        memory._max_bytes = 8 << 20
        slow = local.stub.Score(wide(200), metadata=FLOOD)
        responses = aiter(slow)
        results = list((await anext(responses)).results)
        async with connect_async(ChannelOptions(target=local.target, client_name="small")) as channel:
            small = TeacherServiceStub(channel).Score(sequences(50, 50))
            assert await read(small, "small", tokens, 50) == 50
        # About 1 MB a response, and a call may hold an eighth of 8 MB, or one response.
        assert 0 < memory.num_bytes < 3 << 20
        assert local.servicer.counters.tokens_scored < 20 * 499
        results += [result async for response in responses for result in response.results]
        assert {result.sequence_id for result in results} == set(range(200))
        assert memory.num_bytes == 0


async def test_unread_samples_are_bounded_and_free_their_slots(models: Models, tmp_path: Path) -> None:
    async with serving(models, tmp_path, max_inflight_sequences=64) as local:
        memory = local.servicer.serving.budget  # type: ignore[union-attr]
        memory._max_bytes = 8 << 20
        request = teacher_pb2.GenerateRequest(
            prompts=[prompt(random_ids(8, seed=number)) for number in range(300)],
            sampling=teacher_pb2.SamplingParams(max_new_tokens=20, seed=5),
            distributions=distribution_config(256),
        )
        slow = local.stub.Generate(request, metadata=FLOOD)
        responses = aiter(slow)
        chunks = list((await anext(responses)).chunks)
        # About 40 kB a sample, of which a call may hold 1 MB; the engine is free once started samples are generated.
        await until(lambda: memory.num_bytes > 1 << 20 and admission(local).free == ENGINE_UNITS)
        assert memory.num_bytes < 2 << 20
        assert local.servicer.counters.tokens_generated < 200 * 20
        chunks += [chunk async for response in responses for chunk in response.chunks]
        assert {chunk.prompt_index for chunk in chunks if chunk.finish_reason} == set(range(300))
        assert memory.num_bytes == 0


async def test_calls_of_one_client_leave_room_for_anothers(models: Models, tmp_path: Path) -> None:
    async with serving(models, tmp_path, max_calls=8) as local:
        paused = await local.pause()
        floods = [local.stub.Score(sequences(1, 9), metadata=FLOOD) for _ in range(6)]
        await until(lambda: local.server.limit.calls["name:flood"] == 6)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await local.stub.Score(metadata=FLOOD).read()
        error = from_rpc_error(caught.value, target="", service="teacher")
        assert error.reason == Reason.TOO_MANY_CALLS
        assert "6 of them yours" in error.message
        small = local.stub.Score(sequences(1, 9), metadata=SMALL)
        await until(lambda: local.server.limit.calls["name:small"] == 1)
        local.go_on.set()
        await paused
        for call in (*floods, small):
            assert [result.last async for response in call for result in response.results] == [True]


def admission(local: Local) -> Any:
    return local.servicer.serving.admission  # type: ignore[union-attr]
