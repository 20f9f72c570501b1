"""Session of one command: --json, connection options, and services that are connected on first use."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from stillhouse.client.core.settings import Settings
    from stillhouse.client.teacher.teacher import Teacher
    from stillhouse.client.trainer.run_handle import RunHandle
    from stillhouse.client.trainer.trainer import Trainer


class Session:
    """State of one command: its output mode and its connections."""

    def __init__(self, flags: Mapping[str, Any], stack: ExitStack, *, as_json: bool) -> None:
        self._flags = flags
        self._stack = stack
        self.as_json = as_json

    @functools.cached_property
    def settings(self) -> Settings:
        """Addresses and credentials of the services."""
        from stillhouse.client.core.settings import NAMES, load_settings

        config = self._flags.get("config")
        tls = self._flags.get("tls")
        flags = {name: self._flags.get(name) for name in NAMES if name != "tls"}
        return load_settings(
            flags | {"tls": None if tls is None else str(tls).lower()},
            context=self._flags.get("context"),
            config=Path(config).expanduser() if config else None,
        )

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The run service."""
        from stillhouse.client.trainer.trainer import Trainer

        return self._stack.enter_context(Trainer(self.settings.trainer, **self.settings.security()))

    @functools.cached_property
    def teacher(self) -> Teacher:
        """The teacher service; of several the first that responds."""
        from stillhouse.client.batch.teacher_identity import matching_replicas

        return self.teachers[0] if len(self.teachers) == 1 else matching_replicas(self.teachers)[0]

    @functools.cached_property
    def teachers(self) -> tuple[Teacher, ...]:
        """All replicas of the teacher that --teacher names."""
        from stillhouse.client.core.errors import usage_error
        from stillhouse.client.teacher.teacher import Teacher

        if not self.settings.teachers:
            raise usage_error("--teacher names no service; give HOST:PORT, or several separated by commas.")
        security = self.settings.security()
        return tuple(self._stack.enter_context(Teacher(each, **security)) for each in self.settings.teachers)

    @property
    def only_teacher(self) -> Teacher:
        """The teacher service, for operations on a single replica."""
        from stillhouse.client.core.errors import usage_error

        if len(self.teachers) > 1:
            raise usage_error(
                f"--teacher names {len(self.teachers)} services, and this acts on one: name one of them."
            )
        return self.teachers[0]

    def shared_arguments(self) -> list[str]:
        """Returns the command's shared options as arguments, for a command of the client in another process."""
        arguments = []
        for name, value in self._flags.items():
            flag = name.replace("_", "-")
            if name == "tls" and value is not None:
                arguments.append("--tls" if value else "--no-tls")
            elif value is not None:
                arguments += [f"--{flag}", str(value)]
        return arguments

    def run(self, name: str, *, with_model: bool = False) -> RunHandle:
        """Looks a run up by id, prefix or `latest`; with `with_model` the latest is one that trains a model."""
        return self.trainer.run(name, with_model=with_model)

    def emit(self, document: object) -> None:
        """Prints one line of JSON."""
        from stillhouse.client.core.json_output import dumps

        click.echo(dumps(document))
        sys.stdout.flush()

    def say(self, text: str) -> None:
        """Prints text for people; control characters in it cannot steer the terminal."""
        from stillhouse.client.terminal.render import printable

        click.echo(printable(text))

    def show(self, document: object, text: str) -> None:
        """Prints `document` with --json, else `text`."""
        if self.as_json:
            self.emit(document)
        else:
            self.say(text)

    def note(self, text: str) -> None:
        """Prints text for people on standard error, apart from results; nothing with --json."""
        from stillhouse.client.terminal.render import printable

        if not self.as_json:
            click.echo(printable(text), err=True)


def command(
    group: click.Group | None = None, name: str | None = None
) -> Callable[[Callable[..., Any]], click.Command]:
    """Decorates a function whose first argument is a Session as a command, and adds it to `group`.

    The function returns its exit code, or None for 0.
    """

    def decorate(function: Callable[..., Any]) -> click.Command:
        @click.pass_context
        def callback(ctx: click.Context, /, **params: Any) -> None:
            root = ctx.find_root()
            shared = (root.obj or {}).get("shared", {})
            own = {key: params.pop(key) for key in list(params) if key.startswith("shared_")}
            merged = {
                key.removeprefix("shared_"): value if value is not None else shared.get(key)
                for key, value in own.items()
            }
            as_json = params.pop("as_json")
            root.obj = {"shared": shared, "as_json": as_json}
            with ExitStack() as stack:
                code = function(Session(merged, stack, as_json=as_json), **params)
            ctx.exit(int(code or 0))

        functools.update_wrapper(callback, function)
        made = click.command(name or function.__name__)(callback)
        made.params.append(click.Option(["--json", "as_json"], is_flag=True, help="Print JSON."))
        made.params.extend(shared_options(hidden=True))
        if group is not None:
            group.add_command(made)
        return made

    return decorate


def shared_options(*, hidden: bool) -> list[click.Option]:
    """Returns the options that locate the services; every command takes them too, without listing them."""
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
        click.Option(
            [flag, f"shared_{flag[2:].replace('-', '_')}"], metavar=metavar, help=text, hidden=hidden
        )
        for flag, (metavar, text) in described.items()
    ]
    tls = click.Option(
        ["--tls/--no-tls", "shared_tls"],
        default=None,
        help="TLS with the system's authorities.",
        hidden=hidden,
    )
    return [*options, tls]
