"""`stillhouse data push`: copies files of rows to the trainer."""

from __future__ import annotations

from pathlib import Path

import click

from stillhouse.client.commands.data.source_options import given_source, source_options
from stillhouse.client.terminal.session import Session, command
from stillhouse.protos.rows.known_fields import EXTRA_FIELDS, ExtraFields


@command(name="push")
@click.option("--name", "dataset_id", metavar="ID", help="Makes FILE the next version of this dataset.")
@click.option(
    "--extra-fields",
    type=click.Choice(EXTRA_FIELDS),
    default="keep",
    help="Take or refuse rows with fields that no row has.  [default: keep]",
)
@click.option(
    "--tokenizer",
    metavar="MODEL",
    help="Count the tokens with tokenizer and chat template of a model, by its path on the trainer's host or its hub id.",
)
@source_options
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
def push(
    session: Session,
    files: tuple[Path, ...],
    *,
    dataset_id: str | None,
    extra_fields: ExtraFields,
    tokenizer: str | None,
    form: str,
    split: str,
    subset: str,
    columns: tuple[str, ...],
) -> None:
    """Copy each FILE to the trainer.

    A file with a row that cannot be trained on is refused before it is sent, with row and field. It is sent as it is, so a run
    needs the same --format and --column as fields of its dataset. Pairs of .source and .target, directories of datasets and
    those of the hub are sent as JSONL.

    With --tokenizer `data list` and `data show` tell the tokens as well; the trainer encodes every row for that, so it takes
    about as long as a run takes to read them.

    Prints `datasets/...`, a path for run files: ID and version with --name, else the content's digest. Pushing the same
    content again changes nothing.
    """
    from stillhouse.client.terminal.render import size_text
    from stillhouse.client.trainer.token_count import count_tokens

    if dataset_id == "":
        raise click.UsageError("--name is empty; give an id, or leave it out.")
    if dataset_id and len(files) > 1:
        raise click.UsageError("--name names one FILE; push each of several by a command of its own.")
    pushed = []
    for file in files:
        source = given_source(file, form=form, split=split, subset=subset, columns=columns)
        num_tokens = 0 if tokenizer is None else count_tokens(session.trainer, source, tokenizer)
        stored = session.trainer.push_dataset(
            source, dataset_id or "", num_tokens=num_tokens, extra_fields=extra_fields
        )
        pushed.append(
            {
                "file": str(file),
                "name": stored.name,
                "size_bytes": stored.size_bytes,
                "num_rows": stored.num_rows,
                **({"num_tokens": num_tokens} if tokenizer is not None else {}),
            }
        )
        counted = "" if tokenizer is None else f"{num_tokens:,} tokens, "
        session.note(f"{file}: {stored.num_rows} rows, {counted}{size_text(stored.size_bytes)}")
        if not session.as_json:
            session.say(stored.name)
    if session.as_json:
        session.emit({"datasets": pushed})
