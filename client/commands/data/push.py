"""`stillhouse data push`: copies files of rows to the trainer."""

from __future__ import annotations

from pathlib import Path

import click

from stillhouse.client.commands.data.source_options import given_source, source_options
from stillhouse.client.terminal.session import Session, command
from stillhouse.protos.rows.known_fields import EXTRA_FIELDS, ExtraFields


@command(name="push")
@click.option(
    "--name", "dataset_id", metavar="ID", default="", help="Makes FILE the next version of this dataset."
)
@click.option(
    "--extra-fields",
    type=click.Choice(EXTRA_FIELDS),
    default="keep",
    help="Take or refuse rows with fields that no row has.  [default: keep]",
)
@source_options
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
def push(
    session: Session,
    files: tuple[Path, ...],
    *,
    dataset_id: str,
    extra_fields: ExtraFields,
    form: str,
    split: str,
    subset: str,
    columns: tuple[str, ...],
) -> None:
    """Copy each FILE to the trainer.

    A file with a row that cannot be trained on is refused before it is sent, with row and field. It is sent as it is, so a run
    needs the same --format and --column as fields of its dataset. Pairs of .source and .target, directories of datasets and
    those of the hub are sent as JSONL.

    Prints `datasets/...`, a path for run files: ID and version with --name, else the content's digest. Pushing the same
    content again changes nothing.
    """
    from stillhouse.client.terminal.render import size_text

    if dataset_id and len(files) > 1:
        raise click.UsageError("--name names one FILE; push each of several by a command of its own.")
    pushed = []
    for file in files:
        source = given_source(file, form=form, split=split, subset=subset, columns=columns)
        stored = session.trainer.push_dataset(source, dataset_id, extra_fields=extra_fields)
        pushed.append(
            {
                "file": str(file),
                "name": stored.name,
                "size_bytes": stored.size_bytes,
                "num_rows": stored.num_rows,
            }
        )
        session.note(f"{file}: {stored.num_rows} rows, {size_text(stored.size_bytes)}")
        if not session.as_json:
            session.say(stored.name)
    if session.as_json:
        session.emit({"datasets": pushed})
