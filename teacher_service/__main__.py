"""Command line of the teacher: serves a model, or merges an adapter into its base."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.settings import options_of
from stillhouse.protos.telemetry.logs import (
    configure_logging,
    end_output_with_handlers,
    quieten_libraries,
)
from stillhouse.protos.telemetry.tracing import configure_tracing
from stillhouse.teacher_service.config import DEFAULT_MAX_ADAPTERS, TeacherConfig, default_engine
from stillhouse.teacher_service.models.files import is_classifier

EXIT_SETTINGS = 2
"""Exit code for settings that cannot work, such as a missing model or a taken address."""
EXIT_DIED = 1
"""Exit code for an engine that died while serving."""
MERGE = "merge-adapter"
"""First argument that selects the other command."""

_PATH = click.Path(path_type=Path)


def _adapters(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, Path], ...]:
    pairs = []
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise click.BadParameter(f"{value!r} is not NAME=PATH.")
        pairs.append((name, Path(path)))
    return tuple(pairs)


@click.command(context_settings={"auto_envvar_prefix": "STILLHOUSE_TEACHER", "show_default": True})
@options_of(
    TeacherConfig,
    adapters={"callback": _adapters, "metavar": "NAME=PATH"},
    engine={
        "default": None,
        "help": "Inference engine.  [default: openai with --upstream, else vllm if installed, else hf; hf for a classifier]",
    },
    max_adapters={
        "default": None,
        "help": "Adapters loaded at once; 0 serves the base model only.  "
        f"[default: {DEFAULT_MAX_ADAPTERS}, or as many as --adapter names]",
    },
)
def serve(**options: Any) -> None:
    """Serve one frozen model: completions, and token distributions for given sequences.

    `stillhouse-teacher merge-adapter` merges a LoRA adapter into its base model instead.
    """
    sys.exit(run(options))


@click.command()
@click.option("--model", required=True, help="The base: directory in Hugging Face layout, or hub id.")
@click.option("--adapter", required=True, type=_PATH, help="Directory of the LoRA adapter.")
@click.option("--out", required=True, type=_PATH, help="Directory to write; it must not exist.")
@click.option("--revision", default="", help="Branch, tag or commit of the base on the hub.")
def merge_adapter(model: str, adapter: Path, out: Path, revision: str) -> None:
    """Merge a LoRA adapter into its base, on the CPU: new weights in OUT, every other file copied from the base."""
    configure_logging("error")
    try:
        from stillhouse.teacher_service.engines.hf.merge_adapter import merge_adapter as merge

        merge(model, adapter, out, revision=revision)
    except (ImportError, StillhouseError) as error:
        missing = f"needs the extra teacher-hf, which is not installed ({error})."
        why = error.message if isinstance(error, StillhouseError) else missing
        click.echo(f"stillhouse-teacher {MERGE}: {why}", err=True)
        sys.exit(EXIT_SETTINGS)
    click.echo(f"{out}: {model} with {adapter} merged")


def main() -> None:
    """Dispatches to `merge-adapter` if the first argument names it, else to `serve`."""
    if sys.argv[1:2] == [MERGE]:
        merge_adapter(sys.argv[2:], prog_name=f"stillhouse-teacher {MERGE}")
    else:
        serve(prog_name="stillhouse-teacher")


def run(options: dict[str, Any]) -> int:
    """Serves with these options; returns the exit code."""
    end_output_with_handlers()
    configure_logging(options["log_level"])
    if options["log_level"] != "debug":
        quieten_libraries()
    configure_tracing("stillhouse-teacher")
    try:
        config = _config(options)
        from stillhouse.teacher_service.lifecycle import serve

        return serve(config)
    except StillhouseError as error:
        click.echo(f"stillhouse-teacher: {error.message}", err=True)
        return EXIT_DIED if error.reason is Reason.PROCESS_DIED else EXIT_SETTINGS


def _config(options: dict[str, Any]) -> TeacherConfig:
    from stillhouse.protos.rpc.channel import is_loopback

    options = {**options}
    options["engine"] = options["engine"] or _engine(options)
    if options["max_adapters"] is None:
        options["max_adapters"] = max(DEFAULT_MAX_ADAPTERS, len(options["adapters"]))
    # Any root on a service that only this host reaches, else none.
    roots = options["allow_roots"] or ((Path("/"),) if is_loopback(options["listen"]) else ())
    options["allow_roots"] = tuple(root.resolve() for root in roots)
    return TeacherConfig(**options)


def _engine(options: dict[str, Any]) -> str:
    if options["upstream"]:
        return "openai"
    model = options["model"]
    return "hf" if model and is_classifier(Path(model).expanduser()) else default_engine()


if __name__ == "__main__":
    main()
