"""`stillhouse run create | schema`: submits a run file, or shows every problem of it; prints the schema of run files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from stillhouse.client.commands.run.control import follow
from stillhouse.client.terminal.session import Session, command

if TYPE_CHECKING:
    from stillhouse.client.runfile.load import RunFile
    from stillhouse.client.trainer.run_handle import RunHandle


def submit_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds FILE and the options of a command that creates a run from it."""
    for option in (
        click.option(
            "--request-id", default="", metavar="UUID4", help="Creating again with it returns the same run."
        ),
        click.option("--push", is_flag=True, help="Copy datasets that lie beside FILE to the trainer first."),
        click.option("--watch", is_flag=True, help="Follow the run until it ends."),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="PATH=VALUE",
            help="Override a field, such as loss.terms[0].weight=2.",
        ),
        click.argument("file", type=click.Path(allow_dash=True)),
    ):
        function = option(function)
    return function


def load(
    session: Session, file: str, overrides: Sequence[str], *, push: bool, in_part: bool = False
) -> RunFile:
    """The run in `file`; with `push` the datasets beside it are copied to the trainer.

    With `in_part` it may have problems, which the service's are shown with.
    """
    from stillhouse.client.runfile.load import load_run_file, read_run_file

    loaded = (read_run_file if in_part else load_run_file)(file, overrides)
    if push:
        session.trainer.push_datasets_of(
            loaded, on_push=lambda path: session.note(f"copying {path} to the trainer")
        )
    return loaded


def submit(
    session: Session, file: RunFile, said: str, *, watch: bool, request_id: str
) -> tuple[RunHandle, int]:
    """Creates the run in `file`, and with `watch` follows it; the run and the exit code."""
    from stillhouse.client.core.json_output import as_json

    run = session.trainer.create_run(file, request_id=request_id)
    if session.as_json and not watch:
        session.emit(as_json(run.get()) | {"id": run.id})
    elif not session.as_json:
        session.say(f"run {run.id} {said}")
        if not watch:
            session.say(f"To follow it: stillhouse run watch {run.id}")
    return run, follow(session, run) if watch else 0


@command(name="create")
@submit_options
@click.option(
    "--validate", is_flag=True, help="Check the file and show the effective settings; create no run."
)
def create(
    session: Session,
    *,
    file: str,
    overrides: tuple[str, ...],
    watch: bool,
    validate: bool,
    push: bool,
    request_id: str,
) -> int:
    """Create a run from FILE.

    FILE is YAML or JSON with the fields of RunSpec; "-" reads standard input. Text in --set is taken as it stands; lists and sets of fields are YAML, as in --set 'student.lora={rank: 8}'.
    """
    loaded = load(session, file, overrides, push=push, in_part=validate)
    if validate:
        return _validate(session, loaded)
    return submit(session, loaded, "created", watch=watch, request_id=request_id)[1]


def _validate(session: Session, file: RunFile) -> int:
    from stillhouse.client.core.json_output import as_json
    from stillhouse.client.terminal.render import spec_text

    run = session.trainer.validate(file)
    session.show(
        {"valid": True, "effective_spec": as_json(run.effective_spec)},
        f"The run is valid. With every default it reads:\n\n{spec_text(run.effective_spec)}",
    )
    return 0


@command(name="schema")
def schema(_session: Session) -> None:
    """Print the JSON Schema of a run file.

    Editors complete and check run files by it: write it to a file, and name that in a run file's first line, "# yaml-language-server: $schema=FILE".
    """
    from stillhouse.client.runfile.schema import schema_text

    click.echo(schema_text(), nl=False)
