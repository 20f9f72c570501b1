"""Errors of rows and of files of rows: they name file, row and field, and say the remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from stillhouse.protos.errors import Reason, StillhouseError, first_line

THE_LINE = "(the line)"
"""Field of a row that cannot be read at all."""
NOT_UTF8 = "is not UTF-8 (byte {}). Save it as UTF-8."
OnBadRow = Callable[[StillhouseError], None]
"""Takes the error of a row that is left out; raises it where one bad row is one too many."""


def raise_error(error: StillhouseError) -> NoReturn:
    """Raises the error of a bad row."""
    raise error


def row_error(path: Path | str, number: int, field: str, problem: str) -> StillhouseError:
    """Returns the DATASET_INVALID error for a field of a row; `problem` also says the remedy."""
    return StillhouseError(
        Reason.DATASET_INVALID,
        f"{path}, row {number}, field {field}: {problem}",
        metadata={"path": str(path), "row": str(number), "field": field},
    )


def unreadable(path: Path | str, what: str, error: BaseException | str) -> StillhouseError:
    """Returns the DATASET_INVALID error for a file that is not what it seems to be."""
    why = error if isinstance(error, str) else first_line(error)
    return StillhouseError(
        Reason.DATASET_INVALID,
        f"{path} cannot be read as a {what} ({why}). Write it again, or give a JSONL file.",
    )


@contextmanager
def unicode_rows(path: Path | str, number: int) -> Iterator[None]:
    """Raises StillhouseError(DATASET_INVALID) for a row of a table whose text is not UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        problem = f"has text that is not UTF-8 ({error}). Write it again in UTF-8."
        raise row_error(path, number, "(the row)", problem) from error
