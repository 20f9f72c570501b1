"""Options that say how the rows of a file are to be read, as fields of a dataset do in a run file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stillhouse.protos.rows.row_forms import FORMATS

if TYPE_CHECKING:
    from stillhouse.protos.rows.reading.source import RowSource


def source_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --format, --split, --subset and --column, which `given_source` takes."""
    for option in (
        click.option(
            "--column",
            "columns",
            multiple=True,
            metavar="FIELD=NAME",
            help="Take a field from the column of this name.",
        ),
        click.option("--subset", default="", metavar="NAME", help="Configuration of a dataset on the hub."),
        click.option("--split", default="", metavar="NAME", help="Split of a dataset that has several."),
        click.option(
            "--format",
            "form",
            type=click.Choice(FORMATS),
            default="auto",
            help="Form of the rows.  [default: auto]",
        ),
    ):
        function = option(function)
    return function


def given_source(
    file: Path | str, *, form: str, split: str, subset: str, columns: tuple[str, ...]
) -> RowSource:
    """Returns the rows of a file as the options say."""
    from stillhouse.protos.rows.reading.source import RowSource

    path = str(file)
    return RowSource(
        location=str(Path(path).expanduser()) if path.startswith("~") else path,
        format=form,
        split=split,
        config=subset,
        columns=_columns(columns),
    )


def _columns(given: tuple[str, ...]) -> dict[str, str]:
    pairs = [each.partition("=") for each in given]
    wrong = next((each for each, pair in zip(given, pairs, strict=True) if not (pair[0] and pair[2])), None)
    if wrong is not None:
        raise click.UsageError(f'--column expects FIELD=NAME, such as prompt=question; "{wrong}" is none.')
    return {field: name for field, _, name in pairs}
