"""Texts of `stillhouse data inspect`: what a dataset holds, and one row with the tokens that count in the loss."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby

import click

from stillhouse.client.inspection.lengths import histogram, percentiles
from stillhouse.client.terminal.render import columns, printable
from stillhouse.protos.rows.scan import Scan
from stillhouse.protos.stillhouse.v1 import run_pb2

BEGIN, END = "⟦", "⟧"
"""Around text that counts in the loss, where there is no colour."""
MAX_LISTED = 10
_BAR_CHARS = 40
_NAMES = {0: "shortest", 50: "median", 100: "longest"}


def uses_colour(choice: str) -> bool:
    """Returns True if text is to be coloured: always, never, or on a terminal without NO_COLOR (no-color.org)."""
    if choice == "auto":
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return choice == "always"


def scan_text(scan: Scan) -> str:
    """Returns format, rows and fields of a dataset, and the rows that are refused."""
    rest = "" if scan.is_complete else ", and more that were not read"
    form = f", rows of {scan.form}" if scan.form else ""
    lines = [
        f"{scan.source.location}: {scan.container}{form}",
        f"{scan.num_rows:,} rows{rest}"
        + (f", {scan.num_refused:,} more refused" if scan.num_refused else ""),
    ]
    if scan.fields:
        table = [
            (name, f"{100 * use.rows / max(1, scan.num_rows):.4g} %", "/".join(use.kinds), use.example)
            for name, use in scan.fields.items()
        ]
        lines += ["", columns(table, header=("field", "rows", "type", "first value"))]
    return printable(
        "\n".join([*lines, *_refused_lines([str(each) for each in scan.refused], scan.num_refused)])
    )


def _refused_lines(sentences: Sequence[str], count: int) -> list[str]:
    if not count:
        return []
    more = [f"  and {count - len(sentences):,} more"] if count > len(sentences) else []
    return ["", f"refused: {count:,}", *(f"  {each}" for each in sentences), *more]


def lengths_text(scan: Scan, answer: run_pb2.InspectRowsResponse) -> str:
    """Returns the lengths of the sampled rows in tokens, those that are cut, and those that the tokenizer refuses."""
    taken = [row for row in answer.rows if not row.problem]
    limit = answer.max_sequence_tokens
    whole = len(answer.rows) == scan.num_rows
    of = (
        f"all {scan.num_rows:,} rows"
        if whole
        else f"{len(answer.rows):,} of {scan.num_rows:,} rows, drawn at random"
    )
    lines = ["", f"lengths in tokens, of {of}"]
    if taken:
        lengths = [row.num_tokens for row in taken]
        named = percentiles(lengths).items()
        lines.append("  " + ", ".join(f"{_NAMES.get(each, f'{each} %')} {value:,}" for each, value in named))
        lines += _bars(lengths)
        tokens, targets = sum(lengths), sum(row.num_targets for row in taken)
        lines.append(
            f"  {targets:,} of {tokens:,} tokens count in the loss ({100 * targets / max(1, tokens):.3g} %)"
        )
    long = [row.number for row in taken if row.num_tokens > limit]
    empty = [row.number for row in taken if not row.num_targets]
    lines += _listed(f"longer than data.max_sequence_tokens, {limit:,}", long, len(answer.rows))
    lines += _listed("without a token to learn, so they are left out", empty, len(answer.rows))
    for name, count in sorted(answer.notes.items()):
        lines.append(f"{name.replace('_', ' ')}: {count:,}")
    refused = [f"row {row.number}, field {row.field}: {row.problem}" for row in answer.rows if row.problem]
    return printable("\n".join([*lines, *_refused_lines(refused[:MAX_LISTED], len(refused))]))


def _bars(lengths: Sequence[int]) -> Iterator[str]:
    bins = histogram(lengths)
    most = max(each.rows for each in bins)
    names = [f"{each.low:,} to {each.high - 1:,}" for each in bins]
    width = max(map(len, names))
    for name, each in zip(names, bins, strict=True):
        bar = "#" * round(_BAR_CHARS * each.rows / most)
        yield f"  {name.rjust(width)}  {bar.ljust(_BAR_CHARS)}  {each.rows:,}".rstrip()


def _listed(what: str, numbers: Sequence[int], count: int) -> list[str]:
    if not numbers:
        return []
    more = ", …" if len(numbers) > MAX_LISTED else ""
    listed = ", ".join(map(str, numbers[:MAX_LISTED]))
    return ["", f"{what}: {len(numbers):,} of {count:,} (rows {listed}{more})"]


def row_text(row: run_pb2.RowEncoding, *, limit: int, colour: bool) -> str:
    """Returns the text of an encoded row, with the tokens that count in the loss in colour or in brackets, and its tokens."""
    if row.problem:
        return printable(f"\nrow {row.number} is refused: field {row.field} {row.problem}")
    cut = f", cut at {limit:,}" if row.num_tokens > limit else ""
    lines = [
        "",
        f"row {row.number}: {row.num_tokens:,} tokens{cut}, {row.num_targets:,} count in the loss "
        + (f"({click.style('green', fg='green')})" if colour else f"({BEGIN}in brackets{END})"),
        _marked(row, colour=colour),
        "",
        *_token_lines(row, colour=colour),
    ]
    return "\n".join(lines)


def _marked(row: run_pb2.RowEncoding, *, colour: bool) -> str:
    parts = []
    for is_target, group in groupby(zip(row.targets, row.token_bytes, strict=True), key=lambda each: each[0]):
        text = printable(b"".join(part for _, part in group).decode(errors="replace"))
        if is_target:
            text = click.style(text, fg="green", bold=True) if colour else f"{BEGIN}{text}{END}"
        elif colour:
            text = click.style(text, dim=True)
        parts.append(text)
    return "".join(parts)


def _token_lines(row: run_pb2.RowEncoding, *, colour: bool) -> Iterator[str]:
    width = len(str(max(row.token_ids, default=0)))
    for at, (number, text, is_target) in enumerate(
        zip(row.token_ids, row.token_bytes, row.targets, strict=True)
    ):
        shown = _quoted(text)
        line = (
            f"{at:>6}  {number:>{width}}  {'learnt' if is_target else '      '}  {printable(shown)}".rstrip()
        )
        yield click.style(line, fg="green") if colour and is_target else line


def _quoted(text: bytes) -> str:
    try:
        return json.dumps(text.decode(), ensure_ascii=False)
    except UnicodeDecodeError:  # part of a character
        return f'"{text.decode(errors="backslashreplace")}"'
