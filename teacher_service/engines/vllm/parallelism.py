"""Tensor, pipeline and data parallelism: vLLM's arguments, and core binding of workers on a CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.telemetry.host_cores import usable_cores
from stillhouse.teacher_service.config import TeacherConfig

_NODES = Path("/sys/devices/system/node")


def num_workers(config: TeacherConfig) -> int:
    """Worker processes over all copies of the model."""
    return config.tensor_parallel_size * config.pipeline_parallel_size * config.data_parallel_size


def is_one_process(config: TeacherConfig) -> bool:
    """True if the only worker on a CPU runs in its scheduler's process: not with several NUMA nodes or bound cores,
    which need vLLM's own processes."""
    bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind") != "nobind"
    return num_workers(config) == 1 and _num_nodes() == 1 and not bound


def num_cores() -> int:
    """Physical cores available to this process."""
    usable = usable_cores()
    return min(usable, psutil.cpu_count(logical=False) or usable)


def parallel_arguments(config: TeacherConfig, *, on_cpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs`; vLLM itself checks the sizes against model and host.

    Raises `StillhouseError` (INVALID_CONFIG) for stages on a CPU: vLLM would start and die at its first request,
    since it allocates the buffers between stages in a warm-up that it skips where nothing is compiled.
    """
    if on_cpu and config.pipeline_parallel_size > 1:
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            f"--pipeline-parallel-size is {config.pipeline_parallel_size}; vLLM's CPU build supports one stage only. "
            "Split the model with --tensor-parallel-size instead.",
        )
    return {
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "data_parallel_size": config.data_parallel_size,
    }


def set_cpu_binding(config: TeacherConfig) -> None:
    """Binds each worker to its own cores (CPU build only), unless the operator chose.

    vLLM does so automatically with one NUMA node per worker, and refuses to start with fewer nodes than workers.
    """
    workers = num_workers(config)
    if workers > 1 and _num_nodes() < workers:
        binding = cores_of_workers(sorted(os.sched_getaffinity(0)), workers)
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", binding)


def cores_of_workers(cores: Sequence[int], workers: int) -> str:
    """Cores in equal shares in vLLM's syntax, "0,1|2,3". With fewer cores than workers, some share one."""
    share = max(1, len(cores) // workers)
    shares = [
        [cores[(worker * share + each) % len(cores)] for each in range(share)] for worker in range(workers)
    ]
    return "|".join(",".join(map(str, each)) for each in shares)


def _num_nodes() -> int:
    return max(1, sum(1 for _ in _NODES.glob("node[0-9]*")))
