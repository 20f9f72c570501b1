"""The processes of one vLLM, which end with this one: started by its arguments, and stopped with workers that outlive it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engines.vllm.engine_args import set_cpu_environment
from stillhouse.teacher_service.engines.vllm.errors import not_started
from stillhouse.teacher_service.engines.vllm.orphan_guard import OrphanGuard, kill_all
from stillhouse.teacher_service.engines.vllm.worker.plugin import switched_on

SHUTDOWN_TIMEOUT_S = 30.0
"""Time for vLLM's processes to exit before they are killed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmProcesses:
    """A running vLLM."""

    llm: Any
    """Its AsyncLLM."""
    processes: Sequence[psutil.Process] = ()
    """Those that it started."""
    guard: OrphanGuard | None = None
    """Ends them if this process cannot."""

    @classmethod
    async def start(
        cls, config: TeacherConfig, directory: Path, arguments: Callable[..., Mapping[str, Any]]
    ) -> VllmProcesses:
        """Starts vLLM and loads the model, which takes half a minute.

        `arguments` maps config and directory with `on_cpu` and `vocab_size` to those of `AsyncEngineArgs`. Raises
        `StillhouseError` (INVALID_CONFIG).
        """
        guard = await asyncio.to_thread(OrphanGuard)
        others = set(psutil.Process().children(recursive=True))
        try:
            llm = await asyncio.to_thread(_start, config, directory, arguments)
        except Exception:  # a cancelled start continues in its thread, and needs its guard
            await asyncio.to_thread(guard.release)
            raise
        processes = [
            each
            for each in psutil.Process().children(recursive=True)
            if _is_vllm(each) and each not in others
        ]
        return cls(llm=llm, processes=processes, guard=guard)

    def stop(self) -> None:
        """Ends vLLM, and workers that outlive a killed parent."""
        self.llm.shutdown(timeout=SHUTDOWN_TIMEOUT_S)
        # Its destructor calls it again, when the modules that it needs may be gone.
        self.llm.shutdown = lambda: None
        kill_all(self.processes)
        if self.guard is not None:
            self.guard.release()


def _start(config: TeacherConfig, directory: Path, arguments: Callable[..., Mapping[str, Any]]) -> Any:
    from transformers import AutoConfig
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    text_config = AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config()
    on_cpu = bool(current_platform.is_cpu())
    if on_cpu:
        set_cpu_environment(config)
    made = arguments(config, directory, on_cpu=on_cpu, vocab_size=int(text_config.vocab_size))
    try:
        with switched_on() if "worker_extension_cls" in made else nullcontext():
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**made))
    except Exception as error:  # any error of vLLM on a model, a quantisation method or a platform
        raise not_started(config.model, error) from error


def _is_vllm(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.name().startswith("VLLM"))
    return False
