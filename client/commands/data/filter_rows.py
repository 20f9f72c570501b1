"""`stillhouse data filter`: rows that are fit to be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stillhouse.client.terminal.finite_float import FiniteFloat
from stillhouse.client.terminal.session import Session, command

if TYPE_CHECKING:
    from stillhouse.client.datasets.filters.row import Filter


@command(name="filter")
@click.option("--in", "source", required=True, type=click.Path(path_type=Path), help="File of rows.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="JSONL file of the rows that stay."
)
@click.option(
    "--dropped",
    type=click.Path(path_type=Path),
    default=None,
    help="JSONL file of the others, each with its reason.",
)
@click.option("--min-chars", type=click.IntRange(0), default=None, help="Shortest completion, in characters.")
@click.option("--max-chars", type=click.IntRange(0), default=None, help="Longest completion, in characters.")
@click.option(
    "--min-tokens", type=click.IntRange(0), default=None, help="Shortest completion, in tokens of num_tokens."
)
@click.option(
    "--max-tokens", type=click.IntRange(0), default=None, help="Longest completion, in tokens of num_tokens."
)
@click.option("--no-truncated", is_flag=True, help="Drop completions with finish_reason length.")
@click.option("--parse-ok", is_flag=True, help="Drop rows whose parse_ok is false.")
@click.option(
    "--min-mean-logprob",
    type=FiniteFloat(max=0),
    default=None,
    help="Smallest mean_logprob: the teacher's, of each token.",
)
@click.option(
    "--max-repetition",
    type=FiniteFloat(0, 1),
    default=None,
    help="Largest share of runs of 4 words that came before.",
)
@click.option("--no-duplicates", is_flag=True, help="Keep the first of rows of the same text.")
@click.option(
    "--near-duplicates",
    type=FiniteFloat(0.5, 1),
    default=None,
    metavar="SIMILARITY",
    help="Keep the first of rows that are as similar, by MinHash, from 0.5 to 1.",
)
@click.option(
    "--against",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Drop rows that share text with this evaluation file; may be repeated.",
)
@click.option(
    "--against-words",
    type=click.IntRange(1),
    default=13,
    show_default=True,
    help="Words in a row that count as shared.",
)
def filter_rows(
    session: Session,
    *,
    source: Path,
    out: Path,
    dropped: Path | None,
    min_chars: int | None,
    max_chars: int | None,
    min_tokens: int | None,
    max_tokens: int | None,
    no_truncated: bool,
    parse_ok: bool,
    min_mean_logprob: float | None,
    max_repetition: float | None,
    no_duplicates: bool,
    near_duplicates: float | None,
    against: tuple[Path, ...],
    against_words: int,
) -> None:
    """Keep the rows that pass every filter, and say how many each dropped.

    A row counts for the first filter that drops it, in the order of the options above. mean_logprob and num_tokens are written by
    `stillhouse generate --capture`, parse_ok by `stillhouse data parse`. Words of scripts without spaces are characters.
    """
    from stillhouse.client.datasets.filters import measures
    from stillhouse.client.datasets.filters.contamination import Contamination
    from stillhouse.client.datasets.filters.duplicates import ExactDuplicates, NearDuplicates
    from stillhouse.client.datasets.filters.filter import filter_file

    filters: list[Filter] = [
        *_length("chars", min_chars, max_chars),
        *_length("tokens", min_tokens, max_tokens),
    ]
    if no_truncated:
        filters.append(measures.truncated)
    if parse_ok:
        filters.append(measures.not_parsed)
    if min_mean_logprob is not None:
        filters.append(measures.MeanLogprob(least=min_mean_logprob))
    if max_repetition is not None:
        filters.append(measures.Repetition(most=max_repetition))
    if no_duplicates:
        filters.append(ExactDuplicates())
    if near_duplicates is not None:
        filters.append(NearDuplicates(near_duplicates))
    if against:
        filters.append(Contamination(list(against), against_words))
    if not filters:
        raise click.UsageError("give at least one filter, such as --no-duplicates.")
    summary = filter_file(source, out, filters, dropped=dropped)
    lines = [f"{out}: {summary.kept} of {summary.rows} rows"]
    lines += [f"  {count} dropped: {name}" for name, count in summary.dropped.most_common()]
    if dropped is not None:
        lines.append(f"{dropped}: the {summary.rows - summary.kept} dropped rows, each with its reason")
    document = {
        "out": str(out),
        "rows": summary.rows,
        "kept": summary.kept,
        "dropped": dict(summary.dropped),
        "dropped_file": dropped and str(dropped),
    }
    session.show(document, "\n".join(lines))


def _length(unit: str, least: int | None, most: int | None) -> list[Filter]:
    """The filter by length, if there is a bound. Raises click.UsageError for bounds that no row is within."""
    from stillhouse.client.datasets.filters.measures import Length

    if least is None and most is None:
        return []
    if least is not None and most is not None and least > most:
        raise click.UsageError(
            f"--min-{unit} {least} is above --max-{unit} {most}, so no row passes. Correct one."
        )
    return [Length(unit=unit, least=least, most=most)]
