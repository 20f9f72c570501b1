"""vLLM's own offline inference, `LLM.generate`, in a process that responds with the seconds of one pass per JSON
line.

Run as `python -m benchmarks.teacher.peers.vllm_offline MODEL ARGUMENTS` with the arguments of `vllm.LLM` as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

from benchmarks.teacher.json_worker import keep_stdout, serve_lines
from stillhouse.teacher_service.engines.vllm.orphan_guard import OrphanGuard


def main() -> None:
    """Keeps stdout for responses: vLLM's processes write to stderr."""
    answers = keep_stdout()
    model, arguments = sys.argv[1:]
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm import LLM, SamplingParams

    guard = OrphanGuard()
    llm = LLM(model=model, **json.loads(arguments))

    async def answer(request: dict[str, Any]) -> dict[str, Any]:
        params = SamplingParams(temperature=1.0, max_tokens=request["max_tokens"])
        begin = time.perf_counter()
        outputs = llm.generate(request["prompts"], params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "tokens": sum(len(each.outputs[0].token_ids) for each in outputs)}

    asyncio.run(serve_lines(answers, "ready", answer))
    llm.llm_engine.engine_core.shutdown(timeout=30.0)
    guard.release()
    answers.close()
    sys.stderr.flush()
    os._exit(0)  # vLLM's destructors complain about unloaded modules


if __name__ == "__main__":
    main()
