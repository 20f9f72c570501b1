"""Works through batches: looks at the input, runs the process, splits its output; goes on after a restart of the server."""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import structlog

from stillhouse.client.web.openai.batches.batch import PREFIX, Batch
from stillhouse.client.web.openai.batches.folder import SERVER, BatchFolder, is_id
from stillhouse.client.web.openai.batches.input_check import check_input
from stillhouse.client.web.openai.batches.process import ProcessEnd, run_process
from stillhouse.client.web.openai.batches.results import remove_work, split_results
from stillhouse.client.web.openai.batches.stored_files import StoredFiles
from stillhouse.client.web.openai.models import Models, named
from stillhouse.client.web.security.callers import Caller
from stillhouse.client.web.teachers.served import Served
from stillhouse.client.web.upstream import Upstream
from stillhouse.protos.errors import Reason, StillhouseError

AT_ONCE = 4
"""Batches whose processes run."""
MAX_OPEN_OF_ONE = 100
"""Batches of one owner that have not ended."""
MAX_BATCHES_OF_ONE = 10_000
RETRY_S = 20.0
"""Pause after a process that ended for a reason that passes, such as a lost teacher."""
OUTPUT = "output.jsonl"

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Running:
    """A batch that has not ended."""

    batch: Batch
    caller: Caller | None
    """Credentials of its calls; None until its owner comes after a restart."""
    came: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when its owner came."""
    task: asyncio.Task[None] | None = None
    cancelled: bool = False
    finishing: bool = False
    """True once its results are stored, with whatever status."""


class Batches:
    """All batches of a folder. Create it in the running loop."""

    def __init__(self, folder: BatchFolder, files: StoredFiles, upstream: Upstream, models: Models) -> None:
        self._folder, self._files, self._upstream, self._models = folder, files, upstream, models
        self._known: dict[str, Batch] = {}
        self._running: dict[str, _Running] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)

    def start(self) -> None:
        """Goes on with what an earlier server has left; what needs its owner's token waits for him."""
        for path in self._folder.batches.iterdir():
            try:
                batch = Batch.load(path)
            except (OSError, ValueError, TypeError) as error:
                log.warning("batch left out", path=str(path), why=str(error))
                continue
            if batch.id != path.name or not is_id(batch.id, PREFIX):
                continue
            self._known[batch.id] = batch
            if batch.has_ended:
                remove_work(path / OUTPUT)
            else:
                self._begin(batch, self._own_caller(batch.owner))

    async def close(self) -> None:
        """Ends all processes; what they have done is kept for the next server."""
        tasks = [each.task for each in self._running.values() if each.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def came(self, caller: Caller) -> None:
        """Notes that an owner is here, with whose token its batches go on."""
        owner = self._folder.owner_of(caller)
        for running in self._running.values():
            if running.batch.owner == owner and running.caller is None:
                running.caller = caller
                running.came.set()

    def of(self, owner: str) -> list[Batch]:
        """The owner's batches, the newest first."""
        own = [each for each in self._known.values() if each.owner == owner]
        return sorted(own, key=lambda each: (each.created_at, each.id), reverse=True)

    def get(self, owner: str, batch_id: str) -> Batch:
        """The owner's batch of this id. Raises StillhouseError(NOT_FOUND)."""
        found = self._known.get(batch_id)
        if found is None or found.owner != owner:
            raise StillhouseError(
                Reason.NOT_FOUND, f"there is no batch {batch_id[:80]!r}; GET /v1/batches lists them."
            )
        return found

    def uses(self, file_id: str) -> bool:
        """True if a batch that has not ended reads the file."""
        return any(each.batch.input_file_id == file_id for each in self._running.values())

    async def create(self, batch: Batch, caller: Caller) -> None:
        """Begins with a new batch. Raises StillhouseError(QUOTA), OSError."""
        own = self.of(batch.owner)
        if sum(not each.has_ended for each in own) >= MAX_OPEN_OF_ONE:
            raise StillhouseError(
                Reason.QUOTA,
                f"{MAX_OPEN_OF_ONE} of your batches have not ended, which is the limit; wait for some.",
            )
        path = self._path(batch)
        await asyncio.to_thread(path.mkdir, mode=0o700)
        await asyncio.to_thread(batch.save, path)
        self._known[batch.id] = batch
        for old in own[MAX_BATCHES_OF_ONE - 1 :]:
            if old.has_ended:
                del self._known[old.id]
                await asyncio.to_thread(shutil.rmtree, self._path(old), ignore_errors=True)
        self._begin(batch, caller)

    async def cancel(self, batch: Batch) -> None:
        """Ends a batch with what is done. Raises StillhouseError(REQUEST_CONFLICT) if it has ended."""
        running = self._running.get(batch.id)
        if running is None or batch.has_ended:
            raise StillhouseError(
                Reason.REQUEST_CONFLICT, f"The batch is {batch.status}; only one that runs is cancelled."
            )
        if running.cancelled or running.finishing:
            return
        running.cancelled = True
        batch.enter("cancelling")
        await self._save(batch)
        if running.task is not None:
            running.task.cancel()

    def _begin(self, batch: Batch, caller: Caller | None) -> None:
        running = _Running(batch, caller, cancelled=batch.status == "cancelling")
        self._running[batch.id] = running
        running.task = asyncio.create_task(self._guarded(running), name=batch.id)
        running.task.add_done_callback(partial(self._ended, running))

    def _ended(self, running: _Running, _: object) -> None:
        """Ends a batch that is cancelled, also before it had begun."""
        if running.cancelled and not running.batch.has_ended:
            running.task = asyncio.create_task(self._finish(running, "cancelled"), name=running.batch.id)
            running.task.add_done_callback(lambda _task: self._running.pop(running.batch.id, None))
        else:
            self._running.pop(running.batch.id, None)

    async def _guarded(self, running: _Running) -> None:
        batch = running.batch
        if running.cancelled:
            return
        try:
            await self._work(running)
        except StillhouseError as error:
            batch.add_error(str(error.reason), error.message)
            await self._finish(running, "failed")
        except Exception as error:
            log.exception("batch failed", batch=batch.id)
            batch.add_error("INTERNAL", f"The web server could not go on: {type(error).__name__}.")
            await self._finish(running, "failed")

    async def _work(self, running: _Running) -> None:
        batch = running.batch
        status = "completed"
        try:
            async with asyncio.timeout(max(0.0, batch.expires_at - time.time())):
                if batch.status == "validating" and not await self._validate(running):
                    status = "failed"
                while batch.status == "in_progress" and status == "completed":
                    status = await self._try(running)
        except TimeoutError:
            batch.add_error("batch_expired", "The batch was not done in its completion window.")
            status = "expired"
        await self._finish(running, status)

    async def _validate(self, running: _Running) -> bool:
        """Looks at the input; False, and errors, if it cannot be worked on."""
        batch = running.batch
        file = self._files.get(batch.owner, batch.input_file_id)
        check = await asyncio.to_thread(check_input, self._files.path_of(file), batch.endpoint)
        batch.total, batch.model = check.rows, check.model
        for problem in check.problems:
            batch.add_error(**problem)
        if batch.errors:
            return False
        try:
            await self._model(running)  # refuses one that nobody serves
        except StillhouseError as error:
            if not error.retryable:
                raise
        batch.enter("in_progress")
        await self._save(batch)
        return True

    async def _try(self, running: _Running) -> str:
        """Runs the process once, and pauses if it is to be run again; the status to end with, if it ends."""
        batch = running.batch
        try:
            served = await self._model(running)
        except StillhouseError as error:
            if not error.retryable:
                raise
            await asyncio.sleep(RETRY_S)
            return "completed"
        end = await self._run(running, served)
        if end.done:
            batch.enter("finalizing")
            await self._save(batch)
        elif end.retryable:
            log.warning("batch waits", batch=batch.id, why=end.message, again_in_s=RETRY_S)
            await asyncio.sleep(RETRY_S)
        else:
            batch.add_error(end.code, end.message)
            return "failed"
        return "completed"

    async def _run(self, running: _Running, served: Served) -> ProcessEnd:
        batch = running.batch
        async with self._turns:
            assert running.caller is not None

            def progress(rows: int, failed: int) -> None:
                batch.completed, batch.failed = rows - failed, failed

            security = self._upstream.settings.security() | {"token": running.caller.token}
            return await run_process(
                {
                    "target": served.service.target,
                    "security": {
                        name: str(each) if isinstance(each, Path) else each for name, each in security.items()
                    },
                    "source": str(self._files.path_of(self._files.get(batch.owner, batch.input_file_id))),
                    "out": str(self._path(batch) / OUTPUT),
                },
                progress,
            )

    async def _model(self, running: _Running) -> Served:
        """The teacher of the batch's model, as its owner sees it. Waits for the owner after a restart."""
        if running.caller is None:
            await running.came.wait()
        assert running.caller is not None
        return named(await self._models.all(running.caller), running.batch.model)

    async def _finish(self, running: _Running, status: str) -> None:
        """Gives the results their files, and the batch its last status."""
        batch, path = running.batch, self._path(running.batch)
        running.finishing = True
        try:
            results = await asyncio.to_thread(split_results, path / OUTPUT, path)
            batch.completed, batch.failed = results.completed, results.failed
            for kind, content in (("output", results.output), ("error", results.errors)):
                if content is not None:
                    name = f"{batch.id}_{kind}.jsonl"
                    self._files.discard(batch.owner, name)  # of a server that was killed here
                    added = await asyncio.to_thread(
                        partial(self._files.add, batch.owner, content, filename=name, purpose="batch_output")
                    )
                    setattr(batch, f"{kind}_file_id", added.id)
        except (OSError, StillhouseError) as error:
            log.warning("results of a batch not stored", batch=batch.id, why=str(error))
            batch.add_error("results_lost", f"The results could not be stored ({error}).")
            status = "failed"
        batch.enter(status)
        await self._save(batch)
        await asyncio.to_thread(remove_work, path / OUTPUT)
        log.info("batch ended", batch=batch.id, status=status, completed=batch.completed, failed=batch.failed)

    async def _save(self, batch: Batch) -> None:
        try:
            await asyncio.to_thread(batch.save, self._path(batch))
        except OSError as error:
            log.warning("batch not saved", batch=batch.id, why=str(error))

    def _path(self, batch: Batch) -> Path:
        return self._folder.batches / batch.id

    def _own_caller(self, owner: str) -> Caller | None:
        """A caller that needs no token of its owner, if there is one."""
        if owner == "":
            return Caller(token=None)
        if owner == SERVER:
            return Caller(token=self._upstream.settings.token(), is_server=True)
        return None
