"""Answers out of a cache, and from a teacher what it lacks: with the interface of a stream to a teacher, so that nobody sees the difference."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from stillhouse.protos.cache.format import CacheMeta
from stillhouse.protos.cache.reader import CacheReader
from stillhouse.protos.cache.writer import CacheWriter
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.train.process.waiting import Patience
from stillhouse.student_trainer.train.teacher.query import TargetStream, TeacherQuery

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item:
    key: str
    asked: TeacherQuery
    reading: Future[Distributions | None] | None
    """The answer on its way from the cache, if it is there."""
    at_teacher: bool
    """Whether a teacher was asked; with neither, an earlier sequence asks for the same."""


class CachedStream:
    """One kind of answers of one teacher; a thread reads ahead of the student."""

    def __init__(
        self, meta: CacheMeta, reader: CacheReader, *, live: TargetStream | None, writer: CacheWriter | None
    ) -> None:
        """`live` answers what the cache lacks, None if nobody does; `writer` keeps its answers."""
        self._meta = meta
        self._reader = reader
        self._live = live
        self._writer = writer
        self._items: dict[int, _Item] = {}
        self._flying: set[str] = set()
        """Keys that a teacher was asked for, and whose answers will be kept."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache")
        self.num_found = 0
        """Answers that came out of the cache."""

    @property
    def num_asked(self) -> int:
        """Sequences that a teacher was asked for."""
        return self._live.num_asked if self._live else 0

    def submit(self, sequence_id: int, asked: TeacherQuery) -> None:
        """Look for the answer, and ask for it if it is missing and nobody has asked yet."""
        key = self._meta.key(asked.token_ids, asked.start, asked.query_token_ids)
        reading = self._thread.submit(self._read, key) if self._has(key) else None
        at_teacher = reading is None and self._live is not None and key not in self._flying
        if at_teacher and self._live:
            self._live.submit(sequence_id, asked)
            if self._writer:
                self._flying.add(key)
        self._items[sequence_id] = _Item(key=key, asked=asked, reading=reading, at_teacher=at_teacher)

    def take(self, sequence_id: int, patience: Patience) -> Distributions:
        """The answer.

        Raises:
            Stopped: the run shall stop.
            StillhouseError: what the teacher says of this sequence; CACHE_MISS or CACHE_INVALID if there is no teacher.
        """
        item = self._items.pop(sequence_id)
        if item.at_teacher:
            return self._from_teacher(sequence_id, item, patience)
        found = self._found(item)
        if found is not None:
            self.num_found += 1
            return found
        if self._live is None:
            raise StillhouseError(
                Reason.CACHE_MISS, f"The cache has no answer to {item.asked.place}, and no teacher is asked."
            )
        # The answer turned out damaged, or whoever asked for the same sequence did not get one.
        self._live.submit(sequence_id, item.asked)
        return self._from_teacher(sequence_id, item, patience)

    def close(self) -> None:
        """Ends the thread and the stream to the teacher; the cache stays open."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._live:
            self._live.close()

    def _from_teacher(self, sequence_id: int, item: _Item, patience: Patience) -> Distributions:
        assert self._live is not None
        try:
            answer = self._live.take(sequence_id, patience)
        finally:
            self._flying.discard(item.key)
        if self._writer is not None:
            self._writer.add(self._meta, item.asked.token_ids, answer, item.asked.query_token_ids)
        return answer

    def _found(self, item: _Item) -> Distributions | None:
        try:
            found = item.reading.result() if item.reading else self._read(item.key)
        except StillhouseError as error:
            if self._live is None or error.reason is not Reason.CACHE_INVALID:
                raise
            log.warning("a damaged answer in the cache is asked for again", why=error.message)
            self._reader.forget(item.key)
            return None
        asked = item.asked
        if found is not None and (
            found.start != asked.start or found.start + found.num_rows != len(asked.token_ids)
        ):
            raise StillhouseError(
                Reason.CACHE_INVALID,
                f"The cache answers positions [{found.start}, {found.start + found.num_rows}) of {asked.place}; "
                f"[{asked.start}, {len(asked.token_ids)}) was asked for. Find the file with `stillhouse cache verify`.",
            )
        return found

    def _has(self, key: str) -> bool:
        return (self._writer or self._reader).has(key, self._meta)

    def _read(self, key: str) -> Distributions | None:
        return (self._writer or self._reader).get(key, self._meta)


def cache_metrics(streams: Sequence[CachedStream]) -> dict[str, float]:
    """Answers that came out of a cache, and those that it lacked."""
    return {
        "cache/found": float(sum(stream.num_found for stream in streams)),
        "cache/missed": float(sum(stream.num_asked for stream in streams)),
    }
