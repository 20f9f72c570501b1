"""What a batch has done, beside its output: a file that only grows, so that a killed batch goes on where it was.

The first line says what the batch is; each later one is a row that was answered, a position up to which the output is
safe on the disk, or an adapter that rows were written with. A torn end is cut when the file is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from stillhouse.client.core.errors import file_error
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import atomic_writer

VERSION = 1
COMPACT_BYTES = 64 << 20
"""Size from which what the output already holds is dropped from the journal."""
CHAIN_START = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a batch is; one that goes on must be the same."""

    settings: Mapping[str, Any]
    """Every setting that decides on the output, by name."""
    teacher: Mapping[str, Any]
    """Model and fingerprints of the teacher."""
    started_s: int
    """When it was begun, in seconds since 1970."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """A row that was answered."""

    digest: str
    """Of its line in the input."""
    out: str
    """Its lines in the output; empty if there are none."""
    failed: str = ""
    """Its line in the file of failed rows; empty if there is none."""
    is_failed: bool = False
    """Whether it failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """How far the output is safe on the disk."""

    rows: int = 0
    """Rows that the output holds, counted from the first."""
    chain: str = CHAIN_START
    """Digest of their lines in the input."""
    out_bytes: int = 0
    """Length of the output."""
    failed_bytes: int = 0
    """Length of the file of failed rows."""
    num_failed: int = 0
    """How many of them failed."""

    def after(self, done: Done) -> Position:
        """The position behind one more row."""
        return Position(
            rows=self.rows + 1,
            chain=chained(self.chain, done.digest),
            out_bytes=self.out_bytes + len(done.out.encode()),
            failed_bytes=self.failed_bytes + len(done.failed.encode()),
            num_failed=self.num_failed + done.is_failed,
        )


@dataclass(kw_only=True, slots=True)
class State:
    """What a journal says."""

    position: Position = field(default_factory=Position)
    rows: dict[int, Done] = field(default_factory=dict)
    """Answered rows that the position does not include, by number."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Adapter to its fingerprint; empty where a name meant the base model."""
    is_finished: bool = False
    """Whether the batch reached its end."""


class Journal:
    """The journal at `path`, open for more."""

    def __init__(self, path: Path, header: Header, state: State, file: BinaryIO) -> None:
        self.path = path
        self.header = header
        self.state = state
        self._file = file

    @classmethod
    def open(cls, path: Path) -> Journal | None:
        """The journal that is there, its torn end cut; None if there is none, or none that was ever begun.

        Raises StillhouseError if it cannot be read, or was written by another version.
        """
        try:
            file = path.open("r+b")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise file_error("read", path, error) from error
        try:
            header, state, end = _read(file, path)
            if header is None:
                file.close()
                return None
            file.seek(end)
            file.truncate()
        except OSError as error:
            file.close()
            raise file_error("read", path, error) from error
        except StillhouseError:
            file.close()
            raise
        return cls(path, header, state, file)

    @classmethod
    def create(cls, path: Path, header: Header, state: State | None = None) -> Journal:
        """A journal that says what `state` says, in place of any other. Raises StillhouseError if it cannot be written."""
        state = state or State()
        try:
            with atomic_writer(path) as written:
                for record in _records(header, state):
                    written.write(_line(record))
            file = path.open("r+b")
            file.seek(0, os.SEEK_END)
        except OSError as error:
            raise file_error("write", path, error) from error
        return cls(path, header, state, file)

    def done(self, number: int, done: Done) -> None:
        """Keeps an answered row, before the output has it."""
        self.state.rows[number] = done
        self._append({"row": number, **asdict(done)})

    def adapter(self, name: str, fingerprint: str) -> None:
        """Keeps what `name` meant."""
        self.state.adapters[name] = fingerprint
        self._append({"adapter": name, "fingerprint": fingerprint})

    def safe(self, position: Position) -> None:
        """Says that the output up to `position` is on the disk."""
        for number in range(self.state.position.rows, position.rows):
            self.state.rows.pop(number, None)
        self.state.position = position
        self._append({"position": asdict(position)})
        if self._file.tell() > COMPACT_BYTES:
            self._compact()

    def finish(self) -> None:
        """Says that the batch reached its end."""
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
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise file_error("write", self.path, error) from error


def chained(chain: str, digest: str) -> str:
    """The digest of all lines up to one more."""
    return hashlib.blake2b((chain + digest).encode(), digest_size=16).hexdigest()


def _records(header: Header, state: State) -> Iterable[Mapping[str, Any]]:
    yield {"stillhouse_batch": VERSION, **asdict(header)}
    for name, fingerprint in state.adapters.items():
        yield {"adapter": name, "fingerprint": fingerprint}
    yield {"position": asdict(state.position)}
    for number, done in state.rows.items():
        yield {"row": number, **asdict(done)}
    yield {"finished": state.is_finished}


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _read(file: BinaryIO, path: Path) -> tuple[Header | None, State, int]:
    """Header, state, and where the last whole record ends."""
    header: Header | None = None
    state = State()
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
            break  # what a failing disk left; the rows behind it are asked for again
        end += len(line)
    return header, state, end


def _header(record: Mapping[str, Any], path: Path) -> Header:
    if record.get("stillhouse_batch") != VERSION:
        raise StillhouseError(
            Reason.REQUEST_CONFLICT,
            f"{path} is no journal of this version of Stillhouse. Choose another output, or start again with --overwrite.",
        )
    return Header(
        settings=dict(record["settings"]),
        teacher=dict(record["teacher"]),
        started_s=int(record["started_s"]),
    )


def _apply(record: Mapping[str, Any], state: State) -> None:
    if "row" in record:
        values = {**record}
        number = values.pop("row")
        state.rows[int(number)] = Done(**values)
    elif "position" in record:
        state.position = Position(**record["position"])
        for number in [each for each in state.rows if each < state.position.rows]:
            del state.rows[number]
    elif "adapter" in record:
        state.adapters[str(record["adapter"])] = str(record["fingerprint"])
    elif "finished" in record:
        state.is_finished = bool(record["finished"])
