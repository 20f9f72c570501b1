"""Three ways to have the same sequences read by vLLM, each timed from the first request to the last array in hand."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from protos.channel import connect_async
from protos.stillhouse.v1 import teacher_pb2, teacher_pb2_grpc
from protos.tensor_codec import decode_distributions, encode

Sequences = Sequence[np.ndarray[Any, np.dtype[np.int32]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One pass over all sequences."""

    tokens_per_s: float
    """Tokens of the sequences, not rows of the answers."""
    bytes_per_token: float
    """Of the answers on the wire, without the framing of HTTP; 0 where nothing is sent."""


def random_sequences(
    count: int, length: int, vocab_size: int, seed: int
) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    """Sequences that no cache of prefixes has seen."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab_size, length, dtype=np.int32) for _ in range(count)]


async def time_grpc(target: str, sequences: Sequences, top_k: int, vocab_size: int) -> Timing:
    """One Score stream of the teacher service."""
    received = 0
    rows = 0
    async with connect_async(target) as channel:
        stub: Any = teacher_pb2_grpc.TeacherServiceStub(channel)
        await channel.channel_ready()
        begin = time.perf_counter()
        unanswered = len(sequences)
        async for response in stub.Score(_requests(sequences, top_k)):
            received += response.ByteSize()
            for result in response.results:
                if result.HasField("error"):
                    raise RuntimeError(f"the teacher answers: {result.error.message}")
                got = decode_distributions(
                    result.distributions, vocab_size=vocab_size, max_rows=1 << 20, max_top_k=top_k
                )
                rows += got.num_rows
                unanswered -= result.last
        seconds = time.perf_counter() - begin
    return _timing(sequences, rows, seconds, received, unanswered)


async def _requests(sequences: Sequences, top_k: int) -> AsyncIterator[teacher_pb2.ScoreRequest]:
    yield teacher_pb2.ScoreRequest(config=teacher_pb2.DistributionConfig(top_k=top_k))
    for index, sequence in enumerate(sequences):
        item = teacher_pb2.ScoreSequence(sequence_id=index, token_ids=encode(sequence))
        yield teacher_pb2.ScoreRequest(sequence=item)


async def time_http(url: str, model: str, sequences: Sequences, top_k: int, concurrency: int) -> Timing:
    """vLLM's own server, one request a sequence; its JSON is read into the same arrays."""
    import aiohttp

    waiting = list(enumerate(sequences))
    received = 0
    rows = 0

    async def work(session: aiohttp.ClientSession) -> None:
        nonlocal received, rows
        while waiting:
            _, sequence = waiting.pop()
            body = {
                "model": model,
                "prompt": sequence.tolist(),
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": top_k,
            }
            async with session.post(f"{url}/v1/completions", json=body) as response:
                text = await response.read()
                if response.status != 200:
                    raise RuntimeError(f"vLLM's server answers {response.status}: {text[:300]!r}")
            received += len(text)
            rows += len(_http_rows(json.loads(text), top_k)[0])

    # Its event loop stands still for seconds with many logprobs, and connections that are kept are then reset.
    connector = aiohttp.TCPConnector(limit=concurrency, force_close=True)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        begin = time.perf_counter()
        await asyncio.gather(*(work(session) for _ in range(concurrency)))
        seconds = time.perf_counter() - begin
    return _timing(sequences, rows, seconds, received, 0)


def _http_rows(answer: dict[str, Any], top_k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Ids and logprobs [T, K] of the likeliest tokens."""
    positions = answer["choices"][0]["prompt_logprobs"][1:]
    token_ids = np.empty((len(positions), top_k), dtype=np.int32)
    logprobs = np.empty((len(positions), top_k), dtype=np.float32)
    for row, position in enumerate(positions):
        for token, candidate in position.items():
            rank = candidate["rank"]
            if rank <= top_k:
                token_ids[row, rank - 1] = int(token)
                logprobs[row, rank - 1] = candidate["logprob"]
    return token_ids, logprobs


def _timing(sequences: Sequences, rows: int, seconds: float, received: int, unanswered: int) -> Timing:
    expected = sum(len(sequence) - 1 for sequence in sequences)
    if rows != expected or unanswered:
        raise RuntimeError(f"{rows} rows came for {expected}")
    num_tokens = sum(map(len, sequences))
    return Timing(tokens_per_s=num_tokens / seconds, bytes_per_token=received / num_tokens)
