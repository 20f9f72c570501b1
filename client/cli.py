"""The `stillhouse` command: options that every command shares, commands loaded when they are used, errors as one sentence."""

from __future__ import annotations

import importlib
from typing import Any

import click

# Command to where it is and what it does; a module is imported when its command is used, so that --help is quick.
_COMMANDS = {
    "run": ("client.commands.run:run", "Create, watch, steer and read distillation runs."),
    "data": ("client.commands.data:data", "Bring data to the trainer."),
    "cache": ("client.commands.cache:cache", "Keep teachers' answers, to train from them without a teacher."),
    "teacher": ("client.commands.teacher:teacher", "Ask and manage a teacher service."),
    "generate": ("client.commands.generate:generate", "Let the teacher write."),
    "score": ("client.commands.score:score", "Ask the teacher for its distributions over your token ids."),
    "token": ("client.commands.token:token", "Make, list and revoke tokens on a service's host."),
    "estimate": ("client.commands.estimate:estimate", "Predict a run's memory before it is submitted."),
    "doctor": (
        "client.commands.doctor:doctor",
        "Check hosts, services and certificates, and say what to do.",
    ),
    "version": ("client.commands.version:version", "Show the version of this client."),
}

EXIT_CODES = """
\b
Exit codes:
  0    done; a watched run COMPLETED
  1    the run or the operation failed
  2    bad usage, run file or value; nothing was changed
  3    the service does not answer
  4    no such run, adapter, dataset or artifact
  5    the state forbids it, the name is taken, or a watched run was stopped
  130  interrupted by Ctrl-C
"""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used, and whose errors end as one sentence and a code."""

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
            from client.commands.failure import report

            code = report(error, as_json=bool(ctx.obj and ctx.obj.get("as_json")))
            if code is None:
                raise
            ctx.exit(code)


def shared_options(*, hidden: bool) -> list[click.Option]:
    """The options that say where the services are; every command takes them too, without listing them."""
    described = {
        "--trainer": ("HOST:PORT", "Run service. [default: 127.0.0.1:7402]"),
        "--teacher": (
            "HOST:PORT[,...]",
            "Teacher service, or several of one teacher. [default: 127.0.0.1:7401]",
        ),
        "--context": ("NAME", "Section [contexts.NAME] of the config file."),
        "--config": ("FILE", "Config file. [default: ~/.config/stillhouse/config.toml]"),
        "--tls-ca": ("FILE", "Authorities to trust, PEM."),
        "--tls-cert": ("FILE", "Certificate of this client, PEM."),
        "--tls-key": ("FILE", "Key of that certificate, PEM."),
        "--tls-server-name": ("NAME", "Name to expect in the service's certificate."),
        "--token-file": ("FILE", "File that holds a bearer token."),
    }
    options = [
        click.Option([flag, f"shared_{_name(flag)}"], metavar=metavar, help=text, hidden=hidden)
        for flag, (metavar, text) in described.items()
    ]
    tls = click.Option(
        ["--tls/--no-tls", "shared_tls"],
        default=None,
        help="TLS with the system's authorities.",
        hidden=hidden,
    )
    return [*options, tls]


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Each option above may also stand after the command, and in the environment as STILLHOUSE_TRAINER and so on.\n\n"
    + EXIT_CODES.strip("\n"),
)
@click.pass_context
def cli(ctx: click.Context, /, **shared: Any) -> None:
    """Distil a large language model into a small one: submit runs, watch them, ask the teacher."""
    ctx.obj = {"shared": shared}


cli.params.extend(shared_options(hidden=False))
