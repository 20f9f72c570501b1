"""Puts the run service together: data directory, store, supervisor, servicer and server, and ends them in order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.protos.rpc.audit import AuditLog
from stillhouse.protos.rpc.auth import TokenFile
from stillhouse.protos.rpc.channel import is_loopback
from stillhouse.protos.rpc.server import Server
from stillhouse.protos.rpc.tls import ServerTls
from stillhouse.protos.stillhouse.v1.run_pb2 import DESCRIPTOR
from stillhouse.protos.stillhouse.v1.run_pb2_grpc import add_RunServiceServicer_to_server
from stillhouse.protos.telemetry.gpu_memory import GpuMemory
from stillhouse.protos.telemetry.gpus import visible_gpus
from stillhouse.protos.telemetry.metrics import LOOPBACK, Metrics
from stillhouse.student_trainer.config.matmul_dtype import Processor
from stillhouse.student_trainer.runs.api import dataset_uploads
from stillhouse.student_trainer.runs.api.servicer import RunServicer, ServiceParts, remove_deleted
from stillhouse.student_trainer.runs.api.spec_resolution import Host
from stillhouse.student_trainer.runs.data_dir import DataDir
from stillhouse.student_trainer.runs.metrics import Figures
from stillhouse.student_trainer.runs.store.database import DatabaseThread
from stillhouse.student_trainer.runs.store.store import Store
from stillhouse.student_trainer.runs.supervision.attempt_monitor import TERM_GRACE_S
from stillhouse.student_trainer.runs.supervision.device_slots import Slots
from stillhouse.student_trainer.runs.supervision.journal_tail import Bell
from stillhouse.student_trainer.runs.supervision.retention import keep_sweeping
from stillhouse.student_trainer.runs.supervision.supervisor import Supervisor, SupervisorOptions

SERVICE_NAME = DESCRIPTOR.services_by_name["RunService"].full_name

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceOptions:
    """Settings of `stillhouse-trainer`, one for each flag."""

    data_dir: Path
    database: str | None = None
    """URL of a PostgreSQL database; None: stillhouse.db in the data directory."""
    listen: str = "127.0.0.1:7402"
    address_file: Path | None = None
    gpus: Sequence[int] | None = None
    """None: those that are visible."""
    cpu_slots: int = 1
    allow_roots: Sequence[Path] = ()
    """Empty: everything on loopback, else nothing but the data directory."""
    stop_grace_s: float = 300.0
    stop_runs_on_exit: bool = False
    shutdown_grace_s: float = 30.0
    max_upload_bytes: int = 64 * 2**30
    max_calls: int = 256
    """At once, of which one client gets three quarters."""
    max_log_bytes: int = 2**30
    """Of one attempt of a run."""
    max_metric_bytes: int = 2**30
    """Of a run's metrics and events."""
    max_silence_s: float = 900.0
    """Of a training process, after which it is killed; 0: never."""
    max_queued_runs: int = 1000
    """Of one client."""
    keep_ended_days: float | None = None
    """Age at which ended runs and their files are removed; None: never."""
    tokens: Path | None = None
    """None: tokens.json in the data directory, which demands tokens once it is there."""
    audit_log: Path | None = None
    """None: audit.jsonl in the data directory."""
    metrics_host: str = LOOPBACK
    metrics_port: int | None = None
    """None: 100 above the port of `listen`. 0: no metrics."""
    tls: ServerTls | None = None
    insecure: bool = False
    reflection: bool | None = None


async def serve(options: ServiceOptions) -> None:
    """Run the service until a signal.

    Raises:
        StillhouseError: INVALID_CONFIG for settings that cannot work.
    """
    data_dir = DataDir.open(options.data_dir)
    db, metrics = DatabaseThread(), Metrics()
    try:
        tokens = options.tokens or data_dir.tokens_path
        server = Server(
            listen=options.listen,
            tls=options.tls,
            insecure=options.insecure,
            reflection=options.reflection,
            services=[SERVICE_NAME],
            max_calls=options.max_calls,
            tokens=TokenFile(tokens, optional=options.tokens is None),
            observers=[metrics, AuditLog(options.audit_log or data_dir.audit_path)],
        )
        metrics.watch_calls(lambda: server.running)
        store = await db(Store.open, options.database or data_dir.database_path)
        await db(dataset_uploads.remove_leftovers, data_dir.datasets_path)
        await db(remove_deleted, data_dir.runs_path)
        try:
            await _serve(options, server, data_dir, store, db, metrics=metrics)
        finally:
            await db(store.close)
    finally:
        metrics.close()
        db.close()
        data_dir.close()


async def _serve(
    options: ServiceOptions,
    server: Server,
    data_dir: DataDir,
    store: Store,
    db: DatabaseThread,
    *,
    metrics: Metrics,
) -> None:
    bell = Bell()
    gpus = visible_gpus() if options.gpus is None else options.gpus
    slots = Slots(gpus=gpus, cpu_slots=options.cpu_slots)
    supervisor_options = SupervisorOptions(
        runs_path=data_dir.runs_path,
        credentials=data_dir.credentials_path,
        stop_grace_s=options.stop_grace_s,
        max_log_bytes=options.max_log_bytes,
        max_metric_bytes=options.max_metric_bytes,
        max_silence_s=options.max_silence_s,
    )
    supervisor = Supervisor(store, db, bell, slots, supervisor_options)
    host = Host(
        data_dir=data_dir.path,
        roots=_roots(options),
        slots=slots,
        dataset_suffix=store.dataset_suffix,
        processor=Processor.read(),
    )
    servicer = RunServicer(
        ServiceParts(
            store=store,
            db=db,
            bell=bell,
            supervisor=supervisor,
            host=host,
            max_upload_bytes=options.max_upload_bytes,
            max_queued_runs=options.max_queued_runs,
        )
    )
    add_RunServiceServicer_to_server(servicer, server.aio)
    metrics.add(Figures(store, db, slots))
    metrics.add(GpuMemory(slots.gpus))
    address = await server.start()
    try:
        page = metrics.listen(address, host=options.metrics_host, port=_metrics_port(options))
    except StillhouseError:
        await server.stop(0)
        raise
    await supervisor.start()
    sweeper: asyncio.Task[None] | None = None
    if options.keep_ended_days is not None:
        sweeping = keep_sweeping(store, db, options.keep_ended_days, servicer.delete)
        sweeper = asyncio.create_task(sweeping, name="retention")
    server.set_serving(True)
    if options.address_file is not None:
        write_atomic(options.address_file, address.encode(), private=True)
    log.info(
        "run service ready", address=address, data_dir=str(data_dir.path), gpus=list(slots.gpus), metrics=page
    )

    async def drain() -> None:
        if sweeper is not None:
            sweeper.cancel()
            await asyncio.wait({sweeper})
        await supervisor.close(stop_runs=options.stop_runs_on_exit)
        bell.close()

    patience_s = options.stop_grace_s + 2 * TERM_GRACE_S if options.stop_runs_on_exit else 0.0
    try:
        await server.run_until_signal(drain, options.shutdown_grace_s + patience_s)
    finally:
        metrics.close()  # before the store that it reads
        if options.stop_runs_on_exit:
            supervisor.kill()


def _metrics_port(options: ServiceOptions) -> int | None:
    """The flag's; none by default for a service on any free port, whose neighbours are not known to be free."""
    any_port = options.metrics_port is None and options.listen.endswith(":0")
    return 0 if any_port else options.metrics_port


def _roots(options: ServiceOptions) -> Sequence[Path]:
    if options.allow_roots:
        return options.allow_roots
    return (Path("/"),) if is_loopback(options.listen) else ()
