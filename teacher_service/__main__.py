"""Starts a teacher: settings, engine, server; SERVING once the model has answered, and an end in good order."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.telemetry.logs import configure_logging
from stillhouse.protos.telemetry.tracing import configure_tracing
from stillhouse.teacher_service.config import DTYPES, TeacherConfig, default_engine, default_roots

EXIT_SETTINGS = 2
"""What cannot work with these settings: a model that is not there, an address that is taken."""
EXIT_DIED = 1
"""The engine died while serving."""
MERGE = "merge-adapter"
"""The other command; without it a teacher is served."""

_PATH = click.Path(path_type=Path)
_DEFAULTS: Any = TeacherConfig.__dataclass_fields__


def _default(name: str) -> Any:
    return _DEFAULTS[name].default


def _adapters(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, Path], ...]:
    pairs = []
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise click.BadParameter(f"{value!r} is not NAME=PATH.")
        pairs.append((name, Path(path)))
    return tuple(pairs)


@click.command(context_settings={"auto_envvar_prefix": "STILLHOUSE_TEACHER", "show_default": True})
@click.option("--model", required=True, help="Directory in Hugging Face layout, or hub id.")
@click.option("--engine", type=click.Choice(["vllm", "hf"]), help="[default: vllm if installed, else hf]")
@click.option(
    "--tier",
    type=click.Choice(["auto", "worker", "raw", "public"]),
    default=_default("tier"),
    help="How distributions leave vLLM; auto takes the best that passes its check.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    callback=_adapters,
    metavar="NAME=PATH",
    help="LoRA adapter to load.",
)
@click.option(
    "--max-adapters", type=int, help="Adapters at once.  [default: 4, or as many as --adapter names]"
)
@click.option(
    "--max-lora-rank", type=int, default=_default("max_lora_rank"), help="Largest rank of an adapter."
)
@click.option("--revision", default="", help="Branch, tag or commit on the hub.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", help="Type of the computation.")
@click.option(
    "--quantization",
    default="",
    help="Quantisation method, as the engine names it, such as fp8 (vLLM) or bitsandbytes_4bit (hf).",
)
@click.option("--max-sequence-tokens", type=int, help="Longest sequence.  [default: the model's]")
@click.option("--max-top-k", type=int, default=_default("max_top_k"), help="Largest top_k, at most 256.")
@click.option(
    "--max-query-tokens", type=int, default=_default("max_query_tokens"), help="Most query ids per position."
)
@click.option(
    "--max-inflight-sequences",
    type=int,
    default=_default("max_inflight_sequences"),
    help="Unanswered sequences of one call.",
)
@click.option(
    "--max-prompts", type=int, default=_default("max_prompts"), help="Prompts of one Generate call."
)
@click.option("--max-calls", type=int, default=_default("max_calls"), help="Calls at once.")
@click.option(
    "--max-inflight-tokens",
    type=int,
    help="Tokens inside the engine; more wait, and clients take turns.  [default: 8 batches]",
)
@click.option(
    "--max-batch-tokens",
    type=int,
    help="Tokens computed at once.  [default: 8192, with vLLM on a CPU 2048]",
)
@click.option(
    "--gpu-memory-utilization",
    type=float,
    default=_default("gpu_memory_utilization"),
    help="Share of GPU memory, for vLLM.",
)
@click.option(
    "--tensor-parallel-size",
    type=int,
    default=_default("tensor_parallel_size"),
    help="GPUs, or groups of cores, to split every layer over, for vLLM.",
)
@click.option(
    "--pipeline-parallel-size",
    type=int,
    default=_default("pipeline_parallel_size"),
    help="Stages to split the layers into, for vLLM.",
)
@click.option(
    "--data-parallel-size",
    type=int,
    default=_default("data_parallel_size"),
    help="Copies of the model, for vLLM.",
)
@click.option(
    "--kv-cache-gib", type=float, default=_default("kv_cache_gib"), help="KV cache on a CPU in GiB, for vLLM."
)
@click.option("--threads", type=int, help="Threads on a CPU.  [default: all cores]")
@click.option("--seed", type=int, default=_default("seed"), help="Seed of samples that ask for none.")
@click.option(
    "--allow-root",
    "allow_roots",
    multiple=True,
    type=_PATH,
    help="Where LoadAdapter may read.  [default: anywhere on loopback, else nowhere]",
)
@click.option(
    "--upload-dir",
    type=_PATH,
    help="Where uploaded adapters are kept.  [default: ~/.cache/stillhouse/adapters]",
)
@click.option(
    "--max-upload-bytes",
    type=int,
    default=_default("max_upload_bytes"),
    help="Largest adapter to upload; 0 takes none.",
)
@click.option("--listen", default=_default("listen"), help="HOST:PORT or unix:PATH; port 0 is any free one.")
@click.option("--address-file", type=_PATH, help="Written with the bound address once the model answers.")
@click.option("--tokens", type=_PATH, help="Tokens that calls need; `stillhouse token create` makes it.")
@click.option("--audit-log", type=_PATH, help="File for who did what, as JSON lines.")
@click.option("--metrics-host", default=_default("metrics_host"), help="Where Prometheus finds metrics.")
@click.option("--metrics-port", type=int, help="Its port; 0 for none.  [default: 100 above that of --listen]")
@click.option(
    "--insecure",
    is_flag=True,
    help="Allow another address than loopback without TLS, or without tokens or certificates of callers.",
)
@click.option("--tls-cert", type=_PATH, help="Certificate chain, PEM.")
@click.option("--tls-key", type=_PATH, help="Private key, PEM.")
@click.option("--tls-client-ca", type=_PATH, help="Authority of client certificates, PEM.")
@click.option("--reflection/--no-reflection", default=None, help="Server reflection.  [default: on loopback]")
@click.option(
    "--shutdown-grace-s",
    type=float,
    default=_default("shutdown_grace_s"),
    help="Seconds for running calls after SIGTERM.",
)
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default=_default("log_level")
)
def serve(**options: Any) -> None:
    """Serve one frozen model: text that it writes, and the distributions that it gives to text of others.

    `stillhouse-teacher merge-adapter` makes a model of its own from a base and a LoRA adapter.
    """
    sys.exit(run(options))


@click.command()
@click.option("--model", required=True, help="The base: directory in Hugging Face layout, or hub id.")
@click.option("--adapter", required=True, type=_PATH, help="Directory of the LoRA adapter.")
@click.option("--out", required=True, type=_PATH, help="Directory to write; it must not exist.")
@click.option("--revision", default="", help="Branch, tag or commit of the base on the hub.")
def merge_adapter(model: str, adapter: Path, out: Path, revision: str) -> None:
    """Merge a LoRA adapter into its base, on the CPU: weights in OUT, and every other file as the base has it."""
    configure_logging("error")
    try:
        from stillhouse.teacher_service.engines.hf.merge_adapter import merge_adapter as merge

        merge(model, adapter, out, revision=revision)
    except ImportError as error:
        click.echo(
            f"stillhouse-teacher merge-adapter: needs the extra teacher-hf, which is not installed ({error}).",
            err=True,
        )
        sys.exit(EXIT_SETTINGS)
    except StillhouseError as error:
        click.echo(f"stillhouse-teacher merge-adapter: {error.message}", err=True)
        sys.exit(EXIT_SETTINGS)
    click.echo(f"{out}: {model} with {adapter} merged")


def main() -> None:
    """Serves, unless the first argument names another command."""
    if sys.argv[1:2] == [MERGE]:
        merge_adapter(sys.argv[2:], prog_name=f"stillhouse-teacher {MERGE}")
    else:
        serve(prog_name="stillhouse-teacher")


def run(options: dict[str, Any]) -> int:
    """Exit code of a teacher with these options."""
    configure_logging(options["log_level"])
    configure_tracing("stillhouse-teacher")
    try:
        config = _config(options)
        from stillhouse.teacher_service.lifecycle import serve

        return serve(config)
    except StillhouseError as error:
        click.echo(f"stillhouse-teacher: {error.message}", err=True)
        return EXIT_DIED if error.reason is Reason.PROCESS_DIED else EXIT_SETTINGS


def _config(options: dict[str, Any]) -> TeacherConfig:
    options = {**options}
    options["engine"] = options["engine"] or default_engine()
    if options["max_adapters"] is None:
        options["max_adapters"] = max(_default("max_adapters"), len(options["adapters"]))
    roots = options["allow_roots"] or default_roots(options["listen"])
    options["allow_roots"] = tuple(root.resolve() for root in roots)
    return TeacherConfig(**options)


if __name__ == "__main__":
    main()
