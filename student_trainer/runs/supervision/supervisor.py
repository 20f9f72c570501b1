"""Starts queued runs as devices become free, first come, first served, and adopts live ones after a restart."""

from __future__ import annotations

import asyncio
import contextlib
import signal

import structlog

from stillhouse.protos.errors import Reason, StillhouseError, to_status
from stillhouse.protos.files.disk_errors import is_full
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.student_trainer.config.proto import read
from stillhouse.student_trainer.config.resume_changes import with_changeable
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.runs.data_dir import DataDir
from stillhouse.student_trainer.runs.settings import RunServiceSettings
from stillhouse.student_trainer.runs.store import run_state
from stillhouse.student_trainer.runs.store.database import DatabaseThread
from stillhouse.student_trainer.runs.store.run_filter import RunFilter
from stillhouse.student_trainer.runs.store.store import Store
from stillhouse.student_trainer.runs.supervision import training_process
from stillhouse.student_trainer.runs.supervision.attempt_monitor import AttemptMonitor, MonitorContext
from stillhouse.student_trainer.runs.supervision.device_slots import DeviceRequest
from stillhouse.student_trainer.runs.supervision.first_standby import FirstStandby
from stillhouse.student_trainer.runs.supervision.journal_tail import ChangeNotifier
from stillhouse.student_trainer.runs.supervision.run_expectation import RunExpectation
from stillhouse.student_trainer.runs.supervision.standby import Expected, end_leftovers
from stillhouse.student_trainer.runs.supervision.training_process import AdoptedProcess, ChildProcess

RETRY_S = 5.0
"""Retry interval of the queue or a run after a failure."""

log = structlog.get_logger(__name__)


class Supervisor:
    """Owns every live run of the service."""

    def __init__(
        self,
        store: Store,
        db: DatabaseThread,
        notifier: ChangeNotifier,
        first: FirstStandby,
        *,
        data_dir: DataDir,
        settings: RunServiceSettings,
    ) -> None:
        self.slots = first.slots
        self._store = store
        self._db = db
        self._notifier = notifier
        self._data_dir = data_dir
        self._context = MonitorContext(store=store, db=db, notifier=notifier, settings=settings)
        self._monitors: dict[str, AttemptMonitor] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._news = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._launching: asyncio.Task[None] | None = None
        """Start of an attempt, which nothing cancels: its process is made in a thread."""
        self._unmonitored: ChildProcess | None = None
        """Process that has been started and has no monitor yet."""
        self._killed = False
        self._first, self._standby = first, first.standby
        self.expectation = RunExpectation(
            settings.standby, self.slots, credentials=data_dir.credentials_path, on_change=self.wake
        )
        self._unsure = False
        """True if the store may hold attempts that were never started, because its reply was lost."""

    def run_dir(self, run_id: str) -> RunDir:
        """The directory of a run."""
        return RunDir(self._data_dir.runs_path / run_id)

    async def start(self) -> None:
        """Adopts live runs, then starts queued ones until `close`."""
        await asyncio.to_thread(end_leftovers, self._data_dir)
        for run in await self._db(self._store.live):
            await self._adopt(run)
        newest, _ = await self._db(self._store.page, RunFilter(), before=None, limit=1)
        newest_spec = newest[0].effective_spec if newest else None
        began = self.expectation.start(newest_spec, has_core=self._first.has_core())
        self._news.set()
        self._background = {
            # First: the scheduler ends the process that waits unless a run is expected.
            asyncio.create_task(began, name="first expectation"),
            asyncio.create_task(self._schedule(), name="scheduler"),
        }

    def wake(self) -> None:
        """Schedules again after a change of the queue."""
        self._news.set()

    async def stop_run(self, run_id: str) -> Run:
        """Requests a stop and returns the run. Raises StillhouseError(RUN_STATE) if it has completed or failed."""
        run = await self._db(self._store.stop, run_id)
        if run_id in self._monitors:
            self._monitors[run_id].request_stop()
        self._notifier.notify(run_id)
        self.wake()
        return run

    async def close(self, *, stop_runs: bool) -> None:
        """Stops scheduling. Live runs continue for the next service, or are stopped and awaited."""
        for each in self._background:
            each.cancel()
        if self._background:
            await asyncio.wait(self._background)
        self.expectation.close()
        if self._launching is not None and not self._launching.done():
            (launched,), _ = await asyncio.wait({self._launching})
            if launched.exception() is not None:
                log.warning("attempt not started", why=str(launched.exception()))
        await asyncio.to_thread(self._standby.close)
        if stop_runs:
            for run_id in list(self._tasks):
                await self._stop_live(run_id)
        else:
            for task in self._tasks.values():
                task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks.values()))

    def kill(self) -> None:
        """Kills all live processes, so that an impatient shutdown leaves none behind."""
        self._killed = True
        self._standby.close()
        for monitor in self._monitors.values():
            monitor.kill()
        if self._unmonitored is not None:
            self._unmonitored.send(signal.SIGKILL)

    async def _stop_live(self, run_id: str) -> None:
        try:
            await self.stop_run(run_id)
        except StillhouseError as error:
            if error.reason is not Reason.RUN_STATE:
                raise

    async def _schedule(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                if self._unsure:
                    await self._catch_up()
                waiting = await self._start_queued()
                expected = self.expectation.expected(waiting, is_idle=not self._monitors)
                await asyncio.to_thread(self._standby.keep, expected)
                self._unsure = False
                continue
            except StillhouseError as error:
                log.warning("queue not served", why=error.message, retry_after_s=RETRY_S)
            except Exception:
                log.exception("queue not served", retry_after_s=RETRY_S)
            self._unsure = True
            await asyncio.sleep(RETRY_S)
            self._news.set()

    async def _catch_up(self) -> None:
        """Requeues live runs without a monitor, and forwards missed stop requests."""
        for run in await self._db(self._store.live):
            run_id = run.name.removeprefix("runs/")
            if run_id not in self._monitors:
                await self._withdraw(run_id, run.attempts[-1].number)
            elif run.state == run_state.STOPPING:
                self._monitors[run_id].request_stop()

    async def _withdraw(self, run_id: str, attempt: int) -> None:
        log.info("attempt withdrawn", run=run_id, attempt=attempt)
        await self._db(self._store.withdraw_attempt, run_id, attempt)
        self._notifier.notify(run_id)

    async def _start_queued(self) -> Run | None:
        """Starts runs that fit, and returns the first that waits. A run that waits for devices blocks later ones of the same
        kind."""
        blocked: set[bool] = set()
        first = None
        for run in await self._db(self._store.queue):
            need = DeviceRequest.from_spec(run.effective_spec)
            lack = self.slots.why_never(need)
            if lack is not None:
                await self._refuse(run, lack)
                continue
            devices = None if need.on_cpu in blocked else self.slots.reserve(need)
            if devices is None:
                blocked.add(need.on_cpu)
                first = first or run
            else:
                self._launching = asyncio.create_task(self._launch(run, devices), name="launch")
                await asyncio.shield(self._launching)
        return first

    async def _refuse(self, run: Run, lack: str) -> None:
        run_id = run.name.removeprefix("runs/")
        error = StillhouseError(Reason.RUN_STATE, f"Run {run_id} cannot start: {lack}.")
        await self._db(self._store.refuse, run_id, to_status(error))
        self._notifier.notify(run_id)

    async def _launch(self, run: Run, devices: tuple[int, ...]) -> None:
        run_id = run.name.removeprefix("runs/")
        try:
            halve = await self._db(self._store.halved, run_id)
            attempt = await self._db(self._store.begin_attempt, run_id, devices)
        except StillhouseError as error:
            self.slots.release(devices)
            if error.reason not in (Reason.RUN_STATE, Reason.RUN_NOT_FOUND):
                raise
            return  # it was stopped or deleted meanwhile
        self._notifier.notify(run_id)
        run_dir = self.run_dir(run_id)
        try:
            child = await asyncio.to_thread(self._spawn, run, run_dir, attempt, devices, halve=halve)
        except Exception as error:
            log.exception("attempt not started", run=run_id, attempt=attempt)
            self.slots.release(devices)
            await self._fail_to_start(run_id, attempt, error)
            return
        if self._killed:
            return
        log.info("attempt started", run=run_id, attempt=attempt, devices=devices, pid=child.pid)
        monitor = AttemptMonitor(self._context, run_id, run_dir, attempt=attempt, process=child)
        self._monitor(run_id, monitor, devices)
        self._unmonitored = None
        if (await self._db(self._store.get, run_id)).state == run_state.STOPPING:
            monitor.request_stop()

    def _spawn(
        self, run: Run, run_dir: RunDir, attempt: int, devices: tuple[int, ...], *, halve: bool
    ) -> ChildProcess:
        """Fences off earlier attempts, then starts the process; one that `kill` has missed is killed."""
        if not run_dir.effective_spec_path.exists():
            RunDir.create(run_dir.path, run.spec, run.effective_spec)
        effective = run.effective_spec
        with contextlib.suppress(StillhouseError):  # a damaged file is replaced
            effective = with_changeable(run_dir.effective_spec(), effective)
        run_dir.write_effective_spec(effective)
        run_dir.write_control(attempt, stop=False)
        training_process.end_leftover(run_dir)
        config = read(RunConfig, run.effective_spec)
        environ = self.expectation.environ(config, devices, halve=halve)
        if (
            config.resources.processes > 1
        ):  # they share the threads, which are set when libraries are imported
            child = training_process.start(run_dir, attempt, environ)
        else:
            self.expectation.started(Expected(environ=environ, adapter=config.student.trains_adapter))
            # A retry gets a process of its own: the one before it may have failed because it had waited.
            again = run.condition == Run.CONDITION_RETRYING
            waiting = None if again else self._standby.take(run_dir, attempt, environ)
            child = waiting or training_process.start(run_dir, attempt, environ)
        self._unmonitored = child
        if self._killed:
            child.end()
        return child

    async def _fail_to_start(self, run_id: str, attempt: int, cause: Exception) -> None:
        error = StillhouseError(
            Reason.DISK_FULL if is_full(cause) else Reason.PROCESS_DIED,
            f"The training process of run {run_id} could not be started: {cause}. Fix that, then resume the run.",
        )
        await self._db(
            self._store.end_attempt,
            run_id,
            attempt,
            run_state.FAILED,
            exit_code=0,
            signal=0,
            error=to_status(error),
        )
        self._notifier.notify(run_id)

    async def _adopt(self, run: Run) -> None:
        """Adopts a run of an earlier service, whether its process lives or not."""
        run_id = run.name.removeprefix("runs/")
        run_dir, attempt = self.run_dir(run_id), run.attempts[-1].number
        devices = await self._db(self._store.devices, run_id, attempt)
        record = await asyncio.to_thread(training_process.find_running, self._data_dir.path, run_dir, attempt)
        if record is None and not training_process.has_started(run_dir, attempt):
            # The service was killed after the store's commit and before the process's start.
            await self._withdraw(run_id, attempt)
            return
        log.info("run adopted", run=run_id, attempt=attempt, pid=record.pid if record else None)
        self.slots.mark_reserved(devices)
        idle, adopting = Run.CONDITION_UNSPECIFIED, Run.CONDITION_ADOPTING
        await self._db(self._store.set_condition, run_id, adopting, instead_of=idle)
        monitor = AttemptMonitor(
            self._context, run_id, run_dir, attempt=attempt, process=AdoptedProcess(record)
        )
        self._monitor(run_id, monitor, devices)
        if run.state == run_state.STOPPING:
            monitor.request_stop()

    def _monitor(self, run_id: str, monitor: AttemptMonitor, devices: tuple[int, ...]) -> None:
        self._monitors[run_id] = monitor
        self._tasks[run_id] = asyncio.create_task(
            self._run_monitor(run_id, monitor, devices), name=f"run {run_id}"
        )

    async def _run_monitor(self, run_id: str, monitor: AttemptMonitor, devices: tuple[int, ...]) -> None:
        try:
            await self._watch(run_id, monitor)
        finally:
            self.slots.release(devices)
            # A resumed run may have its next monitor already.
            if self._monitors.get(run_id) is monitor:
                del self._monitors[run_id], self._tasks[run_id]
            self.expectation.sign()

    async def _watch(self, run_id: str, monitor: AttemptMonitor) -> None:
        """Returns once the run's end is in the store; failures are retried."""
        while True:
            try:
                await monitor.watch()
                break
            except StillhouseError as error:
                log.warning("run not monitored", run=run_id, why=error.message, retry_after_s=RETRY_S)
            except Exception:
                log.exception("run not monitored", run=run_id, retry_after_s=RETRY_S)
            await asyncio.sleep(RETRY_S)
