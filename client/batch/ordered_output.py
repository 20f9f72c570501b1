"""The output of a batch: rows that are answered in any order, written in the order of the input, each exactly once.

A row goes to the journal first and to the output once all rows before it are there, so that a kill at any moment loses
nothing that was answered.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from stillhouse.client.batch.input_rows import Line
from stillhouse.client.batch.journal import CHAIN_START, Done, Header, Journal, Position, chained
from stillhouse.client.core.errors import file_error
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.locks import try_lock

RETRY = "retry of"
"""Among the settings of a retry: the state of the output whose failed rows it asks for again."""
MAX_AHEAD_ROWS = 1 << 16
"""Rows that wait for one before them; then no more are read."""
MAX_AHEAD_BYTES = 256 << 20
"""Bytes of these."""
SAFE_INTERVAL_S = 5.0
"""Time between two positions up to which the output is synced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Paths:
    """The files of one output."""

    out: Path

    @property
    def journal(self) -> Path:
        """What was done."""
        return self.out.with_name(f"{self.out.name}.journal")

    @property
    def failed(self) -> Path:
        """Rows that failed, where the output cannot hold them."""
        return self.out.with_name(f"{self.out.name}.failed")

    @property
    def retry(self) -> Paths:
        """The same, while failed rows are asked for again."""
        return Paths(out=self.out.with_name(f"{self.out.name}.retry"))


class Output:
    """The output at `paths`, begun, or taken up where it was; a context manager."""

    def __init__(
        self, paths: Paths, header: Header, *, overwrite: bool = False, has_failed_file: bool = False
    ) -> None:
        """With `has_failed_file` failed rows have a file of their own.

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
        """How far the output is written."""
        return self._position

    @property
    def num_answered(self) -> int:
        """Rows that were answered, written or not."""
        return self._position.rows + len(self._waiting)

    @property
    def num_failed(self) -> int:
        """Rows that failed, written or not."""
        return self._position.num_failed + self._waiting_failed

    @property
    def is_full(self) -> bool:
        """Whether so much waits for an earlier row that nothing more should be asked for."""
        return len(self._waiting) >= MAX_AHEAD_ROWS or self._waiting_bytes >= MAX_AHEAD_BYTES

    def is_answered(self, line: Line) -> bool:
        """Whether the row was answered before this process began. Lines are asked about in order, from the first.

        Raises StillhouseError (REQUEST_CONFLICT) if the input says something else than it did then.
        """
        if line.number < self._resumed.rows:
            self._chain = chained(self._chain, line.digest)
            if line.number == self._resumed.rows - 1 and self._chain != self._resumed.chain:
                raise self._changed(
                    f"one of the first {self._resumed.rows} rows is another than when they were answered"
                )
            return True
        known = self._known.pop(line.number, None)
        if known is not None and known.digest != line.digest:
            raise self._changed(f"line {line.line_number} is another than when it was answered")
        return known is not None

    def ended(self, num_lines: int) -> None:
        """Says that the input has no more lines. Raises StillhouseError if it has fewer than were answered."""
        answered = max([self._resumed.rows - 1, *self._known]) + 1
        if num_lines < answered:
            raise self._changed(f"it has {num_lines} rows, and {answered} were answered")

    def add(self, line: Line, out: str, failed: str = "", *, is_failed: bool = False) -> None:
        """Keeps the lines of one row, and writes what is complete. Raises StillhouseError if that fails."""
        done = Done(digest=line.digest, out=out, failed=failed, is_failed=is_failed)
        self.journal.done(line.number, done)
        self._waiting[line.number] = done
        self._waiting_bytes += len(out) + len(failed)
        self._waiting_failed += is_failed
        self._write()

    def finish(self) -> None:
        """Syncs everything and says that the batch reached its end."""
        assert not self._waiting, f"rows without an answer before {min(self._waiting)}"
        self._make_safe()
        self.journal.finish()
        if self._failed is not None and not self._position.failed_bytes:
            self._paths.failed.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets another process in; what was added stays."""
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
        """The journal names a position only when the disk has everything before it."""
        try:
            for file in (self._out, self._failed):
                if file is not None:
                    os.fsync(file.fileno())
        except OSError as error:
            raise file_error("write", self._paths.out, error) from error
        self.journal.safe(self._position)
        self._safe_at_s = time.monotonic()

    def _changed(self, how: str) -> StillhouseError:
        return StillhouseError(
            Reason.REQUEST_CONFLICT,
            f"The input is not the one that {self._paths.out} was begun with: {how}. Give the same input, to which rows may "
            "have been added, or choose another --out.",
        )


def commit_retry(paths: Paths) -> None:
    """Puts a finished retry in place of the output that it was made of; does nothing if there is none."""
    retry = paths.retry
    journal = Journal.open(retry.journal)
    if journal is None:
        return
    journal.close()
    if not journal.state.is_finished:
        return
    try:
        # The journal goes last: as long as it is there, the rest is done again.
        if retry.out.exists():
            retry.out.replace(paths.out)
        if retry.failed.exists():
            retry.failed.replace(paths.failed)
        elif not journal.state.position.failed_bytes:
            paths.failed.unlink(missing_ok=True)
        retry.journal.replace(paths.journal)
    except OSError as error:
        raise file_error("write", paths.out, error) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes from writing the output at `path`. Raises StillhouseError (REQUEST_CONFLICT) if one does."""
    try:
        lock = try_lock(path)
    except OSError as error:
        raise file_error("write", path, error) from error
    if lock is None:
        raise StillhouseError(
            Reason.REQUEST_CONFLICT,
            f"Another process writes {path}. Wait for it, or choose another --out.",
        )
    with lock:
        yield


def _journal(paths: Paths, header: Header, *, is_new: bool) -> Journal:
    journal = None if is_new else Journal.open(paths.journal)
    size = paths.out.stat().st_size if paths.out.exists() else 0
    if journal is None:
        if size and not is_new:
            raise StillhouseError(
                Reason.REQUEST_CONFLICT,
                f"{paths.out} exists and is no batch that could go on: it has no {paths.journal.name} beside it. Choose "
                "another --out, or replace it with --overwrite.",
            )
        return Journal.create(paths.journal, header)
    try:
        if _goes_on(paths.out, size, journal, header):
            return journal
    except BaseException:
        journal.close()
        raise
    journal.close()
    return Journal.create(paths.journal, header)


def _goes_on(out: Path, size: int, journal: Journal, header: Header) -> bool:
    """Whether the output is that of the journal. Raises StillhouseError where it is neither that nor to begin again."""
    written = journal.state.position.out_bytes
    if RETRY in header.settings and journal.header.settings.get(RETRY) != header.settings[RETRY]:
        return False  # a retry that was given up, and whose output has changed since
    if written and not size:
        return False  # the output was removed, to begin again
    _require_same(out, journal.header, header)
    if size < written:
        raise StillhouseError(
            Reason.REQUEST_CONFLICT,
            f"{out} has {size} bytes; {written} were written. Bring the file back, or start again with --overwrite.",
        )
    return True


def _require_same(out: Path, begun: Header, header: Header) -> None:
    for name in sorted((begun.settings.keys() | header.settings.keys()) - {RETRY}):
        was, wanted = begun.settings.get(name), header.settings.get(name)
        if was != wanted:
            raise StillhouseError(
                Reason.REQUEST_CONFLICT,
                f"{out} was begun with {name} {was!r}, and this command says {wanted!r}. Go on with the same settings, choose "
                "another --out, or start again with --overwrite.",
            )
    require_same_teacher(out, begun.teacher, header.teacher)


def require_same_teacher(out: Path, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises StillhouseError (TEACHER_CHANGED) for a teacher that would write other text."""
    for name in sorted(begun.keys() | now.keys()):
        if name != "model" and begun.get(name) != now.get(name):
            raise StillhouseError(
                Reason.TEACHER_CHANGED,
                f"{out} was begun with the teacher {begun.get('model')}, and what answers is "
                f"{now.get('model')} with another {name}. Start the first one again, choose another --out, or "
                "start again with --overwrite.",
            )


def _cut(path: Path, num_bytes: int) -> BinaryIO:
    """The file, `num_bytes` long, open for more."""
    try:
        file = path.open("ab")
        file.truncate(num_bytes)
    except OSError as error:
        raise file_error("write", path, error) from error
    return file


def _append(file: BinaryIO, path: Path, data: bytes) -> None:
    if not data:
        return
    try:
        file.write(data)
        file.flush()
    except OSError as error:
        raise file_error("write", path, error) from error
