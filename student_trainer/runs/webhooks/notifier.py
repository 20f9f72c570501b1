"""Follows runs that have `notify`, and posts their changes of state in order, each at least once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
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
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="webhooks")

    def start(self) -> None:
        """Goes on with those that are not at their run's end."""
        self._folder.mkdir(exist_ok=True)
        for path in self._folder.glob("*.json"):
            try:
                ended = json.loads(path.read_text())["ended"]
            except (ValueError, TypeError, KeyError) as error:
                log.error("webhook left out", file=str(path), why=str(error))  # noqa: TRY400 - the text says it
            else:
                if not ended:
                    self._begin(path)

    def follow(self, run: Run) -> None:
        """Begins with a run that was created or resumed."""
        for index in range(len(run.effective_spec.notify)):
            path = self._folder / f"{run.name.removeprefix('runs/')}.{index}.json"
            if path.stem not in self._tasks:
                _write(path, {**(_read(path) or {"sequence": 0, "state": 0}), "ended": False})
                self._begin(path)

    def forget(self, run_id: str) -> None:
        """Ends those of a run that is deleted."""
        for path in self._folder.glob(f"{run_id}.*.json"):
            path.unlink(missing_ok=True)
            if path.stem in self._tasks:
                self._tasks[path.stem].cancel()

    async def close(self) -> None:
        """Stops; what is not delivered is for the next start."""
        tasks = set(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, path: Path) -> None:
        task = asyncio.create_task(self._guarded(path), name=f"webhook {path.stem}")
        self._tasks[path.stem] = task
        task.add_done_callback(lambda _: self._tasks.pop(path.stem, None))

    async def _guarded(self, path: Path) -> None:
        run_id, _, index = path.stem.partition(".")
        while True:
            try:
                await self._follow(path, run_id, int(index))
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

    async def _follow(self, path: Path, run_id: str, index: int) -> None:
        place = _read(path) or {"sequence": 0, "state": 0}
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
                    previous, place["state"] = place["state"], event.run.state
                    if event.run.state != previous and _is_wanted(hook, event.run):
                        event.run.spec.CopyFrom(run.spec)  # for its labels
                        await self._deliver(hook, event.run, previous, event.sequence)
                    place["sequence"] = event.sequence
                    if event.run.state != previous:
                        _write(path, {**place, "ended": False})
                if len(events) == EVENTS_AT_ONCE:
                    continue
                place["sequence"] = max(place["sequence"], newest)  # metrics in between need no second look
                if run.state in ENDED:
                    _write(path, {**place, "ended": True})
                    return
                await news.wait()
                await asyncio.sleep(PAUSE_S)

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
                await asyncio.get_running_loop().run_in_executor(self._threads, sending)
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


def _read(path: Path) -> dict[str, int] | None:
    try:
        place: Mapping[str, int] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return {"sequence": place["sequence"], "state": place["state"]}


def _write(path: Path, place: Mapping[str, int]) -> None:
    write_atomic(path, json.dumps(place).encode())
