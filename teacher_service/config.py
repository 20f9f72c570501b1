"""Every setting of the teacher service and its default: checked once, here, before anything is loaded."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from stillhouse.protos.errors import Reason, StillhouseError

EngineName = Literal["vllm", "hf"]
TierName = Literal["worker", "raw", "public"]
DTYPES = ("auto", "float32", "bfloat16", "float16")


BATCH_TOKENS = 8192
"""Tokens that an engine computes at once, unless it is told or knows better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """What one teacher process loads, how far requests may go, and where it listens."""

    model: str
    """Directory in Hugging Face layout, or a hub id."""
    engine: EngineName = "hf"
    """"vllm" or "hf"."""
    tier: Literal["auto"] | TierName = "auto"
    """How rows leave vLLM: "auto" takes the best of "worker", "raw" and "public" that passes its check at the start."""
    adapters: tuple[tuple[str, Path], ...] = ()
    """(name, directory) of the LoRA adapters to load at the start."""
    max_adapters: int = 4
    """Adapters that can be loaded at once; 0 serves the base model only."""
    max_lora_rank: int = 64
    """Largest rank of an adapter."""
    revision: str = ""
    """Branch, tag or commit on the hub; empty means its default."""
    dtype: str = "auto"
    """"auto" is float32 on a CPU and the checkpoint's own type elsewhere."""
    quantization: str = ""
    """Quantisation method that the engine is told, in its own words; empty takes what the checkpoint says."""
    max_sequence_tokens: int | None = None
    """Longest sequence; None takes the model's own limit."""
    max_top_k: int = 256
    """Largest top_k that requests may ask for, at most 256."""
    max_query_tokens: int = 256
    """Most ids per position in query_token_ids."""
    max_inflight_sequences: int = 64
    """Unanswered sequences of one Score call, and samples that one Generate call writes at once."""
    max_prompts: int = 1024
    """Prompts of one Generate call."""
    max_calls: int = 256
    """Calls at once, of which one client alone gets three quarters; one more is answered TOO_MANY_CALLS."""
    max_inflight_tokens: int | None = None
    """Tokens inside the engine at once, of which one client alone gets three quarters; what is above waits for its
    turn. None means eight batches of the engine."""
    max_batch_tokens: int | None = None
    """Tokens that the engine computes at once; None means 8192, under vLLM on a CPU fewer: `vllm_setup`."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that vLLM takes, in (0, 1]."""
    tensor_parallel_size: int = 1
    """GPUs, or on a CPU groups of cores, that vLLM splits every layer over."""
    pipeline_parallel_size: int = 1
    """Stages of layers that vLLM splits the model into."""
    data_parallel_size: int = 1
    """Copies of the model that vLLM serves side by side."""
    kv_cache_gib: float = 1.0
    """Memory of vLLM's KV cache on a CPU, in GiB."""
    threads: int | None = None
    """Threads of the computation on a CPU; None means all cores of the process. Fixed for a process's life."""
    seed: int = 0
    """Seed of samples that ask for none."""
    allow_roots: tuple[Path, ...] = ()
    """Directories under which LoadAdapter may read; resolved."""
    upload_dir: Path | None = None
    """Where uploaded adapters are kept; None means the user's cache directory."""
    max_upload_bytes: int = 2 << 30
    """Largest adapter that UploadAdapter takes, of which four are kept; 0 takes none."""
    listen: str = "127.0.0.1:7401"
    """HOST:PORT or unix:PATH."""
    address_file: Path | None = None
    """Where the bound address is written once the model answers."""
    insecure: bool = False
    """Allow another address than loopback without TLS."""
    tls_cert: Path | None = None
    """Certificate chain, PEM."""
    tls_key: Path | None = None
    """Private key, PEM."""
    tls_client_ca: Path | None = None
    """Authority of client certificates, PEM; set, it makes them required."""
    tokens: Path | None = None
    """Tokens that calls need; None demands none."""
    audit_log: Path | None = None
    """Where it is written who did what, as JSON lines; None writes nothing."""
    metrics_host: str = "127.0.0.1"
    """Where Prometheus finds metrics."""
    metrics_port: int | None = None
    """None means 100 above the port of `listen`, unless that is any free one; 0 means no metrics."""
    reflection: bool | None = None
    """Server reflection; None means on loopback only."""
    shutdown_grace_s: float = 30.0
    """Seconds that running calls get after SIGTERM."""
    log_level: str = "info"
    """Least level that is logged."""

    def __post_init__(self) -> None:
        """Raises `StillhouseError` with INVALID_CONFIG or MODEL_NOT_FOUND, naming flag, value and remedy."""
        _check_model_path(self.model)
        if self.dtype not in DTYPES:
            raise _bad("--dtype", self.dtype, f"Valid are {', '.join(DTYPES)}.")
        for flag, value, lowest, highest in (
            ("--max-top-k", self.max_top_k, 1, 256),
            ("--max-adapters", self.max_adapters, 0, 1024),
            ("--max-lora-rank", self.max_lora_rank, 1, 1024),
            ("--max-query-tokens", self.max_query_tokens, 1, 4096),
            ("--max-inflight-sequences", self.max_inflight_sequences, 1, 65536),
            ("--max-prompts", self.max_prompts, 1, 65536),
            ("--max-calls", self.max_calls, 1, 65536),
            ("--max-inflight-tokens", self.max_inflight_tokens, 1, 1 << 30),
            ("--max-batch-tokens", self.max_batch_tokens, 1, 1 << 24),
            ("--tensor-parallel-size", self.tensor_parallel_size, 1, 1024),
            ("--pipeline-parallel-size", self.pipeline_parallel_size, 1, 1024),
            ("--data-parallel-size", self.data_parallel_size, 1, 1024),
            ("--max-sequence-tokens", self.max_sequence_tokens, 2, 1 << 24),
            ("--threads", self.threads, 1, 4096),
            ("--gpu-memory-utilization", self.gpu_memory_utilization, 0.01, 1),
            ("--kv-cache-gib", self.kv_cache_gib, 0.01, 1 << 16),
            ("--max-upload-bytes", self.max_upload_bytes, 0, 1 << 50),
            ("--metrics-port", self.metrics_port, 0, 65535),
            ("--shutdown-grace-s", self.shutdown_grace_s, 0, 86400),
        ):
            if value is not None and not lowest <= value <= highest:
                raise _bad(flag, value, f"Give a value in [{lowest}, {highest}].")
        if len(self.adapters) > self.max_adapters:
            raise _bad(
                "--max-adapters",
                self.max_adapters,
                f"{len(self.adapters)} adapters are named: raise it to that many.",
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise StillhouseError(
                Reason.INVALID_CONFIG, "--tls-cert and --tls-key belong together: give both or none."
            )
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise StillhouseError(Reason.INVALID_CONFIG, "--tls-client-ca needs --tls-cert and --tls-key.")

    @property
    def spool(self) -> Path:
        """Where uploaded adapters are kept."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        return (self.upload_dir or cache / "stillhouse" / "adapters").expanduser().resolve()

    @property
    def num_threads(self) -> int:
        """Threads of the computation."""
        return self.threads or len(os.sched_getaffinity(0))


def default_engine() -> EngineName:
    """The engine of a host: vLLM where it is installed, else transformers."""
    return "vllm" if find_spec("vllm") is not None else "hf"


def default_roots(listen: str) -> tuple[Path, ...]:
    """Where adapters may lie if nobody says: anywhere on a service that only this host reaches, else nowhere."""
    return (Path("/"),) if is_loopback(listen) else ()


def is_loopback(listen: str) -> bool:
    """Whether only this host can reach the address."""
    if listen.startswith("unix:"):
        return True
    host = listen.rsplit(":", 1)[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_model_path(model: str) -> None:
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise StillhouseError(
                Reason.MODEL_NOT_FOUND,
                f"The directory {model} has no config.json. --model needs a model in Hugging Face layout.",
            )
    elif (
        not model
        or path.is_absolute()
        or model.startswith((".", "~"))
        or model.count("/") > 1
        or path.exists()
    ):
        raise StillhouseError(
            Reason.MODEL_NOT_FOUND,
            f"There is no model directory at {model!r}. Give --model a directory in Hugging Face layout, or a hub id such as Qwen/Qwen2.5-0.5B.",
        )


def _bad(flag: str, value: object, remedy: str) -> StillhouseError:
    return StillhouseError(Reason.INVALID_CONFIG, f"{flag} is {value}. {remedy}")
