"""The teacher's own engine without logprobs, in a process that reads passes to time from stdin and prints seconds to stdout.

Run as `python -m benchmarks.plain_engine MODEL DTYPE MAX_BATCH_TOKENS`; a line "COUNT LENGTH SEED" is answered by a line.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.scoring_clients import random_sequences
from teacher_service.config import TeacherConfig
from teacher_service.vllm_guard import Guard
from teacher_service.vllm_setup import engine_arguments, set_cpu_environment, set_environment


async def serve(config: TeacherConfig, answers: Any) -> None:
    """Times passes until stdin ends."""
    from transformers import AutoConfig
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    vocab_size = int(AutoConfig.from_pretrained(config.model).vocab_size)
    on_cpu = bool(current_platform.is_cpu())
    if on_cpu:
        set_cpu_environment()
    arguments = engine_arguments(config, Path(config.model), on_cpu=on_cpu, vocab_size=vocab_size)
    guard = Guard()
    llm = await asyncio.to_thread(lambda: AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments)))
    try:
        print("ready", file=answers, flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            count, length, seed = map(int, line.split())
            print(await _time(llm, count, length, seed, vocab_size), file=answers, flush=True)
    finally:
        await asyncio.to_thread(llm.shutdown, 30.0)
        guard.release()


async def _time(llm: Any, count: int, length: int, seed: int, vocab_size: int) -> float:
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )

    async def read(name: str, ids: list[int]) -> None:
        async for _ in llm.generate(tokens_input(ids), params, name):
            pass

    prompts = [sequence.tolist() for sequence in random_sequences(count, length, vocab_size, seed)]
    begin = time.perf_counter()
    await asyncio.gather(*(read(f"{seed}-{index}", ids) for index, ids in enumerate(prompts)))
    return time.perf_counter() - begin


def main() -> None:
    """Keeps stdout for answers: vLLM's processes write to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model, dtype, max_batch_tokens = sys.argv[1:]
    config = TeacherConfig(
        model=model, engine="vllm", dtype=dtype, max_adapters=0, max_batch_tokens=int(max_batch_tokens)
    )
    set_environment(config)
    asyncio.run(serve(config, answers))
    answers.close()
    sys.stderr.flush()
    os._exit(0)  # vLLM's destructors complain about modules that are gone


if __name__ == "__main__":
    main()
