"""Settings of the teacher service: default, range, choices and help of each, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.user_cache import user_cache
from stillhouse.protos.settings import SHARED, bad_setting, check_settings, setting
from stillhouse.protos.telemetry.host_cores import openmp_threads, usable_cores

EngineName = Literal["vllm", "hf", "openai"]
TierName = Literal["worker", "raw", "public"]

BATCH_TOKENS = 8192
"""Tokens per engine batch, unless set or bounded by the engine."""
DEFAULT_MAX_ADAPTERS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """Model, engine, limits and address of one teacher process."""

    model: str = setting(
        "Directory in Hugging Face layout, or hub id; with --engine openai the upstream server's name of it.  "
        "[there default: its only model]",
        "",
    )
    engine: EngineName = setting("Inference engine.", "hf", choices=get_args(EngineName))
    upstream: str = setting("Address of the server that has the model, for --engine openai.", "")
    tokenizer: str = setting("Directory or hub id of the upstream model's tokenizer.", "")
    upstream_key_file: Path | None = setting(
        "File with the upstream server's API key; STILLHOUSE_UPSTREAM_API_KEY may hold it instead.", None
    )
    upstream_concurrency: int = setting("Requests to the upstream server at once.", 32, between=(1, 4096))
    upstream_timeout_s: float = setting(
        "Seconds of one try of a request to the upstream server, and of all further tries.",
        600.0,
        between=(1, 86400),
    )
    tier: Literal["auto"] | TierName = setting(
        "Path of distributions out of vLLM; auto takes the best that passes its check.",
        "auto",
        choices=("auto", *get_args(TierName)),
    )
    adapters: tuple[tuple[str, Path], ...] = setting("LoRA adapter to load.", (), flag="--adapter")
    max_adapters: int = setting(
        "Adapters loaded at once; 0 serves the base model only.", DEFAULT_MAX_ADAPTERS, between=(0, 1024)
    )
    max_lora_rank: int = setting("Largest rank of an adapter.", 64, between=(1, 1024))
    revision: str = setting("Branch, tag or commit on the hub.", "")
    dtype: str = setting(
        "Type of the computation; auto is float32 on a CPU, elsewhere the checkpoint's own.",
        "auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = setting(
        "Quantisation: nf4 or int8, as in a run file, or a method as the engine names it, such as fp8 (vLLM); "
        "empty takes the checkpoint's.",
        "",
    )
    max_sequence_tokens: int | None = setting(
        "Longest sequence.  [default: the model's]", None, between=(2, 1 << 24)
    )
    max_top_k: int = setting("Largest top_k of a request, at most 256.", 256, between=(1, 256))
    max_query_tokens: int = setting("Most query_token_ids per position.", 1024, between=(1, 4096))
    max_inflight_sequences: int = setting(
        "Unanswered sequences per Score call, and concurrent samples per Generate call.",
        64,
        between=(1, 65536),
    )
    max_prompts: int = setting("Prompts per Generate call.", 1024, between=(1, 65536))
    max_calls: int = setting(
        "Score and Generate calls at once, of which one client gets three quarters; more are refused.",
        256,
        between=(1, 65536),
    )
    max_inflight_tokens: int | None = setting(
        "Tokens inside the engine; more wait, and clients take turns. A single client gets at most three quarters.  "
        "[default: 8 batches]",
        None,
        between=(1, 1 << 30),
    )
    max_batch_tokens: int | None = setting(
        "Tokens per engine batch.  [default: 8192, with vLLM on a CPU 2048]", None, between=(1, 1 << 24)
    )
    gpu_memory_utilization: float = setting("Share of GPU memory, for vLLM.", 0.9, between=(0.01, 1))
    tensor_parallel_size: int = setting(
        "GPUs, or on a CPU groups of cores, to split every layer over, for vLLM.", 1, between=(1, 1024)
    )
    pipeline_parallel_size: int = setting("Stages to split the layers into, for vLLM.", 1, between=(1, 1024))
    data_parallel_size: int = setting("Copies of the model, for vLLM.", 1, between=(1, 1024))
    kv_cache_gib: float = setting("KV cache on a CPU in GiB, for vLLM.", 1.0, between=(0.01, 1 << 16))
    threads: int | None = setting(
        "Threads on a CPU, fixed for the process.  [default: all cores]", None, between=(1, 4096)
    )
    seed: int = setting("Seed of samples that name none.", 0)
    allow_roots: tuple[Path, ...] = setting(
        "Folder below which LoadAdapter may read.  [default: / on loopback, else none]",
        (),
        flag="--allow-root",
    )
    upload_dir: Path | None = setting(
        "Directory of uploaded adapters.  [default: ~/.cache/stillhouse/adapters]", None
    )
    max_upload_bytes: int = setting(
        "Largest uploaded adapter, of which four are kept; 0 refuses uploads.", 2 << 30, between=(0, 1 << 50)
    )
    listen: str = setting(SHARED["listen"], "127.0.0.1:7401")
    address_file: Path | None = setting(SHARED["address_file"], None)
    tokens: Path | None = setting(SHARED["tokens"], None)
    audit_log: Path | None = setting(SHARED["audit_log"], None)
    metrics_host: str = setting(SHARED["metrics_host"], "127.0.0.1")
    metrics_port: int | None = setting(SHARED["metrics_port"], None, between=(0, 65535))
    insecure: bool = setting(SHARED["insecure"], False)
    tls_cert: Path | None = setting(SHARED["tls_cert"], None)
    tls_key: Path | None = setting(SHARED["tls_key"], None)
    tls_client_ca: Path | None = setting(SHARED["tls_client_ca"], None)
    reflection: bool | None = setting(SHARED["reflection"], None, flag="--reflection/--no-reflection")
    shutdown_grace_s: float = setting(SHARED["shutdown_grace_s"], 30.0, between=(0, 86400))
    log_level: str = setting(SHARED["log_level"], "info", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        """Raises `StillhouseError` with INVALID_CONFIG or MODEL_NOT_FOUND, naming flag, value and remedy."""
        check_settings(self)
        if self.engine == "openai":
            _check_upstream(self)
        else:
            _check_own(self)
        if len(self.adapters) > self.max_adapters:
            raise bad_setting(
                "--max-adapters",
                self.max_adapters,
                f"{len(self.adapters)} adapters are named: raise it to that many.",
            )

    @property
    def upload_directory(self) -> Path:
        """Directory of uploaded adapters, resolved."""
        return (self.upload_dir or user_cache("adapters")).expanduser().resolve()

    @property
    def tokenizer_source(self) -> str:
        """Directory or hub id of the tokenizer."""
        return self.tokenizer if self.engine == "openai" else self.model

    @property
    def num_threads(self) -> int:
        """Threads of the computation on a CPU."""
        return self.threads or openmp_threads() or usable_cores()


def default_engine() -> EngineName:
    """Selects vLLM where it is installed, else transformers."""
    return "vllm" if find_spec("vllm") is not None else "hf"


def _check_upstream(config: TeacherConfig) -> None:
    if not config.upstream or not config.tokenizer:
        missing = "--tokenizer" if config.upstream else "--upstream"
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            f"--engine openai needs {missing}: give --upstream the address of the server, and --tokenizer the directory or hub "
            "id of its model.",
        )
    for name, unset in (("dtype", "auto"), ("quantization", ""), ("tier", "auto")):
        if (value := getattr(config, name)) != unset:
            raise bad_setting(
                f"--{name}", value, "With --engine openai the upstream server decides. Leave it out."
            )
    if config.adapters:
        raise bad_setting(
            "--adapter",
            config.adapters[0][0],
            "With --engine openai the upstream server loads adapters: load it there, and it is found.",
        )


def _check_own(config: TeacherConfig) -> None:
    for name in ("upstream", "tokenizer", "upstream_key_file"):
        if value := getattr(config, name):
            raise bad_setting(
                "--" + name.replace("_", "-"),
                value,
                f"It is for --engine openai, and --engine is {config.engine}.",
            )
    _check_model_path(config.model)


def _check_model_path(model: str) -> None:
    path = Path(model).expanduser()
    if model and path.is_dir():
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
