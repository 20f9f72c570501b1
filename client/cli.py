"""The `stillhouse` command: shared options, commands imported on use, errors as one sentence."""

from __future__ import annotations

import importlib
from typing import Any

import click

from stillhouse.client.terminal.options import shared_options

# Command to module and summary; a module is imported when its command is used, so that --help is quick.
_COMMANDS = {
    "run": (
        "stillhouse.client.commands.run.group:run",
        "Create, watch, control and inspect distillation runs.",
    ),
    "data": ("stillhouse.client.commands.data:data", "Copy data to the trainer."),
    "cache": (
        "stillhouse.client.commands.cache:cache",
        "Cache teacher outputs, to train from them without a teacher.",
    ),
    "teacher": ("stillhouse.client.commands.teacher:teacher", "Query and manage a teacher service."),
    "generate": ("stillhouse.client.commands.generate:generate", "Generate text with the teacher."),
    "score": (
        "stillhouse.client.commands.score:score",
        "Score your token ids with the teacher's distributions.",
    ),
    "token": (
        "stillhouse.client.commands.token:token",
        "Create, list and revoke tokens on a service's host.",
    ),
    "estimate": (
        "stillhouse.client.commands.estimate:estimate",
        "Predict a run's memory before it is submitted.",
    ),
    "doctor": (
        "stillhouse.client.commands.doctor:doctor",
        "Check hosts, services and certificates, and suggest remedies.",
    ),
    "version": ("stillhouse.client.commands.version:version", "Show the version of this client."),
}

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
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)
        except Exception as error:
            from stillhouse.client.terminal.error_report import report

            code = report(error, as_json=bool(ctx.obj and ctx.obj.get("as_json")))
            if code is None:
                raise
            ctx.exit(code)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Each option above may also follow the command, and be set in the environment as STILLHOUSE_TRAINER and so on.\n\n"
    + EXIT_CODES.strip("\n"),
)
@click.pass_context
def cli(ctx: click.Context, /, **shared: Any) -> None:
    """Distil a large language model into a small one: submit runs, watch them, query the teacher."""
    ctx.obj = {"shared": shared}


cli.params.extend(shared_options(hidden=False))
cli.commands.update({name: click.Command(name) for name in _COMMANDS})  # names to suggest for a misspelt one
