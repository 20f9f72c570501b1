"""Targets from a cache, and on a miss from a teacher; a TargetStream, so that callers see no difference."""

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
from stillhouse.student_trainer.train.process.waiting import TeacherWait
from stillhouse.student_trainer.train.teacher.query import TargetStream, TeacherQuery

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    key: str
    query: TeacherQuery
    reading: Future[Distributions | None] | None
    """The result on its way from the cache, if it is there."""
    at_teacher: bool
    """A teacher is queried; with neither, an earlier query asks for the same."""


class CachedStream:
    """Results of one request to one teacher; a thread reads ahead of the student."""

    def __init__(
        self, meta: CacheMeta, reader: CacheReader, *, live: TargetStream | None, writer: CacheWriter | None
    ) -> None:
        """`live` answers queries that the cache misses, None without a teacher; `writer` stores its results."""
        self._meta = meta
        self._reader = reader
        self._store = writer or reader
        self._live = live
        self._writer = writer
        self._pending: dict[int, _Pending] = {}
        self._in_flight: set[str] = set()
        """Keys that a teacher is queried for, and whose results will be stored."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache")
        self.num_found = 0
        """Cache hits."""

    @property
    def num_asked(self) -> int:
        """Sequences sent to a teacher."""
        return self._live.num_asked if self._live else 0

    def submit(self, sequence_id: int, query: TeacherQuery) -> None:
        """Looks the result up, and queries the teacher on a miss, unless an earlier query of the same key does."""
        key = self._meta.key(query.token_ids, query.start, query.query_token_ids, query.token_type_ids)
        reading = (
            self._thread.submit(self._store.get, key, self._meta)
            if self._store.has(key, self._meta)
            else None
        )
        at_teacher = reading is None and self._live is not None and key not in self._in_flight
        if at_teacher and self._live:
            self._live.submit(sequence_id, query)
            if self._writer:
                self._in_flight.add(key)
        self._pending[sequence_id] = _Pending(key=key, query=query, reading=reading, at_teacher=at_teacher)

    def get_result(self, sequence_id: int, patience: TeacherWait) -> Distributions:
        """Waits for the result.

        Raises:
            Stopped: the run was asked to stop.
            StillhouseError: the teacher's error for this sequence; CACHE_MISS or CACHE_INVALID without a teacher.
        """
        pending = self._pending.pop(sequence_id)
        if pending.at_teacher:
            return self._receive(sequence_id, pending, patience)
        found = self._lookup(pending)
        if found is not None:
            self.num_found += 1
            return found
        if self._live is None:
            raise StillhouseError(
                Reason.CACHE_MISS,
                f"The cache has no answer to {pending.query.place}, and no teacher is asked.",
            )
        # The stored result is damaged, or the earlier query of the same key failed.
        self._live.submit(sequence_id, pending.query)
        return self._receive(sequence_id, pending, patience)

    def close(self) -> None:
        """Ends the thread and the teacher's stream; the cache stays open."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._live:
            self._live.close()

    def _receive(self, sequence_id: int, pending: _Pending, patience: TeacherWait) -> Distributions:
        assert self._live is not None
        try:
            answer = self._live.get_result(sequence_id, patience)
        finally:
            self._in_flight.discard(pending.key)
        if self._writer is not None:
            query = pending.query
            self._writer.add(
                self._meta,
                query.token_ids,
                answer,
                query.query_token_ids,
                query.token_type_ids,
                student_prompt_ids=query.student_prompt,
            )
        return answer

    def _lookup(self, pending: _Pending) -> Distributions | None:
        try:
            found = pending.reading.result() if pending.reading else self._store.get(pending.key, self._meta)
        except StillhouseError as error:
            if self._live is None or error.reason is not Reason.CACHE_INVALID:
                raise
            log.warning("a damaged answer in the cache is asked for again", why=error.message)
            self._reader.forget(pending.key)
            return None
        query = pending.query
        if found is not None and (
            found.start != query.start or found.start + found.num_rows != len(query.token_ids)
        ):
            raise StillhouseError(
                Reason.CACHE_INVALID,
                f"The cache answers positions [{found.start}, {found.start + found.num_rows}) of {query.place}; "
                f"[{query.start}, {len(query.token_ids)}) was asked for. Find the file with `stillhouse cache verify`.",
            )
        return found


def cache_metrics(streams: Sequence[CachedStream]) -> dict[str, float]:
    """Cache hits and misses."""
    return {
        "cache/found": float(sum(stream.num_found for stream in streams)),
        "cache/missed": float(sum(stream.num_asked for stream in streams)),
    }
