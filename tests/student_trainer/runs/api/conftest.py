"""A real run service whose runs fail at once because their student is of no known kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2 import Run, RunSpec
from stillhouse.protos.stillhouse.v1.run_pb2_grpc import RunServiceStub
from tests.student_trainer.config.specs import spec_of
from tests.student_trainer.runs.api.caller import model_of_no_kind, stub_for, wait_ended
from tests.support.processes import no_process_left
from tests.support.programs import start_trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    stub: RunServiceStub
    data_dir: Path
    rows: Path
    """A dataset file on the service's host."""

    def spec(self, *, student: str | None = None, path: str | None = None) -> RunSpec:
        return spec_of(
            {
                "student": {"model": student or str(model_of_no_kind(self.rows.parent))},
                "data": {"train": [{"path": path or str(self.rows)}]},
                "loss": {"terms": [{"weight": 0}], "hard_weight": 1},
            }
        )

    def create(self, spec: RunSpec | None = None, **fields: Any) -> Run:
        return self.stub.CreateRun(pb.CreateRunRequest(spec=spec or self.spec(), **fields))

    def create_waiting(self, **fields: Any) -> Run:
        """A queued run, while another one has the only slot."""
        live = [Run.STATE_STARTING, Run.STATE_RUNNING]
        while True:
            run = self.create(**fields)
            others = {each.name for each in self.stub.ListRuns(pb.ListRunsRequest(states=live)).runs}
            if others - {run.name}:
                return run

    def upload(self, name: str, *pieces: bytes) -> pb.UploadDatasetResponse:
        requests = [
            pb.UploadDatasetRequest(file_name=name),
            *(pb.UploadDatasetRequest(data=each) for each in pieces),
        ]
        return self.stub.UploadDataset(iter(requests))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("service")
    (root / "rows.jsonl").write_text('{"text": "a"}\n' * 8)
    (root / "outside").mkdir()
    options = [
        "--stop-runs-on-exit",
        "--stop-grace-s",
        "1",
        "--max-upload-bytes",
        "1000000",
        "--allow-root",
        str(root),
    ]
    with (
        no_process_left() as mark,
        start_trainer(root / "data", directory=root, options=options, environment=mark) as program,
        stub_for(program.target) as stub,
    ):
        yield Service(stub=stub, data_dir=root / "data", rows=root / "rows.jsonl")


@pytest.fixture(scope="module")
def failed(service: Service) -> Run:
    """A failed run whose student is of no known kind; retries are allowed, and would not help."""
    spec = service.spec()
    spec.retry.max_attempts = 3
    return wait_ended(service.stub, service.create(spec).name)
