"""Parts become messages: full ones at once, a single one soon, an error after earlier parts."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from stillhouse.protos.rpc.channel import FLUSH_BYTES, MAX_MESSAGE_BYTES
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.engine import GeneratedChunk
from stillhouse.teacher_service.rpc import sample_chunks
from stillhouse.teacher_service.rpc.response_batcher import PART_BYTES, ResponseBatcher


async def test_small_parts_share_a_message_and_large_ones_never_exceed_it() -> None:
    batcher: ResponseBatcher[int] = ResponseBatcher()
    sizes = [10, 20, 30, PART_BYTES, PART_BYTES, 5, PART_BYTES]

    async def fill() -> None:
        for size in sizes:
            batcher.put(size, size)
            await asyncio.sleep(0)
        batcher.end()

    filling = asyncio.create_task(fill())
    messages = [parts async for parts in batcher.batches()]
    await filling
    assert [size for parts in messages for size in parts] == sizes
    assert max(sum(parts) for parts in messages) < MAX_MESSAGE_BYTES
    assert messages[0][:3] == [10, 20, 30]


async def test_a_single_part_is_flushed_soon() -> None:
    batcher: ResponseBatcher[int] = ResponseBatcher()
    gathered = batcher.batches()
    batcher.put(1, 1)
    begin = time.monotonic()
    assert await anext(gathered) == [1]
    assert time.monotonic() - begin < 5
    await gathered.aclose()


async def test_an_error_comes_after_earlier_parts() -> None:
    batcher: ResponseBatcher[int] = ResponseBatcher()
    batcher.put(1, 1)
    batcher.end(ValueError("broken"))
    gathered = batcher.batches()
    assert await anext(gathered) == [1]
    with pytest.raises(ValueError, match="broken"):
        await anext(gathered)


async def test_parts_put_before_the_writer_starts_fill_messages() -> None:
    batcher: ResponseBatcher[int] = ResponseBatcher()
    for number in range(100):
        batcher.put(number, FLUSH_BYTES // 10)
    batcher.end()
    messages = [parts async for parts in batcher.batches()]
    assert [part for parts in messages for part in parts] == list(range(100))
    assert {len(parts) for parts in messages} == {11, 1}


def chunk(length: int, start: int, finish: str = "") -> GeneratedChunk:
    numbers = np.arange(start, start + length)
    return GeneratedChunk(
        token_ids=numbers.astype(np.int32),
        sampling_logprobs=-numbers.astype(np.float32),
        distributions=Distributions(
            start=start,
            token_ids=numbers.astype(np.int32)[:, None],
            logprobs=np.zeros((length, 1), np.float32),
            target_logprobs=np.zeros(length, np.float32),
            log_tail=np.full(length, -np.inf, np.float32),
        ),
        finish=finish,  # type: ignore[arg-type]
    )


def test_a_chunk_cut_and_joined_is_unchanged() -> None:
    whole = chunk(10, start=4, finish="stop")
    parts = list(sample_chunks.cut(whole, 3 * sample_chunks.num_bytes(chunk(1, start=4))))
    assert [len(part.token_ids) for part in parts] == [3, 3, 3, 1]
    assert [part.finish for part in parts] == ["", "", "", "stop"]
    joined = sample_chunks.join(parts)
    assert np.array_equal(joined.token_ids, whole.token_ids)
    assert np.array_equal(joined.sampling_logprobs, whole.sampling_logprobs)
    assert joined.distributions is not None
    assert joined.distributions.num_rows == 10
    assert joined.finish == "stop"


def test_pending_tokens_are_released_once_certain_and_never_after_a_stop() -> None:
    held = sample_chunks.PendingChunks()
    held.add(chunk(3, start=1))
    assert held.release(1, "").token_ids.tolist() == [1]
    held.add(chunk(4, start=4))
    middle = held.release(5, "")
    assert middle.token_ids.tolist() == [2, 3, 4, 5]
    assert middle.distributions is not None
    assert middle.distributions.start == 2
    last = held.release(6, "stop")
    assert last.token_ids.tolist() == [6]
    assert last.finish == "stop"
