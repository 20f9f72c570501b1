"""`stillhouse data`: copies data to the trainer."""

from __future__ import annotations

from pathlib import Path

import click

from stillhouse.client.terminal.session import Session, command


@click.group()
def data() -> None:
    """Copy data to the trainer."""


@command(data, name="push")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
def push(session: Session, files: tuple[Path, ...]) -> None:
    """Copy each FILE, JSONL or Parquet, to the trainer.

    Prints `datasets/...`, a path for run files. A file is stored by its content: pushing it again changes nothing.
    """
    from stillhouse.client.terminal.render import size_text

    pushed = []
    for file in files:
        stored = session.trainer.push_dataset(file)
        pushed.append({"file": str(file), "name": stored.name, "size_bytes": stored.size_bytes})
        session.note(f"{file}: {size_text(stored.size_bytes)}")
        if not session.as_json:
            session.say(stored.name)
    if session.as_json:
        session.emit({"datasets": pushed})
