"""Journal of a batch beside its output: an append-only file from which a killed batch resumes.

The first line is the header; each later one records a completed row, a position up to which the output is synced, or
an adapter in use. A torn end is truncated when the file is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from stillhouse.client.core.errors import file_errors
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import atomic_writer

VERSION = 1
COMPACT_BYTES = 64 << 20
"""Size above which rows that the output already holds are dropped from the journal."""
CHAIN_START = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """Settings and teacher of a batch; they must be equal to resume it."""

    settings: Mapping[str, Any]
    """Every setting that determines the output, by name."""
    teacher: Mapping[str, Any]
    """Model and fingerprints of the teacher."""
    started_s: int
    """Start time, in seconds since 1970."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRecord:
    """A completed row."""

    digest: str
    """Digest of its input line."""
    out: str
    """Its output lines, each with its end; empty if there are none."""
    failed: str = ""
    """Its line in the file of failed rows, if the output cannot hold it; else empty."""
    is_failed: bool = False
    """True if the row failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Synced prefix of the output."""

    rows: int = 0
    """Rows in the output, counted from the first."""
    chain: str = CHAIN_START
    """Chained digest of their input lines."""
    out_bytes: int = 0
    """Length of the output."""
    failed_bytes: int = 0
    """Length of the file of failed rows."""
    num_failed: int = 0
    """Number of failed rows among them."""

    def after(self, done: RowRecord) -> Position:
        """Returns the position after one more row."""
        return Position(
            rows=self.rows + 1,
            chain=extend_chain(self.chain, done.digest),
            out_bytes=self.out_bytes + len(done.out.encode()),
            failed_bytes=self.failed_bytes + len(done.failed.encode()),
            num_failed=self.num_failed + done.is_failed,
        )


@dataclass(kw_only=True, slots=True)
class JournalState:
    """Content of a journal."""

    position: Position = field(default_factory=Position)
    rows: dict[int, RowRecord] = field(default_factory=dict)
    """Completed rows beyond the position, by number."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Adapter name to fingerprint; empty where a name means the base model."""
    is_finished: bool = False
    """True once the batch is complete."""


class Journal:
    """The journal at `path`, open for appending."""

    def __init__(self, path: Path, header: Header, state: JournalState, file: BinaryIO) -> None:
        self.path = path
        self.header = header
        self.state = state
        self._file = file

    @classmethod
    def open(cls, path: Path) -> Journal | None:
        """Opens an existing journal and truncates its torn end; returns None if there is none, or only an empty one.

        Raises StillhouseError if it cannot be read, or was written by another version.
        """
        with file_errors("read", path):
            if not path.exists():
                return None
            file = path.open("r+b")
        try:
            with file_errors("read", path):
                header, state, end = _read(file, path)
                if header is None:
                    file.close()
                    return None
                file.seek(end)
                file.truncate()
        except BaseException:
            file.close()
            raise
        return cls(path, header, state, file)

    @classmethod
    def create(cls, path: Path, header: Header, state: JournalState | None = None) -> Journal:
        """Writes a journal of `state`, replacing any other. Raises StillhouseError if it cannot be written."""
        state = state or JournalState()
        with file_errors("write", path):
            with atomic_writer(path) as written:
                for record in _records(header, state):
                    written.write(_line(record))
            file = path.open("r+b")
            file.seek(0, os.SEEK_END)
        return cls(path, header, state, file)

    def add_row(self, number: int, row: RowRecord) -> None:
        """Records a completed row before it is written to the output."""
        self.state.rows[number] = row
        self._append({"row": number, **asdict(row)})

    def add_adapter(self, name: str, fingerprint: str) -> None:
        """Records the weights that `name` stands for."""
        self.state.adapters[name] = fingerprint
        self._append({"adapter": name, "fingerprint": fingerprint})

    def mark_synced(self, position: Position) -> None:
        """Records that the output up to `position` is on the disk."""
        for number in range(self.state.position.rows, position.rows):
            self.state.rows.pop(number, None)
        self.state.position = position
        self._append({"position": asdict(position)})
        if self._file.tell() > COMPACT_BYTES:
            self._compact()

    def finish(self) -> None:
        """Records that the batch is complete."""
        self.state.is_finished = True
        self._compact()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _compact(self) -> None:
        smaller = Journal.create(self.path, self.header, self.state)
        self._file.close()
        self._file = smaller._file

    def _append(self, record: Mapping[str, Any]) -> None:
        with file_errors("write", self.path):
            self._file.write(_line(record))
            self._file.flush()


def extend_chain(chain: str, digest: str) -> str:
    """Chains one more line's digest to that of all lines before it."""
    return hashlib.blake2b((chain + digest).encode(), digest_size=16).hexdigest()


def _records(header: Header, state: JournalState) -> Iterable[Mapping[str, Any]]:
    yield {"stillhouse_batch": VERSION, **asdict(header)}
    for name, fingerprint in state.adapters.items():
        yield {"adapter": name, "fingerprint": fingerprint}
    yield {"position": asdict(state.position)}
    for number, done in state.rows.items():
        yield {"row": number, **asdict(done)}
    yield {"finished": state.is_finished}


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _read(file: BinaryIO, path: Path) -> tuple[Header | None, JournalState, int]:
    """Reads header, state, and the end offset of the last complete record."""
    header: Header | None = None
    state = JournalState()
    end = 0
    for line in file:
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
            if not isinstance(record, dict):
                break
            if header is None:
                header = _header(record, path)
            else:
                _apply(record, state)
        except (ValueError, TypeError, KeyError):
            break  # damage of a failing disk; the rows after it are generated again
        end += len(line)
    return header, state, end


def _header(record: Mapping[str, Any], path: Path) -> Header:
    if record.get("stillhouse_batch") != VERSION:
        raise StillhouseError(
            Reason.REQUEST_CONFLICT,
            f"{path} is not a journal of this version of Stillhouse. Choose another output, or start again with --overwrite.",
        )
    return Header(
        settings=dict(record["settings"]),
        teacher=dict(record["teacher"]),
        started_s=int(record["started_s"]),
    )


def _apply(record: Mapping[str, Any], state: JournalState) -> None:
    if "row" in record:
        values = {**record}
        number = values.pop("row")
        state.rows[int(number)] = RowRecord(**values)
    elif "position" in record:
        state.position = Position(**record["position"])
        for number in [each for each in state.rows if each < state.position.rows]:
            del state.rows[number]
    elif "adapter" in record:
        state.adapters[str(record["adapter"])] = str(record["fingerprint"])
    elif "finished" in record:
        state.is_finished = bool(record["finished"])
