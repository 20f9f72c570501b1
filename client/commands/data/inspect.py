"""`stillhouse data inspect`: what a dataset holds, and what a run would make of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stillhouse.client.commands.data.source_options import given_source, source_options
from stillhouse.client.terminal.session import Session, command

if TYPE_CHECKING:
    from stillhouse.client.runfile.load import RunFile
    from stillhouse.protos.rows.reading.source import RowSource
    from stillhouse.protos.rows.scan import Scan
    from stillhouse.protos.stillhouse.v1 import run_pb2

SAMPLE_ROWS = 1000


@command(name="inspect")
@click.option("--row", type=click.IntRange(1), metavar="N", help="Show this row.  [default: the first]")
@click.option(
    "--tokenizer",
    metavar="MODEL",
    help="Encode rows with the tokenizer and the chat template of a model, by its path on the trainer's host or its hub id.",
)
@click.option(
    "--run",
    "run_file",
    type=click.Path(path_type=Path),
    help="Encode rows with student and data settings of a run file.",
)
@click.option(
    "--sample",
    type=click.IntRange(1, 4096),
    default=SAMPLE_ROWS,
    show_default=True,
    metavar="N",
    help="Rows to encode, drawn at random if there are more.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Read at most N rows.")
@source_options
@click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    help="Colour what counts in the loss; auto does on a terminal.  [default: auto]",
)
@click.argument("file", metavar="FILE")
def inspect(
    session: Session,
    file: str,
    *,
    row: int | None,
    tokenizer: str | None,
    run_file: Path | None,
    sample: int,
    limit: int | None,
    form: str,
    split: str,
    subset: str,
    columns: tuple[str, ...],
    color: str,
) -> int:
    """Show what FILE holds: format, fields, rows, lengths, refused rows, and one row as it is trained on.

    FILE is all that `data.train[].path` may be, on this host, or `datasets/…` for one that the trainer holds, of which
    it reads 100,000 rows unless --limit says otherwise. Every row is checked; with --tokenizer or --run a sample of
    them is encoded by the trainer, with the code that encodes them for training.

    Ends with exit code 1 if a row is refused, or if there is none.
    """
    from stillhouse.client.core.errors import file_errors, usage_error
    from stillhouse.client.inspection.held import is_held, scan_of
    from stillhouse.client.terminal.inspection import scan_text
    from stillhouse.protos.rows.scan import scan
    from stillhouse.protos.stillhouse.v1 import run_pb2

    if tokenizer is not None and run_file is not None:
        raise click.UsageError("--tokenizer and --run exclude each other: a run file names its student.")
    spec = _spec(tokenizer, run_file)
    source = given_source(file, form=form, split=split, subset=subset, columns=columns)
    answer = None
    if is_held(file):
        response = session.trainer.inspect_dataset(
            run_pb2.DatasetSpec(path=file, format=form, split=split, config=subset, columns=source.columns),
            spec,
            first_row=row or 1,
            sample_rows=sample,
            max_rows=limit or 0,
        )
        found = scan_of(response, file)
        answer = response.encoding if response.HasField("encoding") else None
    else:
        source = source if spec is None else _as_in_run(source, spec)
        with file_errors("read", file):
            found = scan(
                source,
                sample_rows=sample,
                first_row=row or 1,
                limit=limit,
                on_rows=_progress(session),
                **_parsing(spec),
            )
    if row is not None and (found.chosen is None or found.chosen.number != row):
        refused = next((each for each in found.refused if each.metadata.get("row") == str(row)), None)
        raise refused or usage_error(f"{file} has no row {row} that is read. Correct --row.")
    if answer is None and spec is not None and found.sample:
        answer = _encoded(session, spec, found)
    if session.as_json:
        session.emit(_document(found, answer))
    else:
        click.echo(scan_text(found))
        _show_row(found, answer, color)
    is_refused = answer is not None and any(each.problem for each in answer.rows)
    return int(not found.num_rows or bool(found.num_refused) or is_refused)


def _spec(tokenizer: str | None, run_file: Path | None) -> RunFile | None:
    from stillhouse.client.runfile.load import load_run_file, parse_fields

    if run_file is not None:
        return load_run_file(run_file)
    return None if tokenizer is None else parse_fields({"student": {"model": tokenizer}})


def _as_in_run(source: RowSource, spec: RunFile) -> RowSource:
    """The rows of a file as the run reads them if it is one of its datasets, unless options say otherwise."""
    for dataset in (*spec.spec.data.train, *spec.spec.data.eval):
        if dataset.path and Path(source.location).resolve() == (spec.directory / dataset.path).resolve():
            return replace(
                source,
                format=source.format if source.format != "auto" else dataset.format or "auto",
                split=source.split or dataset.split,
                config=source.config or dataset.config,
                columns=source.columns or dict(dataset.columns),
            )
    return source


def _parsing(spec: RunFile | None) -> dict[str, Any]:
    """Options of `parse_training_row`, as the run's settings have them."""
    if spec is None:
        return {}
    data = spec.spec.data
    # The trainer knows the fields that prompts of teachers read; it checks the sample.
    reads_more = any(teacher.HasField("prompt") for teacher in spec.spec.teachers)
    return {
        "chat": data.chat,
        "completion_only": not data.HasField("completion_only") or data.completion_only,
        "extra_fields": "refuse" if data.extra_fields == "refuse" and not reads_more else "keep",
        "own_fields": [data.teacher_field] if data.teacher_field else (),
    }


def _progress(session: Session) -> Any:
    """Shows the number of rows on a terminal while they are read."""
    import sys

    if session.as_json or not sys.stderr.isatty():
        return lambda _: None
    return lambda rows: click.echo(f"\r{rows:,} rows ", nl=False, err=True)


def _encoded(session: Session, spec: RunFile, found: Scan) -> run_pb2.InspectRowsResponse:
    rows = dict(found.sample)
    if found.chosen is not None:
        rows[found.chosen.number] = found.chosen.as_json()
    return session.trainer.inspect_rows(
        spec, sorted(rows.items()), in_full=found.chosen.number if found.chosen is not None else None
    )


def _show_row(found: Scan, answer: run_pb2.InspectRowsResponse | None, color: str) -> None:
    import json

    from stillhouse.client.terminal.inspection import lengths_text, row_text, uses_colour
    from stillhouse.client.terminal.render import printable

    if found.chosen is None:
        return
    if answer is None:
        text = json.dumps(found.chosen.values, ensure_ascii=False, indent=1, default=str)
        click.echo(printable(f"\nrow {found.chosen.number}\n{text}"))
        click.echo("\nGive --tokenizer or --run for lengths in tokens, and for what is learnt.")
        return
    click.echo(lengths_text(found, answer))
    shown = next(each for each in answer.rows if each.number == found.chosen.number)
    colour = uses_colour(color)
    click.echo(row_text(shown, limit=answer.max_sequence_tokens, colour=colour), color=colour)


def _document(found: Scan, answer: run_pb2.InspectRowsResponse | None) -> dict[str, Any]:
    from stillhouse.client.core.json_output import error_as_json
    from stillhouse.client.inspection.lengths import histogram, percentiles

    document: dict[str, Any] = {
        "source": found.source.location,
        "container": found.container,
        "format": found.form or None,
        "rows": found.num_rows,
        "is_complete": found.is_complete,
        "fields": {
            name: {"rows": use.rows, "types": dict(use.kinds), "example": use.example}
            for name, use in found.fields.items()
        },
        "refused": found.num_refused,
        "refusals": [error_as_json(each) for each in found.refused],
    }
    if found.chosen is not None:
        document["row"] = {"number": found.chosen.number, "values": found.chosen.values}
    if answer is None:
        return document
    taken = [each for each in answer.rows if not each.problem]
    lengths = [each.num_tokens for each in taken]
    limit = answer.max_sequence_tokens
    document["tokens"] = {
        "sampled_rows": len(answer.rows),
        "percentiles": percentiles(lengths) if lengths else {},
        "histogram": [each._asdict() for each in histogram(lengths)] if lengths else [],
        "targets": sum(each.num_targets for each in taken),
        "total": sum(lengths),
        "max_sequence_tokens": limit,
        "longer": [each.number for each in taken if each.num_tokens > limit],
        "nothing_to_learn": [each.number for each in taken if not each.num_targets],
        "notes": dict(answer.notes),
        "refusals": [
            {"row": each.number, "field": each.field, "problem": each.problem}
            for each in answer.rows
            if each.problem
        ],
    }
    shown = next((each for each in answer.rows if found.chosen and each.number == found.chosen.number), None)
    if shown is not None and not shown.problem:
        document["row"] |= {
            "token_ids": list(shown.token_ids),
            "tokens": [each.decode(errors="backslashreplace") for each in shown.token_bytes],
            "targets": list(shown.targets),
        }
    return document
