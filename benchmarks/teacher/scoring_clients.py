"""Clients for scoring: ours, and vLLM's over HTTP, each timed from the first request to the last array."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil

from benchmarks.teacher.timed_pass import Pass, Sequences
from stillhouse.client.api import ScoreItem, Teacher
from stillhouse.protos.stillhouse.v1 import teacher_pb2

HTTP_TIMEOUT_S = 600.0


class CountingTeacher(Teacher):
    """Client of the teacher service that counts the bytes of responses, and the processor time of the service."""

    def __init__(self, target: str, pid: int) -> None:
        super().__init__(target)
        self._pid = pid
        self.num_bytes = 0
        self.stub.Score = self.channel.stream_stream(
            "/stillhouse.v1.TeacherService/Score",
            request_serializer=teacher_pb2.ScoreRequest.SerializeToString,
            response_deserializer=self._counting(teacher_pb2.ScoreResponse.FromString),
        )
        self.stub.Generate = self.channel.unary_stream(
            "/stillhouse.v1.TeacherService/Generate",
            request_serializer=teacher_pb2.GenerateRequest.SerializeToString,
            response_deserializer=self._counting(teacher_pb2.GenerateResponse.FromString),
        )

    def cpu_s(self) -> float:
        """Processor seconds of the service's processes so far."""
        service = psutil.Process(self._pid)
        times = (each.cpu_times() for each in (service, *service.children(recursive=True)))
        return sum(each.user + each.system for each in times)

    def _counting(self, parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        def read(data: bytes) -> Any:
            self.num_bytes += len(data)
            return parse(data)

        return read


def score(
    teacher: CountingTeacher,
    sequences: Sequences,
    top_k: int,
    *,
    starts: list[int] | None = None,
    packed: bool = False,
    draws: int = 0,
) -> Pass:
    """Our client, one stream, logprobs as float16, rows from position 1 or `starts`; with `packed` ids take the
    fewest bits; with as many stratified draws of the tail."""
    starts = [1] * len(sequences) if starts is None else starts
    before, cpu_before_s = teacher.num_bytes, teacher.cpu_s()
    rows = 0
    begin = time.perf_counter()
    items = (
        ScoreItem(id=index, token_ids=ids, start=start)
        for index, (ids, start) in enumerate(zip(sequences, starts, strict=True))
    )
    drawn: dict[str, Any] = {}
    if draws:
        drawn = {"num_sampled_tokens": draws, "sample_tail": True, "stratified_samples": True}
    for answer in teacher.score(items, top_k=top_k, float16=True, pack_token_ids=packed, **drawn):
        if answer.error is not None:
            raise answer.error
        assert answer.distributions is not None
        assert answer.distributions.token_ids.shape[1] == top_k
        rows += answer.distributions.num_rows
    seconds = time.perf_counter() - begin
    require_rows(rows, sequences, starts)
    return Pass(
        tokens=sum(map(len, sequences)),
        seconds=seconds,
        num_bytes=teacher.num_bytes - before,
        teacher_cpu_s=teacher.cpu_s() - cpu_before_s,
    )


def score_http(url: str, sequences: Sequences, top_k: int, *, concurrency: int) -> Pass:
    """vLLM's own server, one request per sequence; its JSON is read into the same arrays."""
    return asyncio.run(_score_http(url, sequences, top_k, concurrency))


async def _score_http(url: str, sequences: Sequences, top_k: int, concurrency: int) -> Pass:
    import aiohttp

    from benchmarks.teacher.peers.http_responses import scored

    waiting = list(sequences)
    received = rows = 0

    async def work(session: aiohttp.ClientSession) -> None:
        nonlocal received, rows
        while waiting:
            body = {
                "model": "model",
                "prompt": waiting.pop().tolist(),
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": top_k,
            }
            async with session.post(f"{url}/v1/completions", json=body) as response:
                text = await response.read()
                if response.status != 200:
                    raise RuntimeError(f"vLLM's server answers {response.status}: {text[:300]!r}")
            received += len(text)
            token_ids, _ = _http_rows(scored.decode(text).choices[0].prompt_logprobs[1:], top_k)
            rows += len(token_ids)

    # Its event loop blocks for seconds with many logprobs, and kept connections are then reset.
    connector = aiohttp.TCPConnector(limit=concurrency, force_close=True)
    timeout = aiohttp.ClientTimeout(total=HTTP_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        begin = time.perf_counter()
        await asyncio.gather(*(work(session) for _ in range(concurrency)))
        seconds = time.perf_counter() - begin
    require_rows(rows, sequences, [1] * len(sequences))
    return Pass(tokens=sum(map(len, sequences)), seconds=seconds, num_bytes=received)


def _http_rows(positions: list[Any], top_k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Ids and logprobs [T, K] of the top-k tokens."""
    token_ids = np.empty((len(positions), top_k), dtype=np.int32)
    logprobs = np.empty((len(positions), top_k), dtype=np.float32)
    for row, position in enumerate(positions):
        for token, candidate in position.items():
            rank = candidate.rank
            if rank <= top_k:
                token_ids[row, rank - 1] = token
                logprobs[row, rank - 1] = candidate.logprob
    return token_ids, logprobs


def require_rows(rows: int, sequences: Sequences, starts: list[int]) -> None:
    """Raises `RuntimeError` unless every position from its sequence's start on was scored."""
    expected = sum(len(sequence) - start for sequence, start in zip(sequences, starts, strict=True))
    if rows != expected:
        raise RuntimeError(f"{rows} rows came for {expected}")
