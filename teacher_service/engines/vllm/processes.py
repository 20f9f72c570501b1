"""The processes of one vLLM, which end with this one: started by its arguments, and stopped with workers that outlive it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import structlog

from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engines.vllm.engine_args import (
    is_cpu_build,
    preload_libraries,
    set_cpu_environment,
)
from stillhouse.teacher_service.engines.vllm.errors import not_started
from stillhouse.teacher_service.engines.vllm.orphan_guard import OrphanGuard, kill_all
from stillhouse.teacher_service.engines.vllm.parallelism import is_one_process
from stillhouse.teacher_service.engines.vllm.worker.plugin import switched_on
from stillhouse.teacher_service.engines.vllm.worker.warm_start import Warm

log = structlog.get_logger(__name__)

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
        cls,
        config: TeacherConfig,
        directory: Path,
        arguments: Callable[..., Mapping[str, Any]],
        warm: Warm | None = None,
    ) -> VllmProcesses:
        """Starts vLLM, whose engine `warm` becomes, and loads the model, which takes some twenty seconds.

        `arguments` maps config and directory with `on_cpu` and `vocab_size` to those of `AsyncEngineArgs`. Raises
        `StillhouseError` (INVALID_CONFIG).
        """
        guard = await asyncio.to_thread(OrphanGuard)
        others = {
            each for each in psutil.Process().children(recursive=True) if not warm or each.pid != warm.pid
        }
        try:
            llm = await asyncio.to_thread(_start, config, directory, arguments, warm)
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


def start_warm(config: TeacherConfig) -> Warm | None:
    """Starts the process that imports vLLM beside this one, where it is sure to become the engine: on a CPU, with one worker."""
    if (
        not is_cpu_build()
        or not is_one_process(config)
        or os.environ["VLLM_WORKER_MULTIPROC_METHOD"] != "spawn"
    ):
        return None
    set_cpu_environment(config)
    preload_libraries()
    try:
        return Warm()
    except (OSError, AttributeError, TypeError) as error:
        log.warning("vLLM's engine is started without a warm process", why=str(error))
        return None


def _start(
    config: TeacherConfig,
    directory: Path,
    arguments: Callable[..., Mapping[str, Any]],
    warm: Warm | None,
) -> Any:
    from transformers import AutoConfig
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    settings = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    text_config = settings.get_text_config()
    on_cpu = bool(current_platform.is_cpu())
    if on_cpu:
        set_cpu_environment(config)
    made = arguments(config, directory, on_cpu=on_cpu, vocab_size=int(text_config.vocab_size))
    try:
        with (
            switched_on() if "worker_extension_cls" in made else nullcontext(),
            warm.offered() if warm else nullcontext(),
        ):
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**made))
    except Exception as error:  # any error of vLLM on a model, a quantisation method or a platform
        raise not_started(config.model, error) from error


def _is_vllm(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.name().startswith("VLLM"))
    return False
