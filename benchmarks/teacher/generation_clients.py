"""Clients for generation: ours, and vLLM's over HTTP, streamed, each timed to the last array."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np

from benchmarks.teacher.scoring_clients import HTTP_TIMEOUT_S, CountingTeacher
from benchmarks.teacher.timed_pass import Pass, Sequences

READ_BUFFER_BYTES = 2**22


def generate(teacher: CountingTeacher, prompts: Sequences, new_tokens: int, top_k: int) -> Pass:
    """Our client, one call for all prompts, with top-k distributions at each position, or none at 0."""
    before = teacher.num_bytes
    written = 0
    begin = time.perf_counter()
    for piece in teacher.generate(
        [prompt.tolist() for prompt in prompts],
        temperature=1.0,
        max_new_tokens=new_tokens,
        top_k_logprobs=top_k,
    ):
        if piece.error is not None:
            raise piece.error
        written += len(piece.token_ids)
        if top_k and len(piece.token_ids):
            assert piece.distributions is not None
            assert piece.distributions.token_ids.shape == (len(piece.token_ids), top_k)
    seconds = time.perf_counter() - begin
    return Pass(tokens=written, seconds=seconds, num_bytes=teacher.num_bytes - before)


def generate_http(url: str, prompts: Sequences, new_tokens: int, top_k: int, *, concurrency: int) -> Pass:
    """vLLM's own server, one streamed request per prompt; events with `top_k` logprobs are read into arrays."""
    return asyncio.run(_generate_http(url, prompts, new_tokens, top_k, concurrency))


async def _generate_http(url: str, prompts: Sequences, new_tokens: int, top_k: int, concurrency: int) -> Pass:
    import aiohttp

    from benchmarks.teacher.peers.http_responses import event

    waiting = list(prompts)
    received = written = 0

    async def work(session: aiohttp.ClientSession) -> None:
        nonlocal received, written
        while waiting:
            body = {
                "model": "model",
                "prompt": waiting.pop().tolist(),
                "max_tokens": new_tokens,
                "temperature": 1.0,
                "logprobs": top_k,
                "return_tokens_as_token_ids": True,  # ids cannot be recovered from text
                "stream": True,
            }
            async with session.post(f"{url}/v1/completions", json=body) as response:
                if response.status != 200:
                    raise RuntimeError(f"vLLM's server answers {response.status}: {await response.text()}")
                async for line in response.content:
                    received += len(line)
                    if not line.startswith(b"data: {"):
                        continue
                    for choice in event.decode(line[6:]).choices:
                        if choice.logprobs is not None:
                            written += len(_rows(choice.logprobs.top_logprobs, top_k)[0])

    timeout = aiohttp.ClientTimeout(total=HTTP_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=concurrency, force_close=True)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, read_bufsize=READ_BUFFER_BYTES
    ) as session:
        begin = time.perf_counter()
        await asyncio.gather(*(work(session) for _ in range(concurrency)))
        seconds = time.perf_counter() - begin
    return Pass(tokens=written, seconds=seconds, num_bytes=received)


def _rows(positions: list[dict[str, float]], top_k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Ids and logprobs [T, K]; the sampled token, which may be an extra one, comes first."""
    token_ids = np.empty((len(positions), top_k), dtype=np.int32)
    logprobs = np.empty((len(positions), top_k), dtype=np.float32)
    for row, position in enumerate(positions):
        ids = np.fromiter((int(name[9:]) for name in position), dtype=np.int32)  # "token_id:123"
        token_ids[row] = ids[len(ids) - top_k :]
        logprobs[row] = np.fromiter(position.values(), dtype=np.float32)[len(ids) - top_k :]
    return token_ids, logprobs
