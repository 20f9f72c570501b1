"""Monitors one attempt until its process exits: ingests journals, stops on request, classifies the exit."""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.student_trainer.config.proto import from_proto
from stillhouse.student_trainer.config.schema import CLASSIFICATION_CACHE
from stillhouse.student_trainer.config.settled.micro_batch import smaller_micro_batch
from stillhouse.student_trainer.disk_errors import full_sentence
from stillhouse.student_trainer.run_dir import EXIT_DISK_FULL, RunDir
from stillhouse.student_trainer.runs.settings import RunServiceSettings
from stillhouse.student_trainer.runs.store.database import DatabaseThread
from stillhouse.student_trainer.runs.store.run_state import PENDING
from stillhouse.student_trainer.runs.store.store import Store
from stillhouse.student_trainer.runs.supervision.exit_classification import (
    AttemptEnd,
    Overflow,
    begins_again,
    classify,
    ran_out_of_memory,
)
from stillhouse.student_trainer.runs.supervision.journal_tail import ChangeNotifier, JournalTail
from stillhouse.student_trainer.runs.supervision.liveness import HeartbeatWatch
from stillhouse.student_trainer.runs.supervision.training_process import (
    AdoptedProcess,
    ChildProcess,
    Exit,
    Process,
    oom_kills,
)

POLL_S = 0.2
"""Poll interval of a run's journals and process."""
TERM_GRACE_S = 10.0
"""Time between SIGTERM and SIGKILL."""
QUIET_S = 60.0
"""Time without a heartbeat after which a run is NOT_RESPONDING, or half of --max-silence-s if that is less."""
STORE_RETRY_S = 5.0
"""Retry interval of a failing store."""
LOG_TAIL_BYTES = 2000
LOG_TAIL_LINES = 6

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorContext:
    """Dependencies and settings shared by the monitors of a service."""

    store: Store
    db: DatabaseThread
    notifier: ChangeNotifier
    settings: RunServiceSettings


class AttemptMonitor:
    """Monitor of one attempt, from the start of its process to its exit."""

    def __init__(
        self, context: MonitorContext, run_id: str, run_dir: RunDir, *, attempt: int, process: Process
    ) -> None:
        self._context = context
        self._run_id = run_id
        self._run_dir = run_dir
        self._attempt = attempt
        self._process = process
        self._tail = JournalTail(context.store, run_id, run_dir, attempt)
        self._oom_kills = oom_kills()
        self._asked_at_s: float | None = None
        self._adopting = isinstance(process, AdoptedProcess)
        self._waited = isinstance(process, ChildProcess) and process.waited
        self._heartbeat = HeartbeatWatch(run_dir.heartbeat_path)
        self._quiet = self._adopting
        """True if the store may hold NOT_RESPONDING for the run."""
        self._silenced = False
        self._terminated = False
        self._killed = False
        self._overflowed: Overflow | None = None

    def request_stop(self) -> None:
        """Asks the process to save a checkpoint and exit; signals it after the grace."""
        if self._asked_at_s is None:
            self._asked_at_s = time.monotonic()
            self._run_dir.write_control(self._attempt, stop=True)

    def kill(self) -> None:
        """Kills the process."""
        self._process.send(signal.SIGKILL)

    async def watch(self) -> Run:
        """Returns the run once its process has ended. If cancelled, the process continues, for the next service to adopt."""
        while True:
            # Polled before reading, so that all that the process wrote is read.
            ended = await asyncio.to_thread(self._process.poll)
            await self._ingest()
            await self._settle_adoption()
            if ended is not None:
                return await self._finish(ended)
            self._enforce_stop()
            self._bound_volume()
            await self._check_heartbeat()
            await asyncio.sleep(POLL_S)

    async def _settle_adoption(self) -> None:
        """Clears ADOPTING once the journals are in the store."""
        if self._adopting:
            store, adopting = self._context.store, Run.CONDITION_ADOPTING
            await self._context.db(
                store.set_condition, self._run_id, Run.CONDITION_UNSPECIFIED, instead_of=adopting
            )
            self._adopting = False
            self._context.notifier.notify(self._run_id)

    async def _ingest(self) -> None:
        """Ingests the journals; a full disk or an unreachable database delays that and loses nothing."""
        while True:
            try:
                while await self._context.db(self._tail.ingest):
                    self._context.notifier.notify(self._run_id)
                break
            except StillhouseError as error:
                if error.reason not in (Reason.DISK_FULL, Reason.DATABASE_UNREACHABLE):
                    raise
                log.warning(
                    "journals not read", run=self._run_id, why=error.message, retry_after_s=STORE_RETRY_S
                )
                await asyncio.sleep(STORE_RETRY_S)

    def _enforce_stop(self) -> None:
        """Signals a process that takes too long to exit."""
        if self._asked_at_s is None:
            return
        waited_s = time.monotonic() - self._asked_at_s
        if waited_s > self._context.settings.stop_grace_s and not self._terminated:
            log.warning("run does not stop", run=self._run_id, waited_s=round(waited_s, 1), signal="SIGTERM")
            self._terminated = True
            self._process.send(signal.SIGTERM)
        if waited_s > self._context.settings.stop_grace_s + TERM_GRACE_S and not self._killed:
            log.warning("run does not stop", run=self._run_id, waited_s=round(waited_s, 1), signal="SIGKILL")
            self._killed = True
            self._process.send(signal.SIGKILL)

    def _bound_volume(self) -> None:
        """Kills a process whose log or metrics exceed their limit."""
        if self._overflowed is not None:
            return
        journals = self._run_dir.metrics_path, self._run_dir.events_path
        if _size(self._run_dir.log_path(self._attempt)) > self._context.settings.max_log_bytes:
            self._overflowed = "log"
        elif sum(map(_size, journals)) > self._context.settings.max_metric_bytes:
            self._overflowed = "metrics"
        else:
            return
        log.warning("run writes too much", run=self._run_id, what=self._overflowed)
        self._process.send(signal.SIGKILL)

    async def _check_heartbeat(self) -> None:
        """Updates NOT_RESPONDING by the heartbeat; kills a process that is silent for too long."""
        silent_s, limit_s = self._heartbeat.silent_s(), self._context.settings.max_silence_s
        quiet = silent_s > (min(QUIET_S, limit_s / 2) if limit_s else QUIET_S)
        if quiet != self._quiet:
            idle, quiet_one = Run.CONDITION_UNSPECIFIED, Run.CONDITION_NOT_RESPONDING
            now, before = (quiet_one, idle) if quiet else (idle, quiet_one)
            await self._context.db(self._context.store.set_condition, self._run_id, now, instead_of=before)
            self._quiet = quiet
            self._context.notifier.notify(self._run_id)
            if quiet:
                log.warning("run does not respond", run=self._run_id, silent_s=round(silent_s, 1))
        if limit_s and silent_s > limit_s and not self._silenced:
            log.warning(
                "run does not respond", run=self._run_id, silent_s=round(silent_s, 1), signal="SIGKILL"
            )
            self._silenced = True
            self._process.send(signal.SIGKILL)

    async def _finish(self, ended: Exit) -> Run:
        store, db = self._context.store, self._context.db
        outcome, error = await db(store.outcome, self._run_id, self._attempt)
        run = await db(store.get, self._run_id)
        used = await db(store.attempts_since_request, self._run_id)
        may_halve = run.effective_spec.retry.halve_micro_batch and not await db(store.halved, self._run_id)
        may_halve = may_halve and smaller_micro_batch(from_proto(run.effective_spec)) is not None
        ending = AttemptEnd(
            state=run.state,
            exit=ended,
            outcome=outcome,
            error=error,
            killed_for_stop=self._terminated,
            killed_for_silence=self._silenced,
            killed_for_memory=oom_kills() > self._oom_kills,
            log_tail=log_tail(self._run_dir, self._attempt),
            may_retry=used < run.effective_spec.retry.max_attempts,
            overflowed=self._overflowed,
            may_halve=may_halve,
            resumes_from=_resumes_from(run),
            full_disk=full_sentence(self._run_dir.path) if ended.code == EXIT_DISK_FULL else "",
            only_waited=self._waited and not run.attempts[-1].first_step,
        )
        following, error = classify(ending)
        halve = may_halve and following == PENDING and ran_out_of_memory(error) and not begins_again(ending)
        run = await db(
            store.end_attempt,
            self._run_id,
            self._attempt,
            following,
            exit_code=ended.code or 0,
            signal=ended.signal,
            error=error,
            halve=halve,
        )
        log.info(
            "attempt ended",
            run=self._run_id,
            attempt=self._attempt,
            state=Run.State.Name(run.state),
            exit_code=ended.code,
            reason=error.message if error is not None else None,
        )
        self._context.notifier.notify(self._run_id)
        return run


def _resumes_from(run: Run) -> str:
    if run.effective_spec.task in ("cache", CLASSIFICATION_CACHE):
        return "what the cache holds"
    return run.latest_checkpoint.removeprefix(f"{run.name}/")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def log_tail(run_dir: RunDir, attempt: int) -> str:
    """Last lines of an attempt's log, printable, joined to one line."""
    try:
        with run_dir.log_path(attempt).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()][-LOG_TAIL_LINES:]
    return "".join(each if each.isprintable() else "?" for each in " | ".join(lines))
