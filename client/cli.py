"""The `stillhouse` command: shared options, commands imported on use, errors as one sentence."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from stillhouse.client.terminal.session import shared_options

if TYPE_CHECKING:
    from stillhouse.protos.errors import StillhouseError

_COMMANDS = {
    "run": "Create, watch, control and inspect distillation runs.",
    "data": "Prepare files of rows, and copy them to the trainer.",
    "pipeline": "Run several stages, from prompts to a judged student, as one thing.",
    "cache": "Cache teacher outputs, to train from them without a teacher.",
    "teacher": "Query and manage a teacher service.",
    "eval": "Score a run, a checkpoint or a model, or texts in files.",
    "generate": "Generate text with the teacher.",
    "score": "Score your token ids with the teacher's distributions.",
    "token": "Create, list and revoke tokens on a service's host.",
    "estimate": "Predict a run's memory before it is submitted.",
    "web": "Serve the services over HTTP.",
    "doctor": "Check hosts, services and certificates, and suggest remedies.",
    "version": "Show the version of this client.",
}
"""Summary by command; its module is imported when it is used, so that --help is quick."""
_ROOMS = frozenset({"run", "data"})
"""Commands that have a folder of their own, with their group in it."""
_OF_THE_MACHINE = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE),
        *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
    }
)
"""Errors of files that no bug causes."""
_NAMES = {"eval": "evaluate"}
"""Modules and functions of commands whose names are those of built-ins."""

EXIT_CODES = """
\b
Exit codes:
  0    done; a watched run COMPLETED
  1    the run or the operation failed
  2    invalid usage, run file or value; nothing was changed
  3    the service does not respond
  4    no such run, adapter, dataset or artifact
  5    not allowed in this state, the name is taken, or a watched run was stopped
  130  interrupted by Ctrl-C
"""


class LazyGroup(click.Group):
    """A group whose commands are imported on use and whose errors end as one sentence and an exit code."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        name = _NAMES.get(cmd_name, cmd_name)
        module = f"{name}.group" if cmd_name in _ROOMS else name
        command: click.Command = getattr(
            importlib.import_module(f"stillhouse.client.commands.{module}"), name
        )
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)
        except OSError as error:
            if error.errno not in _OF_THE_MACHINE:
                raise
            from stillhouse.client.core.errors import os_reason
            from stillhouse.client.terminal.render import printable

            what = f"use {os.fsdecode(error.filename)}" if error.filename else "write the output"
            click.echo(f"Error: cannot {printable(what)}: {os_reason(error)}.", err=True)
            ctx.exit(1)
        except Exception as error:
            from stillhouse.protos import errors

            if not isinstance(error, errors.StillhouseError):
                raise  # a bug keeps its traceback
            ctx.exit(_report(error, as_json=bool(ctx.obj and ctx.obj.get("as_json"))))


def _report(error: StillhouseError, *, as_json: bool) -> int:
    """Prints a sentence, or with --json an object, on standard error, and returns the exit code."""
    from stillhouse.client.core.errors import exit_code
    from stillhouse.client.core.json_output import dumps, error_as_json
    from stillhouse.client.terminal.render import printable
    from stillhouse.protos.errors import Reason

    text = printable(error.message)
    if as_json:
        text = dumps({"error": error_as_json(error)})
    elif error.reason is not Reason.INVALID_SPEC:
        text = f"Error: {text}"
    click.echo(text, err=True)
    sys.stderr.flush()
    return int(exit_code(error))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Each option above may also follow the command, and be set in the environment as STILLHOUSE_TRAINER and so on.\n\n"
    + EXIT_CODES.strip("\n"),
)
@click.version_option(package_name="stillhouse", message="%(package)s %(version)s")
@click.pass_context
def cli(ctx: click.Context, /, **shared: Any) -> None:
    """Distil a large language model into a small one: submit runs, watch them, query the teacher."""
    ctx.obj = {"shared": shared}


cli.params.extend(shared_options(hidden=False))
cli.commands.update({name: click.Command(name) for name in _COMMANDS})  # names to suggest for a misspelt one
