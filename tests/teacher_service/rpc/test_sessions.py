"""State of a stream: bounded, and gone after a cancel; over gRPC, with a model that can be paused."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from stillhouse.protos.errors import Reason, StillhouseError, from_rpc_error
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.teacher_service.engine import GeneratedChunk, GenerateInput
from tests.conftest import Models
from tests.teacher_service.calls import distribution_config, prompt, random_ids, sequence
from tests.teacher_service.local import MAX_INFLIGHT, Local, serving, until


async def scores(count: int, adapter: str = "") -> AsyncIterator[teacher_pb2.ScoreRequest]:
    yield teacher_pb2.ScoreRequest(config=distribution_config())
    for number in range(count):
        one = sequence(random_ids(9, seed=number), adapter=adapter)
        one.sequence_id = number
        yield teacher_pb2.ScoreRequest(sequence=one)


async def settled(local: Local, least: int) -> int:
    """Number of sequences read, once at least `least` were and reading has stopped."""
    received = 0
    await until(lambda: local.servicer.counters.sequences_received >= least)
    while received < (received := local.servicer.counters.sequences_received):  # noqa: ASYNC110 - as `until`
        await asyncio.sleep(1)
    return received


async def test_a_stream_is_read_up_to_the_limit_of_unanswered_sequences(
    models: Models, tmp_path: Path
) -> None:
    async with serving(models, tmp_path) as local:
        paused = await local.pause()
        call = local.stub.Score(scores(40))
        assert await settled(local, MAX_INFLIGHT) == MAX_INFLIGHT
        local.go_on.set()
        await paused
        answered = [result.sequence_id async for response in call for result in response.results]
        assert sorted(answered) == list(range(40))
        assert local.servicer.counters.tokens_scored == 40 * 8


async def test_ids_of_unanswered_sequences_are_unique(models: Models, tmp_path: Path) -> None:
    first, second, third = (sequence(random_ids(9, seed=number)) for number in range(3))
    for each in (first, second, third):
        each.sequence_id = 7
    may_reuse = asyncio.Event()

    async def requests() -> AsyncIterator[teacher_pb2.ScoreRequest]:
        yield teacher_pb2.ScoreRequest(config=distribution_config())
        for each in (first, second):
            yield teacher_pb2.ScoreRequest(sequence=each)
        await may_reuse.wait()
        yield teacher_pb2.ScoreRequest(sequence=third)

    async with serving(models, tmp_path) as local:
        paused = await local.pause()
        results = (result async for response in local.stub.Score(requests()) for result in response.results)
        refused = await anext(results)
        assert refused.sequence_id == 7
        assert "sequence_id 7 is still unanswered" in refused.error.message
        local.go_on.set()
        await paused
        assert not (await anext(results)).HasField("error")
        may_reuse.set()
        assert [result.HasField("error") async for result in results] == [False]


async def test_a_caller_that_does_not_read_pauses_its_own_stream(models: Models, tmp_path: Path) -> None:
    async def large(count: int) -> AsyncIterator[teacher_pb2.ScoreRequest]:
        yield teacher_pb2.ScoreRequest(config=distribution_config(256))
        for number in range(count):
            one = sequence(random_ids(500, seed=number))
            one.sequence_id = number
            yield teacher_pb2.ScoreRequest(sequence=one)

    async with serving(models, tmp_path) as local:
        call = local.stub.Score(large(100))
        responses = aiter(call)
        first = await anext(responses)
        assert first.results
        # About 1 MB a response: buffers of the transport and the stream's own bounds stay small.
        assert await settled(local, MAX_INFLIGHT) < 40
        answered = {result.sequence_id async for response in responses for result in response.results}
        assert answered | {result.sequence_id for result in first.results} == set(range(100))


async def test_a_cancelled_stream_leaves_no_work(models: Models, tmp_path: Path) -> None:
    async with serving(models, tmp_path) as local:
        paused = await local.pause()
        scoring = local.stub.Score(scores(40))
        request = teacher_pb2.GenerateRequest(
            prompts=[prompt(random_ids(4))] * 9, sampling=teacher_pb2.SamplingParams(max_new_tokens=500)
        )
        writing = local.stub.Generate(request)
        reader = asyncio.create_task(writing.read())
        assert await settled(local, MAX_INFLIGHT) == MAX_INFLIGHT
        scoring.cancel()
        writing.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        worker = local.engine._worker
        await until(lambda: all(job.future.cancelled() for job in worker._sequences))
        await until(lambda: worker._runnable_samples() == [])
        local.go_on.set()
        await paused
        assert local.servicer.counters.tokens_scored == 0
        assert local.server.limit.calls.total() == 0


async def test_a_sample_with_a_stop_string_is_looked_at_more_often_than_its_parts_are_sent(
    models: Models, tmp_path: Path
) -> None:
    async with serving(models, tmp_path) as local:
        generate, sizes = local.engine.generate, []

        def recorded(item: GenerateInput) -> AsyncIterator[GeneratedChunk]:
            sizes.append(item.chunk_tokens)
            return generate(item)

        local.engine.generate = recorded  # type: ignore[method-assign]
        stops = teacher_pb2.SamplingParams(stop=["@@never@@"])
        request = teacher_pb2.GenerateRequest(
            prompts=[prompt(random_ids(4)), prompt(random_ids(4), sampling=stops)],
            sampling=teacher_pb2.SamplingParams(max_new_tokens=3),
            whole_samples=True,
            part_tokens=64,
        )
        assert (
            len([chunk async for response in local.stub.Generate(request) for chunk in response.chunks]) == 2
        )
    assert sorted(sizes) == [0, 64]


async def test_an_adapter_in_use_leaves_only_when_its_users_have_ended(
    models: Models, tmp_path: Path
) -> None:
    async with serving(models, tmp_path) as local:
        load = teacher_pb2.LoadAdapterRequest(adapter="a/1", path=str(models.adapter_a))
        await local.stub.LoadAdapter(load)
        paused = await local.pause()
        using = local.stub.Score(scores(2, adapter="a/1"))
        await until(lambda: local.servicer.counters.sequences_received == 2)
        unloading = asyncio.ensure_future(
            local.stub.UnloadAdapter(teacher_pb2.UnloadAdapterRequest(adapter="a/1"))
        )
        await asyncio.sleep(0.2)
        assert not unloading.done()
        late = [
            result.error.code
            async for response in local.stub.Score(scores(1, adapter="a/1"))
            for result in response.results
        ]
        assert late == [grpc.StatusCode.NOT_FOUND.value[0]]
        local.go_on.set()
        await paused
        results = [result async for response in using for result in response.results]
        assert [result.HasField("error") for result in results] == [False, False]
        await unloading
        assert local.adapters.adapters() == ()


@pytest.mark.faults(row=14)
async def test_adapters_are_read_only_below_the_allowed_roots(models: Models, tmp_path: Path) -> None:
    async with serving(models, tmp_path) as local:
        outside = tmp_path / "outside"
        outside.symlink_to(models.adapter_a)
        inside = models.adapter_a.parent / "link-out"
        inside.symlink_to(tmp_path)
        for path in ("/etc", str(models.adapter_a.parent / ".." / ".."), str(inside), "relative"):
            with pytest.raises(StillhouseError) as caught:
                await local.adapters.load("x", path)
            assert caught.value.reason == Reason.PATH_NOT_ALLOWED
        inside.unlink()
        loaded = await local.adapters.load("x", str(outside))  # a link counts as its target
        assert loaded.rank == 4


async def test_an_adapter_with_its_base_beside_it_is_served_on_no_other_model(
    models: Models, tmp_path: Path
) -> None:
    adapter = models.adapter_a.parent / "with-base"
    shutil.copytree(models.adapter_a, adapter)
    shutil.copytree(models.student, adapter / "base")
    try:
        async with serving(models, tmp_path) as local:
            with pytest.raises(StillhouseError, match=r"its base is the model in .*with-base/base") as caught:
                await local.adapters.load("x", str(adapter))
            assert caught.value.reason == Reason.ADAPTER_INVALID
            shutil.rmtree(adapter / "base")
            shutil.copytree(models.teacher, adapter / "base")
            assert (await local.adapters.load("x", str(adapter))).rank == 4
    finally:
        shutil.rmtree(adapter)


async def test_calls_above_the_limit_are_told_when_to_retry(models: Models, tmp_path: Path) -> None:
    async with serving(models, tmp_path, max_calls=1) as local:
        paused = await local.pause()
        first = local.stub.Score(scores(1))
        await until(lambda: local.servicer.counters.sequences_received == 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            # No write: one that meets the end of its call makes grpc.aio report INTERNAL.
            await local.stub.Score().read()
        error = from_rpc_error(caught.value, target="", service="teacher")
        assert error.reason == Reason.TOO_MANY_CALLS
        assert error.retry_after_s is not None
        local.go_on.set()
        await paused
        assert [result.last async for response in first for result in response.results] == [True]
