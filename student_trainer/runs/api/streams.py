"""Streams of a run: history, log and artifacts; each can resume from where it broke."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncGenerator, Callable
from io import BufferedReader

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.runs.api import artifacts as files
from stillhouse.student_trainer.runs.api import logs
from stillhouse.student_trainer.runs.store.database import DatabaseThread
from stillhouse.student_trainer.runs.store.run_state import ENDED
from stillhouse.student_trainer.runs.store.store import Store
from stillhouse.student_trainer.runs.supervision.journal_tail import ChangeNotifier

EVENTS_AT_ONCE = 200
LOG_POLL_S = 0.2
"""Poll interval of a followed log."""


class RunStreams:
    """Streaming reads of runs."""

    def __init__(
        self, store: Store, db: DatabaseThread, notifier: ChangeNotifier, run_dir: Callable[[str], RunDir]
    ) -> None:
        self._store = store
        self._db = db
        self._notifier = notifier
        self._run_dir = run_dir
        self._artifacts = files.Artifacts()

    async def watch(self, run_id: str, after: int) -> AsyncGenerator[pb.WatchRunResponse, None]:
        """The current run if `after` is 0; then every event after sequence `after`, until the run has ended.

        Raises:
            StillhouseError: INVALID_REQUEST if `after` is ahead of the run, DRAINING when the service stops.
        """
        with self._notifier.subscribe(run_id) as news:
            run, newest = await self._db(self._store.get_with_sequence, run_id)
            if not 0 <= after <= newest:
                raise StillhouseError(
                    Reason.INVALID_REQUEST,
                    f"after_sequence is {after}; the run has {newest} events. Start with 0.",
                )
            if after == 0:
                yield pb.WatchRunResponse(sequence=newest, run=run)
                after = newest
            while True:
                news.clear()
                events = await self._db(self._store.events, run_id, after=after, limit=EVENTS_AT_ONCE)
                run, newest = await self._db(self._store.get_with_sequence, run_id)
                for event in events:
                    if event.HasField("run"):
                        event.run.spec.CopyFrom(run.spec)
                        event.run.effective_spec.CopyFrom(run.effective_spec)
                    yield event
                    after = event.sequence
                if after < newest:
                    continue
                if run.state in ENDED:
                    return
                if self._notifier.closed:
                    raise _draining()
                await news.wait()

    async def logs(
        self, run_id: str, attempt: int, offset: int, *, follow: bool
    ) -> AsyncGenerator[pb.StreamLogsResponse, None]:
        """The log from byte `offset`, counted from the end if negative; follows it to the run's end if `follow`."""
        run = await self._db(self._store.get, run_id)
        if attempt < 0 or attempt > len(run.attempts):
            raise StillhouseError(
                Reason.INVALID_REQUEST,
                f"attempt is {attempt}; run {run_id} has {len(run.attempts)}; 0 means all.",
            )
        run_dir = self._run_dir(run_id)
        if offset < 0:
            offset = max(0, offset + await asyncio.to_thread(logs.size, run_dir, attempt))
        while True:
            # Checked before reading, so that all that was written before the end is read.
            ended = not follow or self._log_ended(await self._db(self._store.get, run_id), attempt)
            while data := await asyncio.to_thread(logs.read, run_dir, attempt, offset):
                offset += len(data)
                yield pb.StreamLogsResponse(data=data, next_offset=offset)
            if ended:
                return
            if self._notifier.closed:
                raise _draining()
            await asyncio.sleep(LOG_POLL_S)

    @staticmethod
    def _log_ended(run: pb.Run, attempt: int) -> bool:
        """True if the requested log is complete."""
        return run.state in ENDED or (attempt != 0 and run.attempts[attempt - 1].HasField("end_time"))

    async def artifacts(self, run_id: str) -> list[pb.Artifact]:
        """Artifacts of the run."""
        await self._db(self._store.get, run_id)
        return await asyncio.to_thread(self._artifacts.listing, self._run_dir(run_id).path)

    async def download(
        self, run_id: str, path: str, offset: int
    ) -> AsyncGenerator[pb.DownloadArtifactResponse, None]:
        """The file from byte `offset`, up to its size when opened; the last chunk carries the complete file's hash."""
        await self._db(self._store.get, run_id)
        if not files.is_artifact(path):
            raise StillhouseError(
                Reason.ARTIFACT_NOT_FOUND,
                f"{path[:200]!r} is not an artifact; ListArtifacts shows all.",
                resource=path,
            )
        with await asyncio.to_thread(files.open_below, self._run_dir(run_id).path, path) as file:
            size = os.fstat(file.fileno()).st_size
            if not 0 <= offset <= size:
                raise StillhouseError(
                    Reason.INVALID_REQUEST,
                    f"start_offset is {offset}; {path!r} has {size} bytes. Start at 0.",
                )
            digest = await asyncio.to_thread(_hash_up_to, file, offset)
            if offset == size:
                yield pb.DownloadArtifactResponse(sha256=digest.hexdigest())
            while offset < size:
                data = await asyncio.to_thread(file.read, min(files.PIECE_BYTES, size - offset))
                if not data:
                    raise StillhouseError(
                        Reason.ARTIFACT_NOT_FOUND,
                        f"{path!r} shrank while it was read; list the artifacts again.",
                    )
                digest.update(data)
                offset += len(data)
                yield pb.DownloadArtifactResponse(
                    data=data, sha256=digest.hexdigest() if offset == size else ""
                )


def _hash_up_to(file: BufferedReader, offset: int) -> hashlib._Hash:
    """Hash of the file's first `offset` bytes; leaves the file positioned after them."""
    digest = hashlib.sha256()
    while file.tell() < offset:
        data = file.read(min(files.PIECE_BYTES, offset - file.tell()))
        if not data:
            break
        digest.update(data)
    return digest


def _draining() -> StillhouseError:
    return StillhouseError(
        Reason.DRAINING,
        "The run service is stopping; the run continues. Resume the stream later.",
        retry_after_s=2.0,
    )
