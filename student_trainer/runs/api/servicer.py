"""Rpcs of RunService: validates requests and delegates to store and supervisor."""

# ruff: noqa: ARG002 - gRPC hands a context to every rpc

from __future__ import annotations

import asyncio
import base64
import re
import secrets
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import grpc.aio

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.auth import current_caller
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2_grpc import RunServiceServicer
from stillhouse.student_trainer.config import proto
from stillhouse.student_trainer.config.checks import invalid_spec, problems_of
from stillhouse.student_trainer.config.resume_changes import changed_spec, changes_passes
from stillhouse.student_trainer.runs.api.attached_results import attach
from stillhouse.student_trainer.runs.api.datasets import DatasetRpcs
from stillhouse.student_trainer.runs.api.hub_lookup import hub_problems
from stillhouse.student_trainer.runs.api.pages import bounded, page_size, page_token, read_page_token
from stillhouse.student_trainer.runs.api.row_inspection import RowInspection
from stillhouse.student_trainer.runs.api.spec_resolution import (
    RUN_ID,
    Host,
    Resolution,
    resolve,
    resolve_devices,
)
from stillhouse.student_trainer.runs.api.streams import RunStreams
from stillhouse.student_trainer.runs.api.student_config import inspect_student
from stillhouse.student_trainer.runs.store.database import DatabaseThread
from stillhouse.student_trainer.runs.store.metric_series import to_series
from stillhouse.student_trainer.runs.store.run_filter import read_filter
from stillhouse.student_trainer.runs.store.run_state import ENDED
from stillhouse.student_trainer.runs.store.store import Store
from stillhouse.student_trainer.runs.supervision.journal_tail import ChangeNotifier
from stillhouse.student_trainer.runs.supervision.supervisor import Supervisor
from stillhouse.student_trainer.runs.trackers.follower import Trackers
from stillhouse.student_trainer.runs.webhooks.notifier import Webhooks

Context = grpc.aio.ServicerContext[Any, Any]
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
DEFAULT_POINTS, MAX_POINTS = 1000, 20_000
MAX_SPEC_BYTES = 256 * 1024
"""Far above any real spec; bounds the time of validation."""
DELETED = ".deleted-"
"""Prefix of a run directory whose files are being removed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceParts:
    """Dependencies of the servicer."""

    store: Store
    db: DatabaseThread
    notifier: ChangeNotifier
    supervisor: Supervisor
    webhooks: Webhooks
    trackers: Trackers
    host: Host
    max_upload_bytes: int
    max_queued_runs: int
    """Limit per client."""


class RunServicer(RunServiceServicer):
    """Implements RunService."""

    def __init__(self, parts: ServiceParts) -> None:
        self._store = parts.store
        self._db = parts.db
        self._notifier = parts.notifier
        self._supervisor = parts.supervisor
        self._followers = (parts.webhooks, parts.trackers)
        self._host = parts.host
        self._max_queued_runs = parts.max_queued_runs
        self._inspection = RowInspection(parts.host, parts.db)
        self._datasets = DatasetRpcs(
            parts.store.datasets,
            parts.db,
            parts.host.data_dir / "datasets",
            max_bytes=parts.max_upload_bytes,
        )
        self._streams = RunStreams(parts.store, parts.db, parts.notifier, parts.supervisor.run_dir)

    async def CreateRun(self, request: pb.CreateRunRequest, context: Context) -> pb.Run:
        """Validates a spec and queues it."""
        if request.request_id and not UUID.fullmatch(request.request_id):
            raise StillhouseError(
                Reason.INVALID_REQUEST,
                f"request_id {request.request_id[:80]!r} is not a UUID; give one, or omit it.",
            )
        if request.spec.ByteSize() > MAX_SPEC_BYTES:
            raise StillhouseError(
                Reason.INVALID_SPEC,
                f"The spec has {request.spec.ByteSize()} bytes; the limit is {MAX_SPEC_BYTES}. Give rows and models by "
                "path.",
            )
        if request.request_id and not request.validate_only:
            earlier = await self._db(self._store.find_request, request.request_id, request.spec)
            if earlier is not None:
                return earlier  # even if its files are gone by now
        self._supervisor.expectation.sign()
        checked = await self._checked(request.spec)
        effective, datasets = proto.to_proto(checked.config), checked.datasets
        if request.validate_only:
            self._supervisor.expectation.checked(effective)
            return pb.Run(
                spec=request.spec, effective_spec=effective, datasets=[each.name for each in datasets]
            )
        run, created = await self._db(
            self._store.create,
            new_run_id(),
            request.spec,
            effective,
            request_id=request.request_id,
            version=metadata.version("stillhouse"),
            owner=current_caller().name,
            max_queued=self._max_queued_runs,
            datasets=datasets,
        )
        if created:
            self._supervisor.wake()
            self._follow(run)
        return run

    def _follow(self, run: pb.Run) -> None:
        for each in self._followers:
            each.follow(run)

    async def _checked(self, spec: pb.RunSpec) -> Resolution:
        """The configuration that `spec` means on this host, with absolute paths, and its datasets.

        Raises:
            StillhouseError: INVALID_SPEC with every violation at once, of its values, its files and its hub ids.
        """
        config = await asyncio.to_thread(proto.with_defaults, spec)
        problems = await asyncio.to_thread(problems_of, config)
        found = await self._db(resolve, config, self._host, problems)
        problems = [*found.problems, *await asyncio.to_thread(hub_problems, found.hub_ids)]
        if problems:
            raise invalid_spec(problems)
        return found

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.Run:
        """Returns one run, and tells whether the caller may control it."""
        run_id = run_id_of(request.name)
        run = await self._db(self._store.get, run_id, with_history=request.with_history)
        run.caller_may_control = await self._may_control(run_id)
        return run

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        """Returns a page of runs, newest first."""
        self._supervisor.expectation.called()
        wanted = read_filter(request)
        before = read_page_token(request.page_token, wanted.digest)
        size = page_size(request.page_size)
        runs, following = await self._db(self._store.page, wanted, before=before, limit=size)
        return pb.ListRunsResponse(runs=runs, next_page_token=page_token(following, wanted.digest))

    def WatchRun(self, request: pb.WatchRunRequest, context: Context) -> AsyncIterator[pb.WatchRunResponse]:
        """Streams the current run, then every change."""
        return self._streams.watch(run_id_of(request.name), request.after_sequence)

    async def StopRun(self, request: pb.StopRunRequest, context: Context) -> pb.Run:
        """Asks a run to save a checkpoint and stop."""
        run_id = run_id_of(request.name)
        await self._check_owner(run_id, "stop")
        return await self._supervisor.stop_run(run_id)

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: Context) -> pb.Run:
        """Queues a STOPPED or FAILED run again, with the changes that are asked for."""
        run_id = run_id_of(request.name)
        await self._check_owner(run_id, "resume")
        run = await self._db(
            self._store.resume,
            run_id,
            partial(self._changed, request.changes) if request.changes.ListFields() else None,
            max_queued=self._max_queued_runs,
            whole_micro_batch=changes_passes(request.changes),
        )
        self._follow(run)
        self._notifier.notify(run_id)
        self._supervisor.wake()
        return run

    def _changed(self, changes: pb.RunSpec, effective: pb.RunSpec) -> pb.RunSpec:
        """The effective spec of a run that is resumed with `changes`. Raises StillhouseError(INVALID_SPEC)."""
        config = proto.from_proto(changed_spec(effective, changes))
        return proto.to_proto(resolve_devices(config, self._host))

    async def DeleteRun(self, request: pb.DeleteRunRequest, context: Context) -> pb.DeleteRunResponse:
        """Deletes an ended run and its files."""
        run_id = run_id_of(request.name)
        await self._check_owner(run_id, "delete")
        await self.delete(run_id)
        return pb.DeleteRunResponse()

    async def close(self) -> None:
        """Ends what rpcs have started besides runs: what follows these, and the process that encodes rows."""
        for each in self._followers:
            await each.close()
        await self._inspection.close()

    async def delete(self, run_id: str) -> None:
        """Deletes an ended run and its files. Raises StillhouseError(RUN_STATE) if it has not ended."""
        path = self._supervisor.run_dir(run_id).path
        try:
            await self._db(self._store.delete, run_id)
        except StillhouseError as error:
            if (
                error.reason is not Reason.DISK_FULL
                or (await self._db(self._store.get, run_id)).state not in ENDED
            ):
                raise
            # The files go first: they are what makes room on a full disk.
            await asyncio.to_thread(remove_run_files, path)
            await self._db(self._store.delete, run_id)
        for each in self._followers:
            await each.forget(run_id)
        self._notifier.notify(run_id)
        await asyncio.to_thread(remove_run_files, path)

    async def QueryMetrics(
        self, request: pb.QueryMetricsRequest, context: Context
    ) -> pb.QueryMetricsResponse:
        """Returns metric history, downsampled for plots."""
        most = bounded("max_points", request.max_points, DEFAULT_POINTS, MAX_POINTS)
        run_id = run_id_of(request.name)
        start, end = request.start_step, request.end_step or None
        while await self._db(self._store.extend_metric_blocks, run_id):
            pass  # of a run that an earlier version recorded; other calls come in between
        stored = await self._db(self._store.metrics, run_id, start=start, end=end, max_points=most)
        parsed = (each.parse() for each in stored)
        keys = frozenset(request.keys)
        make = partial(to_series, parsed, keys=keys, start=start, end=end, max_points=most)
        return pb.QueryMetricsResponse(series=await asyncio.to_thread(make))

    async def UploadDataset(
        self, request_iterator: AsyncIterator[pb.UploadDatasetRequest], context: Context
    ) -> pb.UploadDatasetResponse:
        """Stores a file by its content."""
        self._supervisor.expectation.sign()
        return await self._datasets.upload(request_iterator)

    async def ListDatasets(
        self, request: pb.ListDatasetsRequest, context: Context
    ) -> pb.ListDatasetsResponse:
        """Returns a page of datasets, newest first."""
        return await self._datasets.list(request)

    async def GetDataset(self, request: pb.GetDatasetRequest, context: Context) -> pb.Dataset:
        """Returns one dataset."""
        return await self._datasets.get(request)

    async def DeleteDataset(
        self, request: pb.DeleteDatasetRequest, context: Context
    ) -> pb.DeleteDatasetResponse:
        """Deletes a dataset and its file."""
        return await self._datasets.delete(request)

    async def InspectRows(self, request: pb.InspectRowsRequest, context: Context) -> pb.InspectRowsResponse:
        """Encodes rows as a run would."""
        self._supervisor.expectation.sign()
        return await self._inspection.inspect(request)

    async def InspectDataset(
        self, request: pb.InspectDatasetRequest, context: Context
    ) -> pb.InspectDatasetResponse:
        """Reads a dataset, and encodes some of its rows as a run would."""
        self._supervisor.expectation.sign()
        return await self._inspection.inspect_dataset(request)

    async def InspectStudent(
        self, request: pb.InspectStudentRequest, context: Context
    ) -> pb.InspectStudentResponse:
        """Returns a model's configuration, and this host's memory."""
        self._supervisor.expectation.sign()
        return await inspect_student(request, self._host)

    async def ListArtifacts(
        self, request: pb.ListArtifactsRequest, context: Context
    ) -> pb.ListArtifactsResponse:
        """Lists the artifacts of a run."""
        return pb.ListArtifactsResponse(artifacts=await self._streams.artifacts(run_id_of(request.name)))

    def DownloadArtifact(
        self, request: pb.DownloadArtifactRequest, context: Context
    ) -> AsyncIterator[pb.DownloadArtifactResponse]:
        """Streams a file from a byte offset."""
        return self._streams.download(run_id_of(request.name), request.path, request.start_offset)

    async def AttachResult(
        self, request: pb.AttachResultRequest, context: Context
    ) -> pb.AttachResultResponse:
        """Stores a result that was computed elsewhere with a run."""
        run_id = run_id_of(request.name)
        await self._db(self._store.get, run_id)
        await self._check_owner(run_id, "attach a result to")
        stored = await asyncio.to_thread(attach, self._supervisor.run_dir(run_id).path, request)
        return pb.AttachResultResponse(artifact=stored)

    def StreamLogs(
        self, request: pb.StreamLogsRequest, context: Context
    ) -> AsyncIterator[pb.StreamLogsResponse]:
        """Streams a run's log from a byte offset and optionally follows it."""
        run_id = run_id_of(request.name)
        return self._streams.logs(run_id, request.attempt, request.start_offset, follow=request.follow)

    async def _check_owner(self, run_id: str, verb: str) -> None:
        """Checks that the caller may control the run: a token without admin controls only its own."""
        if not await self._may_control(run_id):
            raise StillhouseError(
                Reason.PERMISSION_DENIED,
                f'Run {run_id} was not submitted with the token "{current_caller().name}"; to {verb} it, use the one that '
                "did, or one with the scope admin.",
            )

    async def _may_control(self, run_id: str) -> bool:
        caller = current_caller()
        return caller.is_admin or await self._db(self._store.owner, run_id) == caller.name


def new_run_id() -> str:
    """12 characters of [a-z2-7]."""
    return base64.b32encode(secrets.token_bytes(8)).decode().lower()[:12]


def run_id_of(name: str) -> str:
    """The id in `runs/{id}`.

    Raises:
        StillhouseError: INVALID_REQUEST for anything else.
    """
    folder, _, run_id = name.partition("/")
    if folder != "runs" or not RUN_ID.fullmatch(run_id):
        raise StillhouseError(
            Reason.INVALID_REQUEST, f"{name[:80]!r} is not a run's name; use one such as 'runs/abcdefgh2345'."
        )
    return run_id


def remove_run_files(path: Path) -> None:
    """Deletes a run directory; the rename makes it vanish at once, and the next start completes an interrupted delete."""
    if path.exists():
        doomed = path.with_name(f"{DELETED}{path.name}-{secrets.token_hex(4)}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_deleted(runs_path: Path) -> None:
    """Completes interrupted calls of `remove_run_files`."""
    for path in runs_path.glob(f"{DELETED}*"):
        shutil.rmtree(path, ignore_errors=True)
