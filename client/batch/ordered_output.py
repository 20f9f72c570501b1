"""Writes a batch's output in input order, each row exactly once, however the rows complete.

A row goes to the journal first and to the output once all rows before it are there, so that a kill at any moment loses
no completed row.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from stillhouse.client.batch.input_rows import InputLine
from stillhouse.client.batch.journal import CHAIN_START, Header, Journal, Position, RowRecord, extend_chain
from stillhouse.client.core.errors import file_errors
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import refuse_special
from stillhouse.protos.files.locks import try_lock

RETRY = "retry of"
"""Setting of a retry: the state of the output whose failed rows it generates again."""
MAX_AHEAD_ROWS = 1 << 16
"""Completed rows that may wait for an earlier one before reading stops."""
MAX_AHEAD_BYTES = 256 << 20
"""Total size of these rows."""
SAFE_INTERVAL_S = 5.0
"""Time between two syncs of the output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputPaths:
    """Files of one output."""

    out: Path

    @property
    def journal(self) -> Path:
        """Journal of completed rows."""
        return self.out.with_name(f"{self.out.name}.journal")

    @property
    def failed(self) -> Path:
        """Failed rows, if the output format cannot hold them."""
        return self.out.with_name(f"{self.out.name}.failed")

    @property
    def retry(self) -> OutputPaths:
        """Files of a retry of failed rows."""
        return OutputPaths(out=self.out.with_name(f"{self.out.name}.retry"))


class Output:
    """The output at `paths`, new or resumed; a context manager."""

    def __init__(
        self, paths: OutputPaths, header: Header, *, overwrite: bool = False, has_failed_file: bool = False
    ) -> None:
        """With `has_failed_file` failed rows go to a separate file.

        Raises StillhouseError (REQUEST_CONFLICT, TEACHER_CHANGED) for an output of another batch, or one in use.
        """
        self._paths = paths
        self._out: BinaryIO | None = None
        self._failed: BinaryIO | None = None
        self.journal = _journal(paths, header, is_new=overwrite)
        try:
            self._resumed = self.journal.state.position
            self._known = dict(self.journal.state.rows)
            self._waiting = dict(self.journal.state.rows)
            self._chain = CHAIN_START
            self._position = self._resumed
            self._waiting_bytes = sum(len(each.out) + len(each.failed) for each in self._known.values())
            self._waiting_failed = sum(each.is_failed for each in self._known.values())
            self._out = _cut(paths.out, self._resumed.out_bytes)
            if has_failed_file:
                self._failed = _cut(paths.failed, self._resumed.failed_bytes)
        except BaseException:
            self.close()
            raise
        self._safe_at_s = time.monotonic()
        self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def position(self) -> Position:
        """Written prefix of the output."""
        return self._position

    @property
    def num_answered(self) -> int:
        """Completed rows, written or not."""
        return self._position.rows + len(self._waiting)

    @property
    def num_failed(self) -> int:
        """Failed rows, written or not."""
        return self._position.num_failed + self._waiting_failed

    @property
    def is_full(self) -> bool:
        """True if so much waits for an earlier row that no more rows should be started."""
        return len(self._waiting) >= MAX_AHEAD_ROWS or self._waiting_bytes >= MAX_AHEAD_BYTES

    def is_answered(self, line: InputLine) -> bool:
        """Returns True if the row was completed before this process started. Call it for each line in order, from the first.

        Raises StillhouseError (REQUEST_CONFLICT) if the input has changed since.
        """
        if line.number < self._resumed.rows:
            self._chain = extend_chain(self._chain, line.digest)
            if line.number == self._resumed.rows - 1 and self._chain != self._resumed.chain:
                raise self._changed(
                    f"one of the first {self._resumed.rows} rows has changed since it was completed"
                )
            return True
        known = self._known.pop(line.number, None)
        if known is not None and known.digest != line.digest:
            raise self._changed(f"line {line.line_number} has changed since it was completed")
        return known is not None

    def check_end(self, num_lines: int) -> None:
        """Raises StillhouseError if the input of `num_lines` is shorter than the completed rows."""
        completed = max([self._resumed.rows - 1, *self._known]) + 1
        if num_lines < completed:
            raise self._changed(f"it has {num_lines} rows, and {completed} were completed")

    def add(self, number: int, row: RowRecord) -> None:
        """Adds row `number`, and writes rows that are next in order. Raises StillhouseError if that fails."""
        self.journal.add_row(number, row)
        self._waiting[number] = row
        self._waiting_bytes += len(row.out) + len(row.failed)
        self._waiting_failed += row.is_failed
        self._write()

    def finish(self) -> None:
        """Syncs everything and records that the batch is complete."""
        assert not self._waiting, f"rows without a result before {min(self._waiting)}"
        self._make_safe()
        self.journal.finish()
        if self._failed is not None and not self._position.failed_bytes:
            self._paths.failed.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the files and unlocks the output; what was added stays."""
        self.journal.close()
        for file in (self._out, self._failed):
            if file is not None:
                file.close()

    def _write(self) -> None:
        out, failed = [], []
        position = self._position
        while (done := self._waiting.pop(position.rows, None)) is not None:
            self._waiting_bytes -= len(done.out) + len(done.failed)
            self._waiting_failed -= done.is_failed
            out.append(done.out)
            failed.append(done.failed)
            position = position.after(done)
        if position is not self._position:
            assert self._out is not None
            _append(self._out, self._paths.out, "".join(out).encode())
            if self._failed is not None:
                _append(self._failed, self._paths.failed, "".join(failed).encode())
            self._position = position
        if time.monotonic() - self._safe_at_s > SAFE_INTERVAL_S:
            self._make_safe()

    def _make_safe(self) -> None:
        """Syncs the output before the journal records its position."""
        with file_errors("write", self._paths.out):
            for file in (self._out, self._failed):
                if file is not None:
                    os.fsync(file.fileno())
        self.journal.mark_synced(self._position)
        self._safe_at_s = time.monotonic()

    def _changed(self, how: str) -> StillhouseError:
        return StillhouseError(
            Reason.REQUEST_CONFLICT,
            f"The input is not the one that {self._paths.out} was started with: {how}. Give the same input, optionally with "
            "rows appended, or choose another --out.",
        )


def commit_retry(paths: OutputPaths) -> None:
    """Replaces an output by its finished retry; does nothing if there is none."""
    retry = paths.retry
    journal = Journal.open(retry.journal)
    if journal is None:
        return
    journal.close()
    if not journal.state.is_finished:
        return
    with file_errors("write", paths.out):
        # The journal goes last: as long as it exists, the rest is repeated.
        if retry.out.exists():
            retry.out.replace(paths.out)
        if retry.failed.exists():
            retry.failed.replace(paths.failed)
        elif not journal.state.position.failed_bytes:
            paths.failed.unlink(missing_ok=True)
        retry.journal.replace(paths.journal)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Locks the output at `path` for this process. Raises StillhouseError (REQUEST_CONFLICT) if another one writes it."""
    with file_errors("write", path):
        refuse_special(path)
        lock = try_lock(path)
    if lock is None:
        raise StillhouseError(
            Reason.REQUEST_CONFLICT,
            f"Another process writes {path}. Wait for it, or choose another --out.",
        )
    with lock:
        yield


def _journal(paths: OutputPaths, header: Header, *, is_new: bool) -> Journal:
    journal = None if is_new else Journal.open(paths.journal)
    size = paths.out.stat().st_size if paths.out.exists() else 0
    if journal is None:
        if size and not is_new:
            raise StillhouseError(
                Reason.REQUEST_CONFLICT,
                f"{paths.out} exists but cannot be resumed as a batch: it has no {paths.journal.name} beside it. Choose "
                "another --out, or replace it with --overwrite.",
            )
        return Journal.create(paths.journal, header)
    try:
        if _can_resume(paths.out, size, journal, header):
            return journal
    except BaseException:
        journal.close()
        raise
    journal.close()
    return Journal.create(paths.journal, header)


def _can_resume(out: Path, size: int, journal: Journal, header: Header) -> bool:
    """Returns True if the output matches the journal, False if it starts anew; raises StillhouseError for anything else."""
    written = journal.state.position.out_bytes
    if RETRY in header.settings and journal.header.settings.get(RETRY) != header.settings[RETRY]:
        return False  # an abandoned retry, whose output has changed since
    if written and not size:
        return False  # the output was removed, to start anew
    _require_same(out, journal.header, header)
    if size < written:
        raise StillhouseError(
            Reason.REQUEST_CONFLICT,
            f"{out} has {size} bytes; {written} were written. Restore the file, or start again with --overwrite.",
        )
    return True


def _require_same(out: Path, begun: Header, header: Header) -> None:
    for name in sorted((begun.settings.keys() | header.settings.keys()) - {RETRY}):
        was, wanted = begun.settings.get(name), header.settings.get(name)
        if was != wanted:
            raise StillhouseError(
                Reason.REQUEST_CONFLICT,
                f"{out} was started with {name} {was!r}, and this command has {wanted!r}. Resume with the same settings, choose "
                "another --out, or start again with --overwrite.",
            )
    require_same_teacher(out, begun.teacher, header.teacher)


def require_same_teacher(out: Path, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises StillhouseError (TEACHER_CHANGED) for a teacher that would generate other text."""
    for name in sorted(begun.keys() | now.keys()):
        if name != "model" and begun.get(name) != now.get(name):
            raise StillhouseError(
                Reason.TEACHER_CHANGED,
                f"{out} was started with the teacher {begun.get('model')}, and the service runs "
                f"{now.get('model')} with another {name}. Start the first one again, choose another --out, or "
                "start again with --overwrite.",
            )


def _cut(path: Path, num_bytes: int) -> BinaryIO:
    """Opens a file for appending, truncated to `num_bytes`."""
    with file_errors("write", path):
        file = path.open("ab")
        file.truncate(num_bytes)
    return file


def _append(file: BinaryIO, path: Path, data: bytes) -> None:
    if not data:
        return
    with file_errors("write", path):
        file.write(data)
        file.flush()
