"""Output and error file of a batch, from the output that its process has written, whole or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stillhouse.client.batch.journal import Journal
from stillhouse.client.batch.ordered_output import OutputPaths
from stillhouse.client.batch.output_formats import is_failed


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """Rows of a batch by their outcome."""

    completed: int
    failed: int
    output: Path | None
    """File of completed rows; None if there are none."""
    errors: Path | None
    """File of failed rows; None if there are none."""


def split_results(out: Path, folder: Path) -> Results:
    """Writes the rows of the output at `out` to two new files in `folder`, in the order of the input. Blocks.

    Raises OSError and StillhouseError.
    """
    paths = {False: folder / "output", True: folder / "errors"}
    counts = {False: 0, True: 0}
    with paths[False].open("wb") as output, paths[True].open("wb") as errors:
        for line in _lines(out):
            failed = is_failed(line)
            counts[failed] += 1
            (errors if failed else output).write(line)
    for failed, path in paths.items():
        if not counts[failed]:
            path.unlink()
    return Results(
        completed=counts[False],
        failed=counts[True],
        output=paths[False] if counts[False] else None,
        errors=paths[True] if counts[True] else None,
    )


def remove_work(out: Path) -> None:
    """Removes an output and its journal."""
    for path in (out, OutputPaths(out=out).journal):
        path.unlink(missing_ok=True)


def _lines(out: Path) -> Iterator[bytes]:
    """Whole lines of the output, then those of rows that wait for an earlier one."""
    written = 0
    if out.exists():
        with out.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") or not _is_json(line):
                    break
                written += 1
                yield line
    journal = Journal.open(OutputPaths(out=out).journal)
    if journal is None:
        return
    journal.close()
    for number, row in sorted(journal.state.rows.items()):
        if number >= written:
            yield row.out.encode()


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
