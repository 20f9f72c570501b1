"""Settings of the teacher service: default, range, choices and help of each, checked before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import MISSING, Field, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from stillhouse.protos.errors import Reason, StillhouseError

EngineName = Literal["vllm", "hf"]
TierName = Literal["worker", "raw", "public"]

BATCH_TOKENS = 8192
"""Tokens per engine batch, unless set or bounded by the engine."""
DEFAULT_MAX_ADAPTERS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Metadata of a field of `TeacherConfig`, from which its check and its command-line option are derived."""

    help: str
    flag: str = ""
    """Command-line flag; empty derives it from the field's name."""
    between: tuple[float, float] | None = None
    """Lowest and highest value; None is unbounded."""
    choices: tuple[str, ...] = ()
    """Valid values; empty allows any."""


def _setting(text: str, default: Any = MISSING, **metadata: Any) -> Any:
    return field(default=default, metadata={"setting": Setting(help=text, **metadata)})


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """Model, engine, limits and address of one teacher process."""

    model: str = _setting("Directory in Hugging Face layout, or hub id.")
    engine: EngineName = _setting("Inference engine.", "hf", choices=get_args(EngineName))
    tier: Literal["auto"] | TierName = _setting(
        "Path of distributions out of vLLM; auto takes the best that passes its check.",
        "auto",
        choices=("auto", *get_args(TierName)),
    )
    adapters: tuple[tuple[str, Path], ...] = _setting("LoRA adapter to load.", (), flag="--adapter")
    max_adapters: int = _setting(
        "Adapters loaded at once; 0 serves the base model only.", DEFAULT_MAX_ADAPTERS, between=(0, 1024)
    )
    max_lora_rank: int = _setting("Largest rank of an adapter.", 64, between=(1, 1024))
    revision: str = _setting("Branch, tag or commit on the hub.", "")
    dtype: str = _setting(
        "Type of the computation; auto is float32 on a CPU, elsewhere the checkpoint's own.",
        "auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = _setting(
        "Quantisation method, as the engine names it, such as fp8 (vLLM) or bitsandbytes_4bit (hf); "
        "empty takes the checkpoint's.",
        "",
    )
    max_sequence_tokens: int | None = _setting(
        "Longest sequence.  [default: the model's]", None, between=(2, 1 << 24)
    )
    max_top_k: int = _setting("Largest top_k of a request, at most 256.", 256, between=(1, 256))
    max_query_tokens: int = _setting("Most query_token_ids per position.", 256, between=(1, 4096))
    max_inflight_sequences: int = _setting(
        "Unanswered sequences per Score call, and concurrent samples per Generate call.",
        64,
        between=(1, 65536),
    )
    max_prompts: int = _setting("Prompts per Generate call.", 1024, between=(1, 65536))
    max_calls: int = _setting(
        "Concurrent Score and Generate calls; a single client gets at most three quarters.",
        256,
        between=(1, 65536),
    )
    max_inflight_tokens: int | None = _setting(
        "Tokens inside the engine; more wait, and clients take turns. A single client gets at most three quarters.  "
        "[default: 8 batches]",
        None,
        between=(1, 1 << 30),
    )
    max_batch_tokens: int | None = _setting(
        "Tokens per engine batch.  [default: 8192, with vLLM on a CPU 2048]", None, between=(1, 1 << 24)
    )
    gpu_memory_utilization: float = _setting("Share of GPU memory, for vLLM.", 0.9, between=(0.01, 1))
    tensor_parallel_size: int = _setting(
        "GPUs, or on a CPU groups of cores, to split every layer over, for vLLM.", 1, between=(1, 1024)
    )
    pipeline_parallel_size: int = _setting("Stages to split the layers into, for vLLM.", 1, between=(1, 1024))
    data_parallel_size: int = _setting("Copies of the model, for vLLM.", 1, between=(1, 1024))
    kv_cache_gib: float = _setting("KV cache on a CPU in GiB, for vLLM.", 1.0, between=(0.01, 1 << 16))
    threads: int | None = _setting(
        "Threads on a CPU, fixed for the process.  [default: all cores]", None, between=(1, 4096)
    )
    seed: int = _setting("Seed of samples that name none.", 0)
    allow_roots: tuple[Path, ...] = _setting(
        "Directory under which LoadAdapter may read.  [default: any on loopback, else none]",
        (),
        flag="--allow-root",
    )
    upload_dir: Path | None = _setting(
        "Directory of uploaded adapters.  [default: ~/.cache/stillhouse/adapters]", None
    )
    max_upload_bytes: int = _setting(
        "Largest adapter to upload, of which four are kept; 0 refuses uploads.", 2 << 30, between=(0, 1 << 50)
    )
    listen: str = _setting("HOST:PORT or unix:PATH; port 0 is any free one.", "127.0.0.1:7401")
    address_file: Path | None = _setting("Written with the bound address once the model answers.", None)
    tokens: Path | None = _setting(
        "Tokens required of callers; `stillhouse token create` makes the file.", None
    )
    audit_log: Path | None = _setting("Audit log of calls, as JSON lines.", None)
    metrics_host: str = _setting("Address of the Prometheus metrics.", "127.0.0.1")
    metrics_port: int | None = _setting(
        "Port of the metrics; 0 for none.  [default: 100 above that of --listen]", None, between=(0, 65535)
    )
    insecure: bool = _setting(
        "Allow an address beyond loopback without TLS, or without tokens or client certificates.", False
    )
    tls_cert: Path | None = _setting("Certificate chain, PEM.", None)
    tls_key: Path | None = _setting("Private key, PEM.", None)
    tls_client_ca: Path | None = _setting(
        "Authority of client certificates, which it makes required, PEM.", None
    )
    reflection: bool | None = _setting(
        "Server reflection.  [default: on loopback]", None, flag="--reflection/--no-reflection"
    )
    shutdown_grace_s: float = _setting("Seconds for running calls after SIGTERM.", 30.0, between=(0, 86400))
    log_level: str = _setting("Lowest level logged.", "info", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        """Raises `StillhouseError` with INVALID_CONFIG or MODEL_NOT_FOUND, naming flag, value and remedy."""
        _check_model_path(self.model)
        for each in fields(self):
            setting, value = setting_of(each), getattr(self, each.name)
            if setting.choices and value not in setting.choices:
                raise _bad(flag_of(each), value, f"Valid are {', '.join(setting.choices)}.")
            if (
                setting.between
                and value is not None
                and not setting.between[0] <= value <= setting.between[1]
            ):
                raise _bad(flag_of(each), value, "Give a value in [{}, {}].".format(*setting.between))
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
    def upload_directory(self) -> Path:
        """Directory of uploaded adapters, resolved."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        return (self.upload_dir or cache / "stillhouse" / "adapters").expanduser().resolve()

    @property
    def num_threads(self) -> int:
        """Threads of the computation on a CPU."""
        return self.threads or len(os.sched_getaffinity(0))


def setting_of(each: Field[Any]) -> Setting:
    """Metadata of a field."""
    setting: Setting = each.metadata["setting"]
    return setting


def flag_of(each: Field[Any]) -> str:
    """Command-line flag of a field, such as "--max-top-k"."""
    return setting_of(each).flag or "--" + each.name.replace("_", "-")


def default_engine() -> EngineName:
    """Selects vLLM where it is installed, else transformers."""
    return "vllm" if find_spec("vllm") is not None else "hf"


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
