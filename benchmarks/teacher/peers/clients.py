"""Clients of peers, run in the peers' environment: TRL's client of vLLM's HTTP server, and one of vLLM's gRPC server.

Run as `python -m benchmarks.teacher.peers.clients trl|vllm_grpc`; requests and responses are lines of JSON.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from importlib import import_module
from typing import Any

import numpy as np

from benchmarks.teacher.json_worker import keep_stdout, serve_lines
from benchmarks.teacher.timed_pass import PassInput

TRL_CLIENT = "trl.generation.vllm_client"
GRPC_MESSAGES = "smg_grpc_proto"


async def score_trl(request: dict[str, Any]) -> dict[str, Any]:
    """`VLLMClient.get_sequence_logprobs` of all sequences, read into arrays as TRL's trainers do.

    `chunk_size` sequences per request, `concurrency` concurrent requests; at 0 all go in one, TRL's default.
    """
    client = import_module(TRL_CLIENT).VLLMClient(base_url=request["url"])
    sequences = [each.tolist() for each in PassInput(**request["work"]).sequences()]
    begin = time.perf_counter()
    answer = client.get_sequence_logprobs(
        sequences,
        [1] * len(sequences),
        top_logprobs=request["top_k"],
        chunk_size=request["chunk_size"],
        max_concurrent_requests=request["concurrency"],
    )
    rows = 0
    for token_ids, logprobs in zip(answer["logprob_token_ids"], answer["logprobs"], strict=True):
        rows += np.asarray(token_ids, dtype=np.int32).shape[0]
        assert np.asarray(logprobs, dtype=np.float32).shape[1] == request["top_k"]
    return {"seconds": time.perf_counter() - begin, "rows": rows, "num_bytes": 0}


class VllmGrpc:
    """Client of `vllm serve --grpc`, one call per sequence."""

    def __init__(self) -> None:
        self._channel: Any = None
        self._messages = import_module(GRPC_MESSAGES).vllm_engine_pb2
        self._generate: Any = None
        self._numbers = iter(range(1 << 30))
        self.num_bytes = 0

    async def score(self, request: dict[str, Any]) -> dict[str, Any]:
        """Top-k of every position but the first."""

        def read(answer: Any) -> int:
            return self._top_rows(answer.complete.input_logprobs.top_logprobs, request["top_k"], skip=1)

        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": request["top_k"]}
        return await self._run(request, sampling, stream=False, read=read)

    async def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        """Streamed tokens with their top-k."""

        def read(answer: Any) -> int:
            if answer.WhichOneof("response") != "chunk":
                return 0  # repeats what the last chunk had
            return self._top_rows(answer.chunk.output_logprobs.top_logprobs, request["top_k"], skip=0)

        sampling = {
            "max_tokens": request["new_tokens"],
            "temperature": 1.0,
            "logprobs": request["top_k"],
            "skip_special_tokens": True,
        }
        return await self._run(request, sampling, stream=True, read=read)

    async def _run(
        self, request: dict[str, Any], sampling: dict[str, Any], *, stream: bool, read: Any
    ) -> dict[str, Any]:
        await self._connect(request["target"])
        messages = self._messages
        waiting = [each.tolist() for each in PassInput(**request["work"]).sequences()]
        before, rows = self.num_bytes, 0

        async def work() -> None:
            nonlocal rows
            while waiting:
                asked = messages.GenerateRequest(
                    request_id=str(next(self._numbers)),
                    tokenized=messages.TokenizedInput(input_ids=waiting.pop()),
                    sampling_params=messages.SamplingParams(**sampling),
                    stream=stream,
                )
                answers: AsyncIterator[Any] = self._generate(asked)
                async for answer in answers:
                    rows += read(answer)

        begin = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(request["concurrency"])))
        return {
            "seconds": time.perf_counter() - begin,
            "rows": rows,
            "num_bytes": self.num_bytes - before,
        }

    async def _connect(self, target: str) -> None:
        import grpc.aio

        if self._channel is not None:
            return
        self._channel = grpc.aio.insecure_channel(
            target, options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        )
        await self._channel.channel_ready()

        def parse(data: bytes) -> Any:
            self.num_bytes += len(data)
            return self._messages.GenerateResponse.FromString(data)

        self._generate = self._channel.unary_stream(
            "/vllm.grpc.engine.VllmEngine/Generate",
            request_serializer=self._messages.GenerateRequest.SerializeToString,
            response_deserializer=parse,
        )

    def _top_rows(self, positions: Any, top_k: int, *, skip: int) -> int:
        """Reads positions into arrays [T, K]; returns their number."""
        num_rows = len(positions) - skip
        if num_rows <= 0:
            return 0
        token_ids = np.empty((num_rows, top_k), dtype=np.int32)
        logprobs = np.empty((num_rows, top_k), dtype=np.float32)
        for row in range(num_rows):
            position = positions[row + skip]
            token_ids[row] = np.array(position.token_ids, dtype=np.int32)
            logprobs[row] = np.array(position.values, dtype=np.float32)
        return num_rows


def main() -> None:
    """Serves one peer's requests until stdin ends."""
    answers = keep_stdout()
    kinds: dict[str, Any] = {"trl": score_trl}
    if sys.argv[1] == "trl":
        import_module(TRL_CLIENT)  # half a minute, before anything is timed
    else:
        peer = VllmGrpc()
        kinds = {"vllm_grpc": peer.score, "vllm_grpc_generate": peer.generate}

    async def answer(request: dict[str, Any]) -> Any:
        return await kinds[request["kind"]](request)

    asyncio.run(serve_lines(answers, "ready", answer))


if __name__ == "__main__":
    main()
