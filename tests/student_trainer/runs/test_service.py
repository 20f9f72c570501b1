"""The run service within the test's process: a life from its start over runs of every end to a signal."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.runs.__main__ import run as run_service
from stillhouse.student_trainer.runs.data_dir import DataDir
from stillhouse.student_trainer.runs.settings import RunServiceSettings
from stillhouse.student_trainer.runs.store.run_state import ENDED
from stillhouse.student_trainer.runs.store.store import Store
from tests.student_trainer.runs.api.caller import refused, stub_for, wait_ended, watch
from tests.student_trainer.runs.api.conftest import Service
from tests.support.privileges import disk_of
from tests.support.processes import no_process_left
from tests.support.runs import wait_until


@asynccontextmanager
async def serving(folder: Path, **changes: Any) -> AsyncIterator[str]:
    """The address of a service; SIGTERM ends it with the block."""
    address, before = folder / "address", signal.getsignal(signal.SIGTERM)
    settings = RunServiceSettings(
        data_dir=folder / "data",
        listen="127.0.0.1:0",
        address_file=address,
        allow_roots=(folder,),
        standby="off",
        stop_runs_on_exit=True,
        stop_grace_s=0.5,
        max_upload_bytes=1_000_000,
        **changes,
    )
    life = asyncio.create_task(run_service(settings))
    try:
        await asyncio.to_thread(wait_until, lambda: address.exists() or life.done(), "it listens")
        if not life.done():
            yield address.read_text()
            os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(life, 60)
    finally:
        address.unlink(missing_ok=True)
        signal.signal(signal.SIGTERM, before)


def service_at(folder: Path, stub: Any) -> Service:
    rows = folder / "rows.jsonl"
    rows.write_text('{"text": "a"}\n' * 8)
    return Service(stub=stub, data_dir=folder / "data", rows=rows)


async def test_runs_of_every_end_in_one_life_of_the_service(tmp_path: Path) -> None:
    async with serving(tmp_path) as target:
        await asyncio.to_thread(_fail_wait_and_stop, tmp_path, target)
    async with serving(tmp_path) as target:
        assert len(await asyncio.to_thread(_names, target)) == 2


def _fail_wait_and_stop(folder: Path, target: str) -> None:
    with stub_for(target) as stub:
        service = service_at(folder, stub)
        request_id = str(uuid.uuid4())
        first = service.create(request_id=request_id)
        assert service.create(request_id=request_id).name == first.name
        waiting = service.create()  # the only slot is taken
        assert stub.GetRun(pb.GetRunRequest(name=waiting.name)).state == Run.STATE_PENDING
        assert stub.StopRun(pb.StopRunRequest(name=waiting.name)).state == Run.STATE_STOPPED
        assert stub.ResumeRun(pb.ResumeRunRequest(name=waiting.name)).state == Run.STATE_PENDING
        assert stub.StopRun(pb.StopRunRequest(name=waiting.name)).state == Run.STATE_STOPPED
        stub.DeleteRun(pb.DeleteRunRequest(name=waiting.name))
        with refused(Reason.RUN_NOT_FOUND):
            stub.GetRun(pb.GetRunRequest(name=waiting.name))
        with refused(Reason.RUN_STATE):
            stub.DeleteRun(pb.DeleteRunRequest(name=first.name))
        failed = wait_ended(stub, first.name)
        assert (failed.state, failed.error.message != "") == (Run.STATE_FAILED, True)
        assert [each.run.state for each in watch(stub, first.name)][-1] == Run.STATE_FAILED
        listed = stub.ListRuns(pb.ListRunsRequest(states=[Run.STATE_FAILED], page_size=1)).runs
        assert [each.name for each in listed] == [first.name]
        _read_what_a_run_left(service, first.name)
        _keep_datasets(service)

        live = service.create()
        wait_until(
            lambda: stub.GetRun(pb.GetRunRequest(name=live.name)).state != Run.STATE_PENDING, "it starts"
        )
        stub.StopRun(pb.StopRunRequest(name=live.name))
        assert wait_ended(stub, live.name).state in ENDED


@pytest.mark.parametrize("hastened", [False, True])
async def test_a_run_that_starts_while_the_service_drains_ends_with_it(
    tmp_path: Path, *, hastened: bool
) -> None:
    with no_process_left() as mark, pytest.MonkeyPatch.context() as patch:
        for name, value in mark.items():
            patch.setenv(name, value)
        async with serving(tmp_path) as target:
            name, gate = await asyncio.to_thread(_start_behind_gate, tmp_path, target)
            loop = asyncio.get_running_loop()
            if hastened:
                loop.call_later(0.3, os.kill, os.getpid(), signal.SIGTERM)
            loop.call_later(0.6, os.close, gate)  # while the service drains
        await asyncio.sleep(1.0 if hastened else 0.0)
        store = Store.open(tmp_path / "data" / "stillhouse.db")
        run = store.get(name.removeprefix("runs/"))
        store.close()
    assert hastened or run.state in ENDED
    assert len(run.attempts) == 1


def _start_behind_gate(folder: Path, target: str) -> tuple[str, int]:
    """A run whose attempt is being started: its effective spec is a pipe, which is read until the descriptor is closed."""
    with stub_for(target) as stub:
        service = service_at(folder, stub)
        live, waiting = service.create(), service.create()
        run_dir = RunDir.create(service.data_dir / waiting.name, waiting.spec, waiting.effective_spec)
        given = run_dir.path / "given.json"
        run_dir.effective_spec_path.rename(given)
        os.mkfifo(run_dir.effective_spec_path)
        stub.StopRun(pb.StopRunRequest(name=live.name))
        gate = os.open(run_dir.effective_spec_path, os.O_WRONLY)  # once it is read
        given.rename(run_dir.effective_spec_path)
    return waiting.name, gate


def _read_what_a_run_left(service: Service, name: str) -> None:
    stub = service.stub
    log = b"".join(each.data for each in stub.StreamLogs(pb.StreamLogsRequest(name=name)))
    assert b"nothing" in log
    assert not stub.QueryMetrics(pb.QueryMetricsRequest(name=name)).series
    paths = {each.path for each in stub.ListArtifacts(pb.ListArtifactsRequest(name=name)).artifacts}
    assert "effective_spec.json" in paths
    wanted = pb.DownloadArtifactRequest(name=name, path="effective_spec.json")
    sent = b"".join(each.data for each in stub.DownloadArtifact(wanted))
    assert sent == (service.data_dir / name / "effective_spec.json").read_bytes()
    calls: list[tuple[Any, Any, Reason]] = [
        (stub.StreamLogs, pb.StreamLogsRequest(name=name, attempt=99), Reason.INVALID_REQUEST),
        (stub.WatchRun, pb.WatchRunRequest(name=name, after_sequence=10_000), Reason.INVALID_REQUEST),
        (stub.DownloadArtifact, pb.DownloadArtifactRequest(name=name, path="x"), Reason.ARTIFACT_NOT_FOUND),
    ]
    for call, request, reason in calls:
        with refused(reason):
            list(call(request))


def _keep_datasets(service: Service) -> None:
    stub, content = service.stub, b'{"text": "b"}\n' * 9
    told = service.upload("b.jsonl", content[:50], content[50:])
    assert told.name == f"datasets/{hashlib.sha256(content).hexdigest()}"
    named = pb.UploadDatasetRequest(file_name="b.jsonl", dataset_id="kept", data=content)
    assert stub.UploadDataset(iter([named])).dataset.name == "datasets/kept@1"
    assert stub.GetDataset(pb.GetDatasetRequest(name="datasets/kept")).size_bytes == len(content)
    listed = stub.ListDatasets(pb.ListDatasetsRequest(dataset_id="kept")).datasets
    assert [each.name for each in listed] == ["datasets/kept@1"]
    stub.DeleteDataset(pb.DeleteDatasetRequest(name="datasets/kept@1"))
    assert not stub.ListDatasets(pb.ListDatasetsRequest(dataset_id="kept")).datasets
    with refused(Reason.DATASET_INVALID):
        service.upload("empty.jsonl", b"")
    with refused(Reason.INVALID_REQUEST):
        service.upload("../b.jsonl", content)


def _names(target: str) -> list[str]:
    with stub_for(target) as stub:
        runs = list(stub.ListRuns(pb.ListRunsRequest()).runs)
    assert all(each.state in ENDED for each in runs), runs
    return [each.name for each in runs]


def _other_version(folder: Path) -> None:
    (folder / "data" / "VERSION").write_text("99\n")


def _open_credentials(folder: Path) -> None:
    path = folder / "data" / "credentials.toml"
    path.write_text("")
    path.chmod(0o644)


@pytest.mark.parametrize(
    ("spoil", "changes", "sentence"),
    [
        (_other_version, {}, "99"),
        (_open_credentials, {}, r"Others on this host can read .*; run `chmod 600"),
        (None, {"metrics_host": "203.0.113.1", "metrics_port": 1}, "203.0.113.1"),
    ],
)
async def test_a_service_that_cannot_work_says_why_and_leaves_its_folder(
    spoil: Callable[[Path], None] | None, changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir(mode=0o700)
    if spoil is not None:
        spoil(tmp_path)
    for _ in range(2):  # the lock was released
        with pytest.raises(StillhouseError, match=sentence) as caught:
            async with serving(tmp_path, **changes):
                raise AssertionError("it serves")
        assert caught.value.reason is Reason.INVALID_CONFIG


def test_a_data_directory_on_a_full_disk_is_refused(tmp_path: Path) -> None:
    with disk_of(tmp_path / "disk", 1 << 20) as disk:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        for _ in range(2):  # the lock was released
            with pytest.raises(
                StillhouseError, match=r"the disk mounted at .* is full\. Free some space there"
            ):
                DataDir.open(disk / "data")
        (disk / "filler").unlink()
        DataDir.open(disk / "data").close()
