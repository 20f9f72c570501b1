"""Writes a cache of teacher outputs in complete shards, so that a kill loses at most the last one.

One writer at a time, by a lock that the operating system releases when the process ends. Groups of rows go to a hidden
file as they fill; `flush` closes it, syncs it and gives it its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.cache.format import CODECS, META, SHARD, CacheMeta, Codec
from stillhouse.protos.cache.reader import CacheReader
from stillhouse.protos.cache.rows import CacheRow, optional_columns, prompt_digest, schema, table
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import sync_directory, sync_file
from stillhouse.protos.files.locks import try_lock
from stillhouse.protos.tensors.distributions import Distributions

GROUP_BYTES = 128 * 1024
"""Size of a row group, uncompressed: a reader decodes all of it for one row."""
SHARD_BYTES = 256 * 2**20
"""A shard that has reached this size on disk is closed."""
SHARD_AGE_S = 60.0
"""A shard is closed once its first row is this old, so that a kill costs a minute of a teacher's work."""
ZSTD_LEVEL = 3
_TEMPORARY = ".writing-"
_Kind = tuple[bytes, tuple[str, ...]]
"""Metadata and optional columns shared by the rows of a shard."""


class CacheWriter:
    """The single writer of a cache; a context manager. Thread-safe."""

    def __init__(
        self,
        path: Path,
        *,
        codec: Codec = "lossless",
        shard_bytes: int = SHARD_BYTES,
        shard_age_s: float = SHARD_AGE_S,
    ) -> None:
        """Opens the cache in folder `path`, created if missing; partial files of a killed writer are removed.

        Incomplete or damaged files are left as they are, and listed in `reader.broken`.

        Raises:
            StillhouseError: CACHE_LOCKED if another writer has it.
        """
        if codec not in CODECS:
            raise ValueError(f"codec is {codec!r}; known are {', '.join(CODECS)}")
        self.path = path
        self._codec: Codec = codec
        self._shard_bytes, self._shard_age_s = shard_bytes, shard_age_s
        self._mutex = threading.RLock()
        self._open: dict[_Kind, _OpenShard] = {}
        self.num_added = 0
        """Outputs added by this writer."""
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(path)
        try:
            for left in path.glob(f"{_TEMPORARY}*"):
                left.unlink()
            self.reader = CacheReader(path, ignore_broken=True)
            """Reader of the complete shards."""
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(
        self,
        meta: CacheMeta,
        token_ids: NDArray[np.int32],
        answer: Distributions,
        query_token_ids: NDArray[np.int32] | None = None,
        token_type_ids: NDArray[np.int32] | None = None,
        *,
        student_prompt_ids: NDArray[np.int32] | None = None,
    ) -> bool:
        """Adds the output for the sequence `token_ids` [L], positions [answer.start, L); False if it is present already.

        One with another prompt of the student is another text, though its output is the same.

        `query_token_ids` belong to `answer.query_logprobs`, `token_type_ids` [L] to a pair of texts; `student_prompt_ids` are
        the student's tokens in the place of those before `answer.start`, if the teacher alone saw these. It survives a kill
        once its shard is closed: after `flush`, or automatically after `shard_age_s` or `shard_bytes`.

        Raises:
            ValueError: the output does not fit `meta` or the tokens, or codec "lossless" cannot represent it.
            OSError: the disk is full.
        """
        key = meta.key(token_ids, answer.start, query_token_ids, token_type_ids)
        meta = replace(meta, prompted=student_prompt_ids is not None)
        row = CacheRow(
            key=key,
            token_ids=token_ids,
            answer=answer,
            query_token_ids=query_token_ids,
            student_prompt_ids=student_prompt_ids,
            token_type_ids=token_type_ids,
        )
        row.check(meta)
        with self._mutex:
            if self.has_text(key, meta, student_prompt_ids):
                return False
            kind = (meta.to_json(self._codec), optional_columns(row))
            shard = self._open.get(kind)
            if shard is None:
                shard = self._open[kind] = _OpenShard(self.path, meta, self._codec, kind[1])
            with self._discarded_on_error(kind):
                shard.add(row)
            self.num_added += 1
            if shard.num_bytes >= self._shard_bytes or shard.age_s >= self._shard_age_s:
                self._close_shard(kind)
            return True

    def has(self, key: str, asked: CacheMeta) -> bool:
        """True if the output is present, in a complete or an open shard."""
        with self._mutex:
            return self.reader.has(key, asked) or self._pending(key, asked)

    def has_text(self, key: str, asked: CacheMeta, student_prompt_ids: NDArray[np.int32] | None) -> bool:
        """True as `has`, if the output's student read `student_prompt_ids` as well."""
        prompt = prompt_digest(student_prompt_ids)
        with self._mutex:
            return self.reader.has_text(key, asked, prompt) or any(
                (key, prompt) in shard.texts and shard.meta.serves(asked) for shard in self._open.values()
            )

    def get(self, key: str, asked: CacheMeta) -> Distributions | None:
        """The output by key, if present; closes the open shards if it is in one of them. Raises as CacheReader.get."""
        with self._mutex:
            if self._pending(key, asked) and not self.reader.has(key, asked):
                self.flush()
            return self.reader.get(key, asked)

    def flush(self) -> None:
        """Closes all open shards. Raises OSError if the disk is full."""
        with self._mutex:
            for kind in list(self._open):
                self._close_shard(kind)

    def close(self) -> None:
        """Flushes and releases the lock."""
        with self._mutex:
            try:
                self.flush()
            finally:
                for shard in self._open.values():
                    shard.discard()
                self._open.clear()
                self.reader.close()
                self._lock.close()

    def _pending(self, key: str, asked: CacheMeta) -> bool:
        return any(key in shard.keys and shard.meta.serves(asked) for shard in self._open.values())

    def _close_shard(self, kind: _Kind) -> None:
        with self._discarded_on_error(kind) as shard:
            path = shard.finish(self._next_number())
        del self._open[kind]
        self.reader.add_shard(path)

    @contextlib.contextmanager
    def _discarded_on_error(self, kind: _Kind) -> Iterator[_OpenShard]:
        """The open shard. One that could not be written to lacks bytes: it is removed, and never gets a name."""
        try:
            yield self._open[kind]
        except BaseException:
            self._open.pop(kind).discard()
            raise

    def _next_number(self) -> int:
        matches = (SHARD.fullmatch(each.name) for each in self.path.iterdir())
        return max((int(match[1]) for match in matches if match), default=-1) + 1


@dataclass(slots=True)
class _Sink:
    """A file object for Arrow that hashes what is written to it."""

    file: BinaryIO
    digest: Any = field(default_factory=hashlib.sha256)
    closed: bool = False

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.closed = True

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False


class _OpenShard:
    """A shard that is being written."""

    def __init__(self, folder: Path, meta: CacheMeta, codec: Codec, optional: tuple[str, ...]) -> None:
        import pyarrow.parquet as pq

        self.meta = meta
        self.keys: set[str] = set()
        self.texts: set[tuple[str, bytes]] = set()
        """Keys, each with the digest of the student's prompt."""
        self._codec: Codec = codec
        self._rows: list[CacheRow] = []
        self._row_bytes = 0
        self._born = time.monotonic()
        self._schema = schema(meta, codec, optional).with_metadata({META: meta.to_json(codec)})
        self._path = folder / f"{_TEMPORARY}{secrets.token_hex(8)}"
        self._sink = _Sink(self._path.open("wb"))
        self._writer = pq.ParquetWriter(
            self._sink,
            self._schema,
            compression="zstd",
            compression_level=ZSTD_LEVEL,
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
            # Groups bytes by significance, after which zstd output is half as large.
            column_encoding={
                f"{each.name}.list.element": "BYTE_STREAM_SPLIT" for each in list(self._schema)[2:]
            },
            store_schema=True,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return self._sink.tell()

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._born

    def add(self, row: CacheRow) -> None:
        self._rows.append(row)
        self.keys.add(row.key)
        self.texts.add((row.key, prompt_digest(row.student_prompt_ids)))
        self._row_bytes += row.num_bytes
        if self._row_bytes >= GROUP_BYTES:
            self._write_group()

    def finish(self, number: int) -> Path:
        """Completes the shard on disk and gives it its name."""
        self._write_group()
        self._writer.close()
        sync_file(self._sink.file)
        self._sink.file.close()
        path = self._path.with_name(f"{number:06d}-{self._sink.digest.hexdigest()}.parquet")
        self._path.rename(path)
        sync_directory(path.parent)
        return path

    def discard(self) -> None:
        """Removes an unfinished shard."""
        with contextlib.suppress(OSError):
            self._writer.close()
        self._writer.is_open = False  # else its finalizer would write to the closed file
        with contextlib.suppress(OSError):
            self._sink.file.close()
        self._path.unlink(missing_ok=True)

    def _write_group(self) -> None:
        if self._rows:
            made = table(self._rows, self._schema, self._codec)
            self._rows, self._row_bytes = [], 0
            self._writer.write_table(made, row_group_size=made.num_rows)


def _lock(path: Path) -> BinaryIO:
    """Locks the cache until the returned file is closed. Raises StillhouseError(CACHE_LOCKED)."""
    lock = try_lock(path / ".lock")
    if lock is None:
        raise StillhouseError(
            Reason.CACHE_LOCKED,
            f"Another run or command writes to the cache {path}. Wait for it or stop it, or give another path.",
            resource=str(path),
        )
    return lock
