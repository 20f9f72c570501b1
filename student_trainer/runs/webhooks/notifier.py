"""Follows runs that have `notify`, and posts their changes of state in order, each at least once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from stillhouse.protos.errors import Reason, StillhouseError, from_status
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.protos.stillhouse.v1.run_pb2 import NotifySpec, Run
from stillhouse.student_trainer.runs.store.database import DatabaseThread
from stillhouse.student_trainer.runs.store.run_state import ENDED, state_name
from stillhouse.student_trainer.runs.store.store import Store
from stillhouse.student_trainer.runs.supervision.journal_tail import ChangeNotifier
from stillhouse.student_trainer.runs.webhooks.delivery import DeliveryError, post
from stillhouse.student_trainer.runs.webhooks.hosts import WebhookHosts

AT_ONCE = 4
"""Posts at a time."""
EVENTS_AT_ONCE = 100
PAUSE_S = 0.5
"""Between two looks at a run that changes all the time."""
RETRIES_S = (1.0, 5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0)
"""Pauses between tries; the last one repeats."""
STORE_RETRY_S = 5.0
GIVEN_UP_S = 24 * 3600.0

log = structlog.get_logger(__name__)


class Webhooks:
    """The webhooks of a service's runs. A file for each, below `folder`, holds how far it is, so that a restart goes on."""

    def __init__(
        self, store: Store, db: DatabaseThread, notifier: ChangeNotifier, hosts: WebhookHosts, folder: Path
    ) -> None:
        self._store, self._db, self._notifier = store, db, notifier
        self._hosts, self._folder = hosts, folder
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def start(self) -> None:
        """Goes on with those that are not at their run's end, and begins with those of runs that have no file yet."""
        for path in await self._db(self._unended):
            self._begin(path)
        for run in [*await self._db(self._store.queue), *await self._db(self._store.live)]:
            self.follow(run)

    def follow(self, run: Run) -> None:
        """Begins with a run that was created or resumed, unless it is followed already."""
        for index in range(len(run.effective_spec.notify)):
            self._begin(self._folder / f"{run.name.removeprefix('runs/')}.{index}.json")

    async def forget(self, run_id: str) -> None:
        """Ends those of a run that is deleted."""
        for stem, task in self._tasks.items():
            if stem.partition(".")[0] == run_id:
                task.cancel()
        await self._db(_remove, self._folder.glob(f"{run_id}.*.json"))

    async def close(self) -> None:
        """Stops; what is not delivered is for the next start."""
        tasks = set(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _unended(self) -> list[Path]:
        """Files that are not at their run's end; those of deleted runs are removed. Blocks."""
        self._folder.mkdir(exist_ok=True)
        stored, paths = self._store.ids(), list(self._folder.glob("*.json"))
        _remove(each for each in paths if each.name.partition(".")[0] not in stored)
        return [each for each in paths if each.exists() and not _read(each)["ended"]]

    def _begin(self, path: Path) -> None:
        running = self._tasks.get(path.stem)
        if running is not None and not running.done():
            return
        task = asyncio.create_task(self._guarded(path), name=f"webhook {path.stem}")
        self._tasks[path.stem] = task
        task.add_done_callback(partial(self._drop, path.stem))

    def _drop(self, stem: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(stem) is task:
            del self._tasks[stem]

    async def _guarded(self, path: Path) -> None:
        run_id, _, index = path.stem.partition(".")
        place = None
        while True:
            try:
                if place is None:
                    place = await self._db(_read, path)
                    await self._save(path, place, ended=False)
                await self._follow(path, place, run_id, int(index))
            except StillhouseError as error:
                if error.reason is Reason.RUN_NOT_FOUND:
                    return
                log.warning("webhook waits", run=run_id, why=error.message, again_in_s=STORE_RETRY_S)
            except Exception:
                log.exception("webhook stopped", run=run_id)
                return
            else:
                return
            await asyncio.sleep(STORE_RETRY_S)

    async def _follow(self, path: Path, place: dict[str, int], run_id: str, index: int) -> None:
        with self._notifier.subscribe(run_id) as news:
            while not self._notifier.closed:
                news.clear()
                run, newest = await self._db(self._store.get_with_sequence, run_id)
                hook = run.effective_spec.notify[index]
                events = await self._db(
                    self._store.events,
                    run_id,
                    after=place["sequence"],
                    limit=EVENTS_AT_ONCE,
                    runs_alone=True,
                )
                for event in events:
                    previous = place["state"]
                    if event.run.state != previous and _is_wanted(hook, event.run):
                        event.run.spec.CopyFrom(run.spec)  # for its labels
                        await self._deliver(hook, event.run, previous, event.sequence)
                    place |= {"sequence": event.sequence, "state": event.run.state}
                    if event.run.state != previous:
                        await self._save(path, place, ended=False)
                if events:
                    continue  # the run may have changed during the deliveries
                place["sequence"] = max(place["sequence"], newest)  # metrics in between need no second look
                if run.state in ENDED:
                    await self._save(path, place, ended=True)
                    if not news.is_set():
                        return
                    await self._save(path, place, ended=False)  # it may have been resumed meanwhile
                    continue
                await news.wait()
                await asyncio.sleep(PAUSE_S)

    async def _save(self, path: Path, place: Mapping[str, int], *, ended: bool) -> None:
        """Writes the file, in the store's thread: what `forget` removes there later does not come back."""
        try:
            await self._db(write_atomic, path, json.dumps({**place, "ended": ended}).encode())
        except OSError as error:  # the posts go on; after a restart some may come twice
            log.warning("webhook's file not written", file=str(path), why=str(error))

    async def _deliver(self, hook: NotifySpec, run: Run, previous: int, sequence: int) -> None:
        """Returns once the receiver has the change, or it is given up."""
        message_id = f"{run.name}/{sequence}"
        body = json.dumps(_document(run, previous, sequence)).encode()
        began_s, tries = time.monotonic(), 0
        while True:
            final = False
            try:
                host = self._hosts.find(hook.url)
                sending = partial(post, hook.url, host, message_id, body, now_s=int(time.time()))
                async with self._turns:
                    await _in_daemon_thread(sending)
            except (DeliveryError, StillhouseError) as error:
                why, final = str(error), getattr(error, "final", False)
            else:
                log.info("webhook delivered", run=run.name, state=state_name(run.state), tries=tries + 1)
                return
            if final or time.monotonic() - began_s > GIVEN_UP_S:
                log.warning("webhook given up", run=run.name, state=state_name(run.state), why=why)
                return
            pause_s = RETRIES_S[min(tries, len(RETRIES_S) - 1)]
            log.warning("webhook not delivered", run=run.name, why=why, again_in_s=pause_s)
            tries += 1
            await asyncio.sleep(pause_s)


def _is_wanted(hook: NotifySpec, run: Run) -> bool:
    return state_name(run.state).lower() in hook.states


def _document(run: Run, previous: int, sequence: int) -> dict[str, Any]:
    """The body: what changed, without the spec."""
    document: dict[str, Any] = {
        "type": "run.state",
        "run": run.name,
        "display_name": run.spec.display_name,
        "labels": dict(run.spec.labels),
        "state": state_name(run.state),
        "previous_state": state_name(Run.State.ValueType(previous)) if previous else None,
        "sequence": sequence,
        "step": run.progress.step,
        "total_steps": run.progress.total_steps,
        "create_time": run.create_time.ToJsonString(),
        "error": None,
    }
    if run.HasField("error"):
        error = from_status(run.error)
        document["error"] = {"reason": str(error.reason), "message": error.message}
    return document


def _read(path: Path) -> dict[str, int]:
    """The place that deliveries have reached; the beginning if the file is missing or damaged."""
    try:
        place = json.loads(path.read_text())
        return {name: int(place[name]) for name in ("sequence", "state", "ended")}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        log.error("webhook begins again", file=str(path), why=str(error))  # noqa: TRY400 - the text says it
    return {"sequence": 0, "state": 0, "ended": False}


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("webhook's file not removed", file=str(path), why=str(error))


async def _in_daemon_thread(call: Callable[[], None]) -> None:
    """Returns or raises as `call` does; the exit of the process does not wait for it."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: Exception | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        error = None
        try:
            call()
        except Exception as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name="webhook", daemon=True).start()
    await done
