"""Command line of the teacher: serves a model, or merges an adapter into its base."""

from __future__ import annotations

import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import click

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.telemetry.logs import configure_logging
from stillhouse.protos.telemetry.tracing import configure_tracing
from stillhouse.teacher_service.config import (
    DEFAULT_MAX_ADAPTERS,
    TeacherConfig,
    default_engine,
    flag_of,
    setting_of,
)

EXIT_SETTINGS = 2
"""Exit code for settings that cannot work, such as a missing model or a taken address."""
EXIT_DIED = 1
"""Exit code for an engine that died while serving."""
MERGE = "merge-adapter"
"""First argument that selects the other command."""

_PATH = click.Path(path_type=Path)
_CHOSEN_LATER: dict[str, str] = {
    "engine": "vllm if installed, else hf",
    "max_adapters": f"{DEFAULT_MAX_ADAPTERS}, or as many as --adapter names",
}
"""Fields whose default depends on the host or on other options."""


def _adapters(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, Path], ...]:
    pairs = []
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise click.BadParameter(f"{value!r} is not NAME=PATH.")
        pairs.append((name, Path(path)))
    return tuple(pairs)


def _option(each: Field[Any], hint: Any) -> Any:
    """Derives the click option of a field of `TeacherConfig` from its type and metadata."""
    setting = setting_of(each)
    multiple = get_origin(hint) is tuple
    kind = next(iter({*(get_args(hint) or (hint,))} - {NoneType, Ellipsis}), str)
    how: dict[str, Any] = {"help": setting.help, "multiple": multiple}
    if each.name == "adapters":
        how |= {"callback": _adapters, "metavar": "NAME=PATH"}
    elif kind is not bool:
        how["type"] = click.Choice(setting.choices) if setting.choices else _PATH if kind is Path else kind
    elif each.default is False:
        how["is_flag"] = True
    if each.name in _CHOSEN_LATER:
        how["help"] += f"  [default: {_CHOSEN_LATER[each.name]}]"
    elif each.default is MISSING:
        how["required"] = True
    elif not multiple:
        how["default"] = each.default
    return click.option(flag_of(each), each.name, **how)


def _options(command: Any) -> Any:
    hints = get_type_hints(TeacherConfig)
    for each in reversed(fields(TeacherConfig)):
        command = _option(each, hints[each.name])(command)
    return command


@click.command(context_settings={"auto_envvar_prefix": "STILLHOUSE_TEACHER", "show_default": True})
@_options
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
    """Dispatches to `merge-adapter` if the first argument names it, else to `serve`."""
    if sys.argv[1:2] == [MERGE]:
        merge_adapter(sys.argv[2:], prog_name=f"stillhouse-teacher {MERGE}")
    else:
        serve(prog_name="stillhouse-teacher")


def run(options: dict[str, Any]) -> int:
    """Serves with these options; returns the exit code."""
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
    from stillhouse.protos.rpc.channel import is_loopback

    options = {**options}
    options["engine"] = options["engine"] or default_engine()
    if options["max_adapters"] is None:
        options["max_adapters"] = max(DEFAULT_MAX_ADAPTERS, len(options["adapters"]))
    # Any root on a service that only this host reaches, else none.
    roots = options["allow_roots"] or ((Path("/"),) if is_loopback(options["listen"]) else ())
    options["allow_roots"] = tuple(root.resolve() for root in roots)
    return TeacherConfig(**options)


if __name__ == "__main__":
    main()
