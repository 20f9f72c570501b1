"""`stillhouse data push`: copies files of rows to the trainer."""

from __future__ import annotations

from pathlib import Path

import click

from stillhouse.client.terminal.session import Session, command
from stillhouse.protos.rows.known_fields import EXTRA_FIELDS, ExtraFields


@command(name="push")
@click.option(
    "--extra-fields",
    type=click.Choice(EXTRA_FIELDS),
    default="keep",
    help="Take or refuse rows with fields that no row has.  [default: keep]",
)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
def push(session: Session, files: tuple[Path, ...], extra_fields: ExtraFields) -> None:
    """Copy each FILE to the trainer.

    A file with a row that cannot be trained on is refused before it is sent, with row and field.

    Prints `datasets/...`, a path for run files. A file is stored by its content: pushing it again changes nothing.
    """
    from stillhouse.client.terminal.render import size_text

    pushed = []
    for file in files:
        stored = session.trainer.push_dataset(file, extra_fields=extra_fields)
        pushed.append({"file": str(file), "name": stored.name, "size_bytes": stored.size_bytes})
        session.note(f"{file}: {size_text(stored.size_bytes)}")
        if not session.as_json:
            session.say(stored.name)
    if session.as_json:
        session.emit({"datasets": pushed})
