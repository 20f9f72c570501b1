"""Follows runs that have `trackers`, and keeps a process for each tracker until it has all of its run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from stillhouse.protos.child_process import end_process
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.protos.stillhouse.v1.run_pb2 import Run, TrackerSpec
from stillhouse.student_trainer.config.proto import read
from stillhouse.student_trainer.config.resources import TRACKERS_FOLDER, TrackerConfig
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.runs.store.database import DatabaseThread
from stillhouse.student_trainer.runs.store.run_state import ENDED, PENDING, STARTING, state_name
from stillhouse.student_trainer.runs.store.store import Store
from stillhouse.student_trainer.runs.supervision.journal_tail import ChangeNotifier
from stillhouse.student_trainer.runs.trackers.access import TrackerAccess

PROCESSES = 64
"""Tracker processes at a time."""
RETRIES_S = (2.0, 10.0, 60.0, 300.0, 1800.0)
"""Pauses after a process that failed; the last one repeats."""
GIVEN_UP_S = 24 * 3600.0
"""After a run's end."""
STOP_S = 8.0
"""Time that a process has to end after a signal: it may send what waits."""
STORE_RETRY_S = 5.0
PAUSE_S = 1.0
"""Between two looks at a run that changes all the time."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Key:
    """One tracker of one run."""

    run_id: str
    kind: str

    @property
    def file_name(self) -> str:
        """Name of the file that is there until the tracker has all of the run."""
        return f"{self.run_id}.{self.kind}"


class Trackers:
    """The trackers of a service's runs. An empty file for each, below `folder`, stays until it is done, so that a restart goes on."""

    def __init__(
        self,
        store: Store,
        db: DatabaseThread,
        notifier: ChangeNotifier,
        access: TrackerAccess,
        *,
        folder: Path,
        runs: Path,
        page: Callable[[], str] = lambda: "",
    ) -> None:
        """`page` tells the address of the web server; empty if there is none."""
        self._store, self._db, self._notifier, self._access = store, db, notifier, access
        self._folder, self._runs, self._page = folder, runs, page
        self._tasks: dict[_Key, asyncio.Task[None]] = {}
        self._again: set[_Key] = set()
        """Followed ones whose run was resumed meanwhile."""
        self._turns = asyncio.Semaphore(PROCESSES)

    async def start(self) -> None:
        """Goes on with those that are not done, and begins with those of live and queued runs."""
        for key in await self._db(self._undone):
            self._begin(key)
        for run in [*await self._db(self._store.queue), *await self._db(self._store.live)]:
            self.follow(run)

    def follow(self, run: Run) -> None:
        """Begins with a run that was created or resumed, unless it is followed already."""
        for tracker in run.effective_spec.trackers:
            self._begin(_Key(run.name.removeprefix("runs/"), tracker.kind))

    async def forget(self, run_id: str) -> None:
        """Ends those of a run that is deleted."""
        ended = [task for key, task in self._tasks.items() if key.run_id == run_id]
        await _cancel(ended)
        await self._db(_remove, self._folder.glob(f"{run_id}.*"))

    async def close(self) -> None:
        """Ends all processes; what they have not sent is for the next start."""
        await _cancel(self._tasks.values())

    def _undone(self) -> list[_Key]:
        """Trackers with a file; those of deleted runs are removed. Blocks."""
        self._folder.mkdir(exist_ok=True)
        stored, paths = self._store.ids(), list(self._folder.iterdir())
        _remove(each for each in paths if each.name.partition(".")[0] not in stored)
        names = [each.name.partition(".") for each in paths if each.exists()]
        return [_Key(run_id, kind) for run_id, _, kind in names]

    def _begin(self, key: _Key) -> None:
        running = self._tasks.get(key)
        if running is not None and not running.done():
            self._again.add(key)
            return
        task = asyncio.create_task(self._guarded(key), name=f"tracker {key.file_name}")
        self._tasks[key] = task
        task.add_done_callback(partial(self._drop, key))

    def _drop(self, key: _Key, task: asyncio.Task[None]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]
        if key in self._again:
            self._again.discard(key)
            if not task.cancelled():
                self._begin(key)

    async def _guarded(self, key: _Key) -> None:
        while True:
            try:
                await self._db((self._folder / key.file_name).touch)
                await self._follow(key)
                await self._db(_remove, [self._folder / key.file_name])
            except StillhouseError as error:
                if error.reason is Reason.RUN_NOT_FOUND:
                    return
                log.warning("tracker waits", run=key.run_id, tracker=key.kind, why=error.message)
            except OSError as error:
                log.warning("tracker waits", run=key.run_id, tracker=key.kind, why=str(error))
            except Exception:
                log.exception("tracker stopped", run=key.run_id, tracker=key.kind)
                return
            else:
                return
            await asyncio.sleep(STORE_RETRY_S)

    async def _follow(self, key: _Key) -> None:
        """Returns once the tracker has all of an ended run, or is given up."""
        failures = 0
        with self._notifier.subscribe(key.run_id) as news:
            while not self._notifier.closed:
                news.clear()
                run = await self._db(self._store.get, key.run_id)
                if run.state in (PENDING, STARTING):
                    await news.wait()
                    continue
                tracker = _tracker_of(run, key.kind)
                has_begun = RunDir(self._runs / key.run_id).effective_spec_path.exists()
                if tracker is None or not has_begun or self._is_done(key, run):
                    return
                began_s = time.monotonic()
                why = await self._attend(key, tracker, news)
                run = await self._db(self._store.get, key.run_id)
                if not why:
                    continue  # done, or its run was resumed meanwhile
                failures = 1 if time.monotonic() - began_s > RETRIES_S[-1] else failures + 1
                if _has_ended_long_ago(run):
                    log.warning("tracker given up", run=key.run_id, tracker=key.kind)
                    return
                pause_s = RETRIES_S[min(failures, len(RETRIES_S)) - 1]
                log.warning("tracker failed", run=key.run_id, tracker=key.kind, why=why, again_in_s=pause_s)
                await asyncio.sleep(pause_s)

    async def _attend(self, key: _Key, tracker: TrackerConfig, news: asyncio.Event) -> str:
        """Starts the process and tells it the run's state until it ends; why it failed, empty if it did not."""
        async with self._turns:
            try:
                environment = await self._db(self._access.environment_of, tracker)
                await self._tell_state(key)
                return await self._run(key, environment, news)
            except OSError as error:
                return str(error)
            except StillhouseError as error:
                if error.reason is not Reason.INVALID_SPEC:
                    raise
                return error.message

    async def _run(self, key: _Key, environment: Mapping[str, str], news: asyncio.Event) -> str:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "stillhouse.student_trainer.tracking"),
            *(str(self._runs / key.run_id), "--kind", key.kind, "--parent", str(os.getpid())),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,  # libraries may write secrets
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        ended = asyncio.create_task(process.wait())
        try:
            while not ended.done():
                changed = asyncio.create_task(news.wait())
                await asyncio.wait({ended, changed}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                news.clear()
                await self._tell_state(key)
                await asyncio.wait({ended}, timeout=PAUSE_S)
            code = ended.result()
            return f"exit code {code}; the run's log has the reason" if code else ""
        finally:
            await asyncio.shield(end_process(process, grace_s=STOP_S))
            ended.cancel()

    async def _tell_state(self, key: _Key) -> None:
        """Writes the state for the processes, if it is another one than before."""
        run = await self._db(self._store.get, key.run_id)
        page = self._page()
        told = {"state": state_name(run.state), "page": page and f"{page}/{run.name}"}
        await self._db(_write_state, self._runs / key.run_id / TRACKERS_FOLDER / "state.json", told)

    def _is_done(self, key: _Key, run: Run) -> bool:
        """True if the tracker has all of the run, which has ended."""
        if run.state not in ENDED:
            return False
        try:
            place = json.loads((self._runs / key.run_id / TRACKERS_FOLDER / f"{key.kind}.json").read_bytes())
        except (OSError, ValueError):
            return False
        return bool(place.get("ended") == state_name(run.state))


def _tracker_of(run: Run, kind: str) -> TrackerConfig | None:
    found: TrackerSpec | None = next(
        (each for each in run.effective_spec.trackers if each.kind == kind), None
    )
    return None if found is None else read(TrackerConfig, found)


def _has_ended_long_ago(run: Run) -> bool:
    return run.state in ENDED and time.time() - run.end_time.seconds > GIVEN_UP_S


def _write_state(path: Path, told: dict[str, str]) -> None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        if json.loads(path.read_bytes()) == told:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(told).encode())


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    waiting = set(tasks)
    for task in waiting:
        task.cancel()
    if waiting:
        await asyncio.wait(waiting)
