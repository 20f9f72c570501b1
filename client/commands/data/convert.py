"""`stillhouse data convert`: files of rows in other formats, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stillhouse.client.terminal.session import Session, command

if TYPE_CHECKING:
    from stillhouse.client.datasets.conversion.convert import Target


@command(name="convert")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--to",
    required=True,
    type=click.Choice(["source-target", "messages", "openai", "parquet", "rows"]),
    help="Format of --out; rows are JSONL as the rows were.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="File to write; for source-target NAME of NAME.source.",
)
@click.option(
    "--chat", is_flag=True, help="Make turns of prompts and completions of text, for messages and openai."
)
@click.option(
    "--legacy-newlines",
    is_flag=True,
    help="Write line breaks of source-target as they are: to compare files, not to read them.",
)
def convert(
    session: Session, *, file: Path, to: Target, out: Path, chat: bool, legacy_newlines: bool
) -> None:
    """Convert the rows of FILE, whatever its format.

    source-target writes NAME.source and NAME.target, a line a row, sorted by id, with line breaks escaped; a system's text
    stands before the user's, with an empty line between. What a format has no place for is kept beside it, in a file that ends
    in .fields.jsonl, and `--to rows` gives the same rows back.
    """
    from stillhouse.client.datasets.conversion import convert as conversion

    done = conversion.convert(file, out, to, chat=chat, legacy_newlines=legacy_newlines)
    if done.note:
        session.note(done.note)
    names = [str(each) for each in done.outputs]
    session.show({"out": names, "rows": done.rows}, f"{', '.join(names)}: {done.rows} rows")
