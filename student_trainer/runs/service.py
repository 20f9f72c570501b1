"""Puts the run service together: data directory, store, supervisor, servicer and server, and ends them in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import structlog

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.protos.rpc.audit import AuditLog
from stillhouse.protos.rpc.auth import TokenFile
from stillhouse.protos.rpc.channel import is_loopback
from stillhouse.protos.rpc.server import Server
from stillhouse.protos.stillhouse.v1.run_pb2 import DESCRIPTOR
from stillhouse.protos.stillhouse.v1.run_pb2_grpc import add_RunServiceServicer_to_server
from stillhouse.protos.telemetry.gpu_memory import GpuMemory
from stillhouse.protos.telemetry.metrics import Metrics
from stillhouse.student_trainer.config.settled.matmul_dtype import Processor
from stillhouse.student_trainer.runs.api import dataset_uploads
from stillhouse.student_trainer.runs.api.servicer import RunServicer, ServiceParts, remove_deleted
from stillhouse.student_trainer.runs.api.spec_resolution import Host
from stillhouse.student_trainer.runs.data_dir import DataDir
from stillhouse.student_trainer.runs.metrics import RunMetrics
from stillhouse.student_trainer.runs.settings import RunServiceSettings
from stillhouse.student_trainer.runs.store.database import DatabaseThread
from stillhouse.student_trainer.runs.store.store import Store
from stillhouse.student_trainer.runs.supervision.attempt_monitor import TERM_GRACE_S
from stillhouse.student_trainer.runs.supervision.first_standby import FirstStandby
from stillhouse.student_trainer.runs.supervision.journal_tail import ChangeNotifier
from stillhouse.student_trainer.runs.supervision.retention import keep_cleaning, keep_sweeping
from stillhouse.student_trainer.runs.supervision.supervisor import Supervisor
from stillhouse.student_trainer.runs.trackers.access import TrackerAccess
from stillhouse.student_trainer.runs.trackers.follower import Trackers
from stillhouse.student_trainer.runs.web_process import WebProcess, page_address
from stillhouse.student_trainer.runs.webhooks.hosts import WebhookHosts
from stillhouse.student_trainer.runs.webhooks.notifier import Webhooks

SERVICE_NAME = DESCRIPTOR.services_by_name["RunService"].full_name

log = structlog.get_logger(__name__)


async def serve(
    settings: RunServiceSettings,
    data_dir: DataDir,
    first: FirstStandby,
    signals: asyncio.Queue[signal.Signals] | None,
) -> None:
    """Run the service until a signal, which may be among `signals` already.

    Raises:
        StillhouseError: INVALID_CONFIG for settings that cannot work.
    """
    db, metrics = DatabaseThread(), Metrics()
    try:
        tokens = settings.tokens or data_dir.tokens_path
        server = Server(
            listen=settings.listen,
            tls=settings.tls,
            insecure=settings.insecure,
            reflection=settings.reflection,
            services=[SERVICE_NAME],
            max_calls=settings.max_calls,
            tokens=TokenFile(tokens, optional=settings.tokens is None),
            observers=[metrics, AuditLog(settings.audit_log or data_dir.audit_path)],
            signals=signals,
        )
        metrics.watch_calls(lambda: server.running)
        store = await db(Store.open, settings.database or data_dir.database_path)
        await db(dataset_uploads.remove_leftovers, data_dir.datasets_path, has_row=store.datasets.has_file)
        await db(remove_deleted, data_dir.runs_path)
        try:
            await _serve(settings, server, data_dir, store, db, metrics=metrics, first=first)
        finally:
            await db(store.close)
    finally:
        metrics.close()
        db.close()


async def _serve(
    settings: RunServiceSettings,
    server: Server,
    data_dir: DataDir,
    store: Store,
    db: DatabaseThread,
    *,
    metrics: Metrics,
    first: FirstStandby,
) -> None:
    notifier, slots = ChangeNotifier(), first.slots
    hosts = WebhookHosts(settings.webhooks)
    webhooks = Webhooks(store, db, notifier, hosts, data_dir.path / "webhooks")
    access = TrackerAccess(data_dir.credentials_path)
    trackers = Trackers(
        store,
        db,
        notifier,
        access,
        folder=data_dir.path / "trackers",
        runs=data_dir.runs_path,
        page=partial(page_address, data_dir),
    )
    supervisor = Supervisor(store, db, notifier, first, data_dir=data_dir, settings=settings)
    host = Host(
        data_dir=data_dir.path,
        roots=_roots(settings),
        slots=slots,
        find_dataset=store.datasets.find,
        find_webhook_host=hosts.find,
        tracker_problem=access.problem_of,
        processor=Processor.read(),
    )
    servicer = RunServicer(
        ServiceParts(
            store=store,
            db=db,
            notifier=notifier,
            supervisor=supervisor,
            webhooks=webhooks,
            trackers=trackers,
            host=host,
            max_upload_bytes=settings.max_upload_bytes,
            max_queued_runs=settings.max_queued_runs,
        )
    )
    add_RunServiceServicer_to_server(servicer, server.aio)
    metrics.add(RunMetrics(store, db, slots))
    metrics.add(GpuMemory(slots.gpus))
    address = await server.start()
    try:
        page = metrics.listen(address, host=settings.metrics_host, port=_metrics_port(settings))
    except StillhouseError:
        await server.stop(0)
        raise
    await webhooks.start()  # before a run can end
    await trackers.start()
    await supervisor.start()
    web = WebProcess(settings, data_dir, address)
    await _start_web(web, supervisor, server)
    cleaning = keep_cleaning(
        data_dir.prepared, max_bytes=settings.max_prepared_bytes, keep_days=settings.keep_prepared_days
    )
    sweepers = {asyncio.create_task(cleaning, name="prepared data")}
    if settings.keep_ended_days is not None:
        sweeping = keep_sweeping(store, db, settings.keep_ended_days, servicer.delete)
        sweepers.add(asyncio.create_task(sweeping, name="retention"))
    server.set_serving(True)
    if settings.address_file is not None:
        write_atomic(settings.address_file, address.encode(), private=True)
    log.info(
        "run service ready", address=address, data_dir=str(data_dir.path), gpus=list(slots.gpus), metrics=page
    )

    async def drain() -> None:
        await web.stop()  # it holds streams
        for each in sweepers:
            each.cancel()
        await asyncio.wait(sweepers)
        await supervisor.close(stop_runs=settings.stop_runs_on_exit)
        await servicer.close()
        notifier.close()

    patience_s = settings.stop_grace_s + 2 * TERM_GRACE_S if settings.stop_runs_on_exit else 0.0
    try:
        await server.run_until_signal(drain, settings.shutdown_grace_s + patience_s)
    finally:
        await web.stop()  # if draining was cut short
        metrics.close()  # before the store that it reads
        if settings.stop_runs_on_exit:
            supervisor.kill()


async def _start_web(web: WebProcess, supervisor: Supervisor, server: Server) -> None:
    try:
        await web.start()
    except StillhouseError:
        await supervisor.close(stop_runs=False)
        await server.stop(0)
        raise


def _metrics_port(settings: RunServiceSettings) -> int | None:
    """The flag's; none by default for a service on any free port, whose neighbours are not known to be free."""
    any_port = settings.metrics_port is None and settings.listen.endswith(":0")
    return 0 if any_port else settings.metrics_port


def _roots(settings: RunServiceSettings) -> Sequence[Path]:
    if settings.allow_roots:
        return settings.allow_roots
    return (Path("/"),) if is_loopback(settings.listen) else ()
