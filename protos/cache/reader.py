"""Reads a cache of teacher outputs by key from memory-mapped shards that are not trusted.

Page checksums are verified on reading; every value is checked before it leaves this file.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.protos.cache.format import META, SHARD, CacheMeta, Codec, invalid_cache
from stillhouse.protos.cache.rows import (
    MAX_VALUES,
    STUDENT_PROMPT,
    CacheRow,
    RowGroup,
    StoredText,
    optional_columns,
    prompt_digest,
    schema,
)
from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.protos.tensors.distributions import Distributions

MAX_GROUP_BYTES = 512 * 2**20
"""Limit on one row group, uncompressed."""
MAX_OPEN_SHARDS = 128
KEPT_BYTES = 256 * 2**20
"""Decoded row groups kept in memory: later epochs over a small cache decode nothing."""
REMEDY = "Delete the file: a run with a teacher requests its sequences again. `stillhouse cache verify` finds every such file."
_KEY_COLUMNS = ("key",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A file of a cache, its footer checked."""

    path: Path
    meta: CacheMeta
    codec: Codec
    num_sequences: int
    num_tokens: int
    """Positions with a distribution."""
    num_bytes: int
    """Size on disk."""
    groups: tuple[int, ...]
    """Number of rows of each row group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokenShard:
    """A file that is not a complete shard."""

    path: Path
    error: StillhouseError


@dataclass(frozen=True, slots=True)
class _Location:
    shard: int
    row: int


class CacheReader:
    """Teacher outputs of a cache by key. Thread-safe."""

    def __init__(self, path: Path, *, ignore_broken: bool = False) -> None:
        """Opens the cache in folder `path`, or a single shard.

        With `ignore_broken`, incomplete or damaged files are listed in `broken` and left out.

        Raises:
            StillhouseError: CACHE_NOT_FOUND; CACHE_INVALID for an incomplete or damaged file.
        """
        self.path = path
        self.shards: list[Shard] = []
        self.broken: list[BrokenShard] = []
        self._locations: dict[bytes, tuple[_Location, ...]] = {}
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], RowGroup] = OrderedDict()
        self._kept_bytes = 0
        self._checked: set[_Location] = set()
        self._prompts: dict[int, list[bytes | None]] = {}
        self._lock = threading.RLock()
        for file in shard_paths(path):
            try:
                self.add_shard(file)
            except StillhouseError as error:
                if not ignore_broken:
                    raise
                self.broken.append(BrokenShard(path=file, error=error))

    @property
    def metas(self) -> list[CacheMeta]:
        """The distinct metadata of all shards."""
        kinds: list[CacheMeta] = []
        for shard in self.shards:
            if shard.meta not in kinds:
                kinds.append(shard.meta)
        return kinds

    def __len__(self) -> int:
        """Number of distinct keys."""
        return len(self._locations)

    def has(self, key: str, asked: CacheMeta) -> bool:
        """True if there is an output with every column that `asked` needs."""
        with self._lock:
            return self._find(key, asked) is not None

    def has_text(self, key: str, asked: CacheMeta, prompt: bytes) -> bool:
        """True as `has`, if the student's prompt of the output has the digest `prompt` as well, of `prompt_digest`.

        An output whose prompt cannot be read counts as if it were not there.
        """
        with self._lock:
            return any(self._prompt(place) == prompt for place in self._places(key, asked))

    def get(self, key: str, asked: CacheMeta) -> Distributions | None:
        """The output by key, or None if there is none with every column that `asked` needs.

        Raises:
            StillhouseError: CACHE_INVALID if it is damaged, or not a valid distribution.
        """
        with self._lock:
            place = self._find(key, asked)
            if place is None:
                return None
            shard = self.shards[place.shard]
            columns, index = self._columns(place)
            try:
                answer = columns.answer(index, asked, checked=place in self._checked)
            except (ValueError, TypeError, KeyError) as error:
                raise invalid_cache(shard.path, f"in row {place.row}, {error}", REMEDY) from error
            self._checked.add(place)
            return answer

    def rows(self, shard: Shard) -> Iterator[CacheRow]:
        """Every row of a shard, checked against its key. Raises StillhouseError(CACHE_INVALID)."""
        file = _open(shard.path)
        try:
            number = 0
            for group, size in enumerate(shard.groups):
                columns = _read_group(file, shard, group)
                for index in range(size):
                    try:
                        yield columns.row(index)
                    except (ValueError, TypeError, KeyError) as error:
                        raise invalid_cache(shard.path, f"in row {number}, {error}", REMEDY) from error
                    number += 1
        finally:
            file.close()

    def texts(self, shard: Shard) -> Iterator[StoredText]:
        """The sequences of a shard, each with the position of its first answer. Raises StillhouseError(CACHE_INVALID)."""
        names = ["start", "token_ids", *([STUDENT_PROMPT] if shard.meta.prompted else [])]
        file = _open(shard.path)
        try:
            for group in range(len(shard.groups)):
                columns = _read_group(file, shard, group, names)
                for index in range(shard.groups[group]):
                    try:
                        yield columns.stored_text(index)
                    except (ValueError, TypeError, KeyError) as error:
                        raise invalid_cache(shard.path, str(error), REMEDY) from error
        finally:
            file.close()

    def verify(self, shard: Shard) -> int:
        """Rows of a shard, each checked, and its bytes compared with the SHA-256 in its name.

        Raises:
            StillhouseError: CACHE_INVALID.
        """
        match = SHARD.fullmatch(shard.path.name)
        if match:
            with shard.path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != match[2]:
                raise invalid_cache(
                    shard.path,
                    f"its bytes have SHA-256 {found[:12]}…, and its name says {match[2][:12]}…",
                    REMEDY,
                )
        return sum(1 for _ in self.rows(shard))

    def add_shard(self, path: Path) -> None:
        """Takes in one more shard. Raises StillhouseError(CACHE_INVALID)."""
        file = _open(path)
        try:
            shard, keys = _read_footer(path, file)
        finally:
            file.close()
        with self._lock:
            number = len(self.shards)
            self.shards.append(shard)
            for row, key in enumerate(keys):
                self._locations[key] = (*self._locations.get(key, ()), _Location(number, row))

    def forget(self, key: str) -> None:
        """Have no answer by this key any more, because it is damaged."""
        with self._lock:
            self._locations.pop(bytes.fromhex(key), None)

    def close(self) -> None:
        """Closes the files; the reader cannot be used any more."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()
            self._groups.clear()
            self._kept_bytes = 0

    def _find(self, key: str, asked: CacheMeta) -> _Location | None:
        return next(self._places(key, asked), None)

    def _places(self, key: str, asked: CacheMeta) -> Iterator[_Location]:
        """The outputs with every column that is needed; what came last replaces damaged ones."""
        for place in reversed(self._locations.get(bytes.fromhex(key), ())):
            if self.shards[place.shard].meta.serves(asked):
                yield place

    def _prompt(self, place: _Location) -> bytes | None:
        """The digest of a row's student prompt, None where it cannot be read; those of a shard are read together, once."""
        if not self.shards[place.shard].meta.prompted:
            return b""
        if place.shard not in self._prompts:
            unreadable: tuple[type[Exception], ...] = (*_errors(), StillhouseError)
            try:
                column = self._file(place.shard).read(columns=[STUDENT_PROMPT]).column(STUDENT_PROMPT)
                found = [
                    None if each.values is None else prompt_digest(each.values.to_numpy()) for each in column
                ]
            except unreadable:
                found = [None] * self.shards[place.shard].num_sequences
            self._prompts[place.shard] = found
        return self._prompts[place.shard][place.row]

    def _columns(self, place: _Location) -> tuple[RowGroup, int]:
        """The group of rows that holds a place, and the place's index in it."""
        shard, index, group = self.shards[place.shard], place.row, 0
        while index >= shard.groups[group]:
            index -= shard.groups[group]
            group += 1
        name = (place.shard, group)
        if name in self._groups:
            self._groups.move_to_end(name)
        else:
            self._groups[name] = read = _read_group(self._file(place.shard), shard, group)
            self._kept_bytes += read.table.nbytes
            while self._kept_bytes > KEPT_BYTES and len(self._groups) > 1:
                self._kept_bytes -= self._groups.popitem(last=False)[1].table.nbytes
        return self._groups[name], index

    def _file(self, number: int) -> Any:
        if number in self._files:
            self._files.move_to_end(number)
        else:
            self._files[number] = _open(self.shards[number].path)
            while len(self._files) > MAX_OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
        return self._files[number]


def shard_paths(path: Path) -> Sequence[Path]:
    """The shards in a cache by number, or `path` itself if it is a file. Raises StillhouseError(CACHE_NOT_FOUND)."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise StillhouseError(
            Reason.CACHE_NOT_FOUND,
            f"There is no cache at {path}. Build one with `stillhouse cache build`, or correct the path.",
            resource=str(path),
        )
    return sorted(each for each in path.glob("*.parquet") if not each.name.startswith("."))


def _open(path: Path) -> Any:
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(
            path,
            memory_map=True,
            page_checksum_verification=True,
            thrift_string_size_limit=64 * 2**20,
            thrift_container_size_limit=4 * 2**20,
        )
    except _errors() as error:
        raise invalid_cache(path, first_line(error).rstrip("."), REMEDY) from error


def _errors() -> tuple[type[Exception], ...]:
    """Exceptions of pyarrow for a malformed file."""
    import pyarrow as pa

    return (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError)


def _read_footer(path: Path, file: Any) -> tuple[Shard, list[bytes]]:
    """A shard's metadata and the keys of its rows."""
    try:
        footer = file.metadata
        about: Mapping[bytes, bytes] = footer.metadata or {}
        if META not in about:
            raise ValueError("it has no metadata of a teacher; Stillhouse did not write it")
        meta, codec = CacheMeta.from_json(about[META])
        groups = _check_groups(footer)
        _check_columns(file.schema_arrow, meta, codec)
        keys = [bytes.fromhex(key) for key in file.read(columns=list(_KEY_COLUMNS)).column("key").to_pylist()]
        if len(keys) != sum(groups) or any(len(key) != 32 for key in keys):
            raise ValueError("its keys are not one SHA-256 per row")
    except _errors() as error:
        raise invalid_cache(path, first_line(error).rstrip("."), REMEDY) from error
    shard = Shard(
        path=path,
        meta=meta,
        codec=codec,
        num_sequences=sum(groups),
        num_tokens=_num_tokens(footer),
        num_bytes=path.stat().st_size,
        groups=groups,
    )
    return shard, keys


def _check_groups(footer: Any) -> tuple[int, ...]:
    """Rows in each group; raises ValueError for a group that would take too much memory."""
    groups = []
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        columns = [group.column(index) for index in range(group.num_columns)]
        if not 1 <= group.num_rows <= MAX_VALUES:
            raise ValueError(f"its group {number} has {group.num_rows} rows")
        if any(not 0 <= column.num_values <= MAX_VALUES for column in columns):
            raise ValueError(f"its group {number} has a column of more than {MAX_VALUES} numbers")
        if any(not 0 <= column.total_uncompressed_size <= MAX_GROUP_BYTES for column in columns):
            raise ValueError(f"its group {number} has a column of more than {MAX_GROUP_BYTES} bytes")
        groups.append(group.num_rows)
    return tuple(groups)


def _check_columns(found: Any, meta: CacheMeta, codec: Codec) -> None:
    """Checks the types of the columns. Raises ValueError. Unknown columns are ignored."""
    names = set(found.names)
    optional = [
        name for name in optional_columns(None) if name in names or (name == STUDENT_PROMPT and meta.prompted)
    ]
    for field in schema(meta, codec, optional):
        if field.name not in names:
            raise ValueError(f"it has no column {field.name}")
        if not found.field(field.name).equals(field):
            raise ValueError(f"its column {field.name} is {found.field(field.name).type}, not {field.type}")


def _num_tokens(footer: Any) -> int:
    names = [footer.schema.column(index).path for index in range(footer.num_columns)]
    at = next(index for index, name in enumerate(names) if name.startswith("target_logprobs."))
    return sum(footer.row_group(number).column(at).num_values for number in range(footer.num_row_groups))


def _read_group(file: Any, shard: Shard, group: int, names: list[str] | None = None) -> RowGroup:
    try:
        table = file.read_row_group(group, columns=names, use_threads=False)
        if table.num_rows != shard.groups[group]:
            raise ValueError(f"its group {group} has {table.num_rows} rows, not {shard.groups[group]}")
        if any(column.null_count for column in table.columns):
            raise ValueError(f"its group {group} has empty places")
        return RowGroup(table.combine_chunks(), shard.meta, shard.codec)
    except _errors() as error:
        raise invalid_cache(shard.path, first_line(error).rstrip("."), REMEDY) from error
