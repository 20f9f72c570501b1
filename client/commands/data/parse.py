"""`stillhouse data parse`: completions into named, typed fields."""

from __future__ import annotations

from pathlib import Path

import click

from stillhouse.client.terminal.session import Session, command

SHOWN_REASONS = 10


@command(name="parse")
@click.option(
    "--in", "source", required=True, type=click.Path(path_type=Path), help="File of rows with completions."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")
@click.option(
    "--tag",
    "tags",
    multiple=True,
    metavar="NAME",
    help="Section <NAME>…</NAME> that has to be there; may be repeated.",
)
@click.option(
    "--optional-tag",
    "optional_tags",
    multiple=True,
    metavar="NAME",
    help="Section before those that may be missing.",
)
@click.option("--no-tags", is_flag=True, help="Take the whole text.")
@click.option(
    "--within", default="answer", show_default=True, metavar="TAG", help="Section that holds the fields."
)
@click.option("--field", "texts", multiple=True, metavar="NAME:TYPE", help="The section's text.")
@click.option(
    "--json-field",
    "documents",
    multiple=True,
    metavar="NAME:TYPE[=/KEY...]",
    help="A value of the section's JSON.  [default: key NAME]",
)
@click.option(
    "--regex-field",
    "patterns",
    multiple=True,
    metavar="NAME:TYPE=PATTERN",
    help="The group of PATTERN, which must find one value.",
)
@click.option(
    "--text-field",
    default="",
    metavar="FIELD",
    help="Field of the rows that holds the text.  [default: the completion]",
)
def parse(
    session: Session,
    *,
    source: Path,
    out: Path,
    tags: tuple[str, ...],
    optional_tags: tuple[str, ...],
    no_tags: bool,
    within: str,
    texts: tuple[str, ...],
    documents: tuple[str, ...],
    patterns: tuple[str, ...],
    text_field: str,
) -> None:
    """Parse the completion of each row into fields.

    Rows are those that `stillhouse generate` writes, training rows, or rows with `raw_output`. Each completion becomes a row
    with `raw_output`, the text of each tag, the fields, `parse_ok`, and `parse_reason` if that is false; a completion is kept
    as it is, so that the rows can be trained on. Without options the tags are `think`, which may be missing, and `answer`.

    TYPE is text, int, float, bool or json. A search with a PATTERN ends after a second.
    """
    from stillhouse.client.datasets.parsing.fields import parse_field
    from stillhouse.client.datasets.parsing.rows import DEFAULT_TAGS, ParseSettings, parse_file
    from stillhouse.client.datasets.parsing.tags import Tag

    given = [
        *(Tag(name=each, is_required=False) for each in optional_tags),
        *(Tag(name=each) for each in tags),
    ]
    if no_tags and given:
        raise click.UsageError("--no-tags excludes --tag and --optional-tag.")
    settings = ParseSettings(
        tags=[] if no_tags else given or DEFAULT_TAGS,
        within=within,
        fields=[
            *(parse_field(each, "text") for each in texts),
            *(parse_field(each, "json") for each in documents),
            *(parse_field(each, "regex") for each in patterns),
        ],
        text_field=text_field,
    )
    summary = parse_file(source, out, settings)
    lines = [f"{out}: {summary.rows} rows, {summary.parsed} parsed"]
    lines += [f"  {count} not: {reason}" for reason, count in summary.reasons.most_common(SHOWN_REASONS)]
    document = {
        "out": str(out),
        "rows": summary.rows,
        "parsed": summary.parsed,
        "reasons": dict(summary.reasons),
    }
    session.show(document, "\n".join(lines))
