"""The teacher's own engine without logprobs, in a process that responds with the seconds of one pass per JSON line.

Run as `python -m benchmarks.teacher.peers.vllm_engine MODEL OPTIONS` with the teacher's engine options as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.teacher.json_worker import keep_stdout, serve_lines
from benchmarks.teacher.timed_pass import PassInput
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engines.vllm.engine_args import (
    engine_arguments,
    set_cpu_environment,
    set_environment,
)
from stillhouse.teacher_service.engines.vllm.orphan_guard import OrphanGuard


async def serve(config: TeacherConfig, answers: Any) -> None:
    """Times passes until stdin ends."""
    from transformers import AutoConfig
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    vocab_size = int(AutoConfig.from_pretrained(config.model).vocab_size)
    on_cpu = bool(current_platform.is_cpu())
    if on_cpu:
        set_cpu_environment(config)
    arguments = engine_arguments(config, Path(config.model), on_cpu=on_cpu, vocab_size=vocab_size)
    guard = OrphanGuard()
    llm = await asyncio.to_thread(lambda: AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments)))
    numbers = iter(range(1 << 30))

    async def answer(request: dict[str, Any]) -> float:
        return await _time(llm, request.pop("concurrency"), PassInput(**request), next(numbers))

    try:
        await serve_lines(answers, "ready", answer)
    finally:
        await asyncio.to_thread(llm.shutdown, 30.0)
        guard.release()


async def _time(llm: Any, concurrency: int, work: PassInput, number: int) -> float:
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    room = asyncio.Semaphore(concurrency)

    async def read(name: str, ids: list[int]) -> None:
        async with room:
            async for _ in llm.generate(tokens_input(ids), params, name):
                pass

    prompts = [sequence.tolist() for sequence in work.sequences()]
    begin = time.perf_counter()
    await asyncio.gather(*(read(f"{number}-{index}", ids) for index, ids in enumerate(prompts)))
    return time.perf_counter() - begin


def main() -> None:
    """Keeps stdout for responses: vLLM's processes write to stderr."""
    answers = keep_stdout()
    model, options = sys.argv[1:]
    config = TeacherConfig(model=model, engine="vllm", **json.loads(options))
    set_environment(config)
    asyncio.run(serve(config, answers))
    answers.close()
    sys.stderr.flush()
    os._exit(0)  # vLLM's destructors complain about unloaded modules


if __name__ == "__main__":
    main()
