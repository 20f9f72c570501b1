"""Rpcs of a real run service, whose runs fail at once because their student is of no known kind."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from stillhouse.protos.errors import Reason
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2 import Run, RunSpec
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.runs.api.servicer import MAX_SPEC_BYTES, run_id_of
from tests.conftest import Models
from tests.student_trainer.runs.api.caller import refused, stub_for, wait_ended
from tests.student_trainer.runs.api.conftest import Service
from tests.support.programs import Program, start_trainer


def test_validate_only_changes_nothing_and_returns_the_effective_spec(service: Service) -> None:
    before = service.stub.ListRuns(pb.ListRunsRequest()).runs
    run = service.create(validate_only=True)
    assert (run.name, run.state) == ("", Run.STATE_UNSPECIFIED)
    effective = run.effective_spec
    assert effective.data.train[0].path == str(service.rows)
    assert (effective.optimizer.precision, effective.resources.gpu_count) == ("fp32", 0)
    assert len(service.stub.ListRuns(pb.ListRunsRequest()).runs) == len(before)


def test_every_problem_of_a_spec_is_reported_with_its_path(service: Service) -> None:
    spec = service.spec(student="/no/such/model", path="datasets/" + "0" * 64)
    spec.resources.gpus.append(7)
    spec.optimizer.precision = "fp16"
    with refused(Reason.INVALID_SPEC) as caught:
        service.create(spec)
    fields = {each.field for each in caught[0].violations}
    assert fields == {"student.model", "data.train[0].path", "resources.gpus"}
    # Values, combinations of fields, files and hub ids in one answer.
    spec.loss.top_k = 999
    spec.optimizer.lr_scheduler = "cosin"
    spec.student.model, spec.student.adapter = "nobody/nothing", "nobody/adapter"
    with refused(Reason.INVALID_SPEC) as caught:
        service.create(spec)
    assert {each.field for each in caught[0].violations} == {
        *("loss.top_k", "optimizer.lr_scheduler", "student.model", "student.adapter"),
        *("data.train[0].path", "resources.gpus"),
    }
    with refused(Reason.INVALID_SPEC) as caught:
        service.create(RunSpec())
    assert {each.field for each in caught[0].violations} >= {"student.model", "data.train", "teachers"}


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../../etc/passwd",
        "datasets/../credentials.toml",
        "datasets/../stillhouse.db",
        "runs/../lock",
    ],
)
def test_a_path_outside_of_the_roots_is_refused(service: Service, path: str) -> None:
    (service.data_dir / "credentials.toml").touch()
    with refused(Reason.INVALID_SPEC) as caught:
        service.create(service.spec(path=path))
    assert [each.field for each in caught[0].violations] == ["data.train[0].path"]
    assert "outside of what this service may read" in str(caught[0])


def test_a_path_that_the_host_cannot_look_up_is_refused(service: Service) -> None:
    spec = service.spec(student="runs/" + "x" * 300, path="caches/" + "y" * 300)
    with refused(Reason.INVALID_SPEC) as caught:
        service.create(spec)
    assert {each.field for each in caught[0].violations} == {"student.model", "data.train[0].path"}
    assert all("cannot be read" in each.description for each in caught[0].violations)


def test_an_oversized_spec_is_refused_before_validation(service: Service) -> None:
    spec = service.spec()
    spec.display_name = "x" * MAX_SPEC_BYTES
    with refused(Reason.INVALID_SPEC) as caught:
        service.create(spec)
    assert f"the limit is {MAX_SPEC_BYTES}" in str(caught[0])


@pytest.mark.faults(row=14)
def test_no_field_that_takes_a_path_follows_a_link_out_of_the_roots(service: Service) -> None:
    link = service.rows.parent / "outside" / "link"
    caches = service.data_dir / "caches" / "link"
    for each in (link, caches):
        if not each.is_symlink():
            each.symlink_to("/etc")
    spec = service.spec(student=str(link), path=str(link / "hostname"))
    spec.student.adapter = str(link)
    spec.data.eval.add().path = str(link / "hostname")
    spec.cache.path = "caches/link/x"
    with refused(Reason.INVALID_SPEC) as caught:
        service.create(spec)
    assert {each.field for each in caught[0].violations} == {
        "student.model",
        "student.adapter",
        "data.train[0].path",
        "data.eval[0].path",
        "cache.path",
    }
    assert "outside of what this service may read" in str(caught[0])


def test_adapters_and_optimizers_that_cannot_work_are_refused_at_create(service: Service) -> None:
    spec = service.spec()
    spec.student.adapter = str(service.rows.parent)
    spec.optimizer.name = "paged_adamw_8bit"  # no GPU to page out of
    with refused(Reason.INVALID_SPEC) as caught:
        service.create(spec)
    assert "holds no adapter_config.json and no adapter_model.safetensors" in str(caught[0])
    assert 'use "adamw_8bit"' in str(caught[0])


def test_a_directory_without_a_model_is_refused(service: Service) -> None:
    with refused(Reason.INVALID_SPEC) as caught:
        service.create(service.spec(student=str(service.rows.parent)))
    assert "config.json" in str(caught[0])


def test_a_student_that_lost_a_weight_is_refused_at_create(service: Service, models: Models) -> None:
    model = service.rows.parent / "lost"
    shutil.copytree(models.teacher, model)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with refused(Reason.INVALID_SPEC) as caught:
        service.create(service.spec(student=str(model)), validate_only=True)
    (violation,) = caught[0].violations
    assert violation.field == "student.model"
    assert "lacks weights in its files (layer 1: mlp.up_proj.weight)" in violation.description
    fresh = service.spec(student=str(model))
    fresh.student.from_config = True
    service.create(fresh, validate_only=True)


def test_a_failed_run_has_its_error(service: Service, failed: Run) -> None:
    assert failed.state == Run.STATE_FAILED
    assert "unknown" in failed.error.message
    assert [(each.number, each.exit_code) for each in failed.attempts] == [(1, 3)]
    assert failed.HasField("end_time")
    assert failed.error == failed.attempts[0].error
    assert failed.spec.student == service.spec().student


def test_a_failed_run_does_not_stop_but_resumes_with_changes_of_what_is_not_learnt(
    service: Service, failed: Run
) -> None:
    with refused(Reason.RUN_STATE):
        service.stub.StopRun(pb.StopRunRequest(name=failed.name))
    changes = RunSpec()
    changes.optimizer.micro_batch_tokens = 512
    changes.checkpoint.keep = 7
    refusals = {"optimizer.precision": "bf16", "data.seed": 3, "resources.gpu_count": 5}
    for path, value in refusals.items():
        section, name = path.split(".")
        wrong = RunSpec()
        setattr(getattr(wrong, section), name, value)
        wrong.MergeFrom(changes)
        with refused(Reason.INVALID_SPEC) as caught:
            service.stub.ResumeRun(pb.ResumeRunRequest(name=failed.name, changes=wrong))
        assert [each.field for each in caught[0].violations] == [path]
    before = service.stub.GetRun(pb.GetRunRequest(name=failed.name))
    assert before.state == Run.STATE_FAILED
    service.stub.ResumeRun(pb.ResumeRunRequest(name=failed.name, changes=changes))
    run = wait_ended(service.stub, failed.name)
    assert [attempt.number for attempt in run.attempts][-1] == len(failed.attempts) + 1
    assert (run.spec, run.error.message) == (before.spec, before.error.message)
    assert run.effective_spec.optimizer.micro_batch_tokens == 512
    assert RunDir(service.data_dir / failed.name).effective_spec() == run.effective_spec
    assert run.effective_spec.checkpoint.keep == 7


def test_many_equal_requests_make_one_run_and_another_spec_is_refused(service: Service) -> None:
    request_id = str(uuid.uuid4())
    service.create_waiting()
    with ThreadPoolExecutor(16) as pool:
        runs = list(pool.map(lambda _: service.create(request_id=request_id), range(50)))
    assert len({run.name for run in runs}) == 1
    other = service.spec()
    other.optimizer.seed = 3
    with refused(Reason.REQUEST_CONFLICT):
        service.create(other, request_id=request_id)
    with refused(Reason.INVALID_REQUEST):
        service.create(request_id="not-a-uuid")
    service.stub.StopRun(pb.StopRunRequest(name=runs[0].name))


def test_pages_go_through_every_run_newest_first(service: Service, failed: Run) -> None:
    waiting = [service.create_waiting() for _ in range(3)]
    every = [run.name for run in service.stub.ListRuns(pb.ListRunsRequest()).runs]
    seen, token = [], ""
    while True:
        page = service.stub.ListRuns(pb.ListRunsRequest(page_size=2, page_token=token))
        seen += [run.name for run in page.runs]
        token = page.next_page_token
        if not token:
            break
        for other in ({"states": [Run.STATE_FAILED]}, {"text": "a"}, {"labels": ["a"]}):
            with refused(Reason.INVALID_REQUEST):
                service.stub.ListRuns(pb.ListRunsRequest(page_token=token, **other))
    assert seen == every
    assert failed.name in seen
    with refused(Reason.INVALID_REQUEST):
        service.stub.ListRuns(pb.ListRunsRequest(page_size=-1))
    for request in (pb.ListRunsRequest(text="x" * 201), pb.ListRunsRequest(labels=["x"] * 17)):
        with refused(Reason.INVALID_REQUEST):
            service.stub.ListRuns(request)
    with refused(Reason.INVALID_REQUEST):
        service.stub.ListRuns(pb.ListRunsRequest(page_token="1; drop table runs"))
    for run in waiting:
        service.stub.StopRun(pb.StopRunRequest(name=run.name))


def test_a_waiting_run_stops_at_once_resumes_and_is_deleted_with_its_files(service: Service) -> None:
    name = service.create_waiting().name
    path = service.data_dir / name
    (path / "final").mkdir(parents=True)
    with refused(Reason.RUN_STATE) as caught:
        service.stub.DeleteRun(pb.DeleteRunRequest(name=name))
    assert caught[0].metadata["state"] == "PENDING"
    stopped = service.stub.StopRun(pb.StopRunRequest(name=name))
    again = service.stub.StopRun(pb.StopRunRequest(name=name))
    assert stopped.state == again.state == Run.STATE_STOPPED
    service.create_waiting()
    assert service.stub.ResumeRun(pb.ResumeRunRequest(name=name)).state == Run.STATE_PENDING
    service.stub.StopRun(pb.StopRunRequest(name=name))
    service.stub.DeleteRun(pb.DeleteRunRequest(name=name))
    assert not path.exists()
    assert not list(path.parent.glob(".deleted-*"))
    with refused(Reason.RUN_NOT_FOUND):
        service.stub.GetRun(pb.GetRunRequest(name=name))


@pytest.mark.parametrize(
    "name", ["", "runs/", "runs/../etc", "runs/ABCDEFGHIJKL", "abcdefgh2345", "runs/a\0bcdefgh234"]
)
def test_an_invalid_name_is_refused(service: Service, name: str) -> None:
    with refused(Reason.INVALID_REQUEST):
        service.stub.GetRun(pb.GetRunRequest(name=name))


def test_logs_resume_from_a_byte(service: Service, failed: Run) -> None:
    def read(**fields: Any) -> tuple[bytes, int]:
        pieces = list(service.stub.StreamLogs(pb.StreamLogsRequest(name=failed.name, **fields)))
        return b"".join(piece.data for piece in pieces), pieces[-1].next_offset if pieces else 0

    first, size = read(attempt=1)
    whole, _ = read()
    assert len(first) == size
    assert whole.startswith(first)
    assert read(start_offset=10)[0] == whole[10:]
    assert read(start_offset=-5)[0] == whole[-5:]
    assert read(start_offset=-10 * len(whole))[0] == whole
    assert read(start_offset=len(whole))[0] == b""
    followed = service.stub.StreamLogs(pb.StreamLogsRequest(name=failed.name, follow=True), timeout=30)
    assert b"".join(piece.data for piece in followed) == whole
    with refused(Reason.INVALID_REQUEST):
        read(attempt=99)


def test_an_upload_is_stored_by_content(service: Service) -> None:
    content = b'{"text": "b"}\n' * 100
    answer = service.upload("b.jsonl", content[:700], content[700:])
    digest = hashlib.sha256(content).hexdigest()
    assert (answer.name, answer.size_bytes) == (f"datasets/{digest}", len(content))
    assert (service.data_dir / "datasets" / f"{digest}.jsonl").read_bytes() == content
    assert service.upload("c.json", content).name == answer.name
    run = service.create(service.spec(path=answer.name), validate_only=True)
    assert run.effective_spec.data.train[0].path == str(service.data_dir / "datasets" / f"{digest}.jsonl")
    assert run.spec.data.train[0].path == answer.name


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("", b"x", Reason.INVALID_REQUEST),
        ("../x.jsonl", b"x", Reason.INVALID_REQUEST),
        ("a\nb.jsonl", b"x", Reason.INVALID_REQUEST),
        ("x.txt", b"x", Reason.DATASET_INVALID),
        ("x.jsonl", b"", Reason.DATASET_INVALID),
        ("x.jsonl", b"x" * 1_000_001, Reason.QUOTA),
    ],
)
def test_a_bad_upload_leaves_nothing(service: Service, name: str, data: bytes, reason: Reason) -> None:
    before = sorted(service.data_dir.joinpath("datasets").iterdir())
    with refused(reason):
        service.upload(name, data)
    assert sorted(service.data_dir.joinpath("datasets").iterdir()) == before


def test_artifacts_are_listed_and_sent_from_a_byte_with_their_hash(service: Service, failed: Run) -> None:
    listed = service.stub.ListArtifacts(pb.ListArtifactsRequest(name=failed.name)).artifacts
    spec = next(each for each in listed if each.path == "effective_spec.json")
    content = (service.data_dir / failed.name / spec.path).read_bytes()
    assert (spec.size_bytes, spec.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    for offset in (0, 100, len(content)):
        request = pb.DownloadArtifactRequest(name=failed.name, path=spec.path, start_offset=offset)
        pieces = list(service.stub.DownloadArtifact(request))
        assert b"".join(piece.data for piece in pieces) == content[offset:]
        assert pieces[-1].sha256 == spec.sha256
    with refused(Reason.INVALID_REQUEST):
        request = pb.DownloadArtifactRequest(name=failed.name, path=spec.path, start_offset=len(content) + 1)
        list(service.stub.DownloadArtifact(request))


@pytest.mark.faults(row=14)
def test_only_artifacts_are_sent(service: Service, failed: Run) -> None:
    run_path = service.data_dir / failed.name
    final = run_path / "final"
    final.mkdir(exist_ok=True)
    (final / "link").symlink_to("/etc/hostname")
    (final / "folder").symlink_to("/etc")
    paths = [
        "../../stillhouse.db",
        "/etc/hostname",
        "final/../control.json",
        "final/link",
        "final/folder/hostname",
    ]
    for path in (*paths, "control.json", "lock", "", ".", "final", "final/no"):
        with pytest.raises(Exception, match=r"path below the run|not an artifact|has no file"):
            list(service.stub.DownloadArtifact(pb.DownloadArtifactRequest(name=failed.name, path=path)))
    listed = service.stub.ListArtifacts(pb.ListArtifactsRequest(name=failed.name)).artifacts
    assert not [each.path for each in listed if each.path.startswith("final/")]


def test_metrics_of_a_run_without_any_are_empty(service: Service, failed: Run) -> None:
    assert not service.stub.QueryMetrics(pb.QueryMetricsRequest(name=failed.name)).series
    with refused(Reason.INVALID_REQUEST):
        service.stub.QueryMetrics(pb.QueryMetricsRequest(name=failed.name, max_points=-1))


def test_a_watch_ahead_of_the_run_is_refused(service: Service, failed: Run) -> None:
    with refused(Reason.INVALID_REQUEST):
        list(service.stub.WatchRun(pb.WatchRunRequest(name=failed.name, after_sequence=10_000)))


def test_a_second_service_on_the_same_data_is_refused(service: Service, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Another run service uses"):
        start_trainer(service.data_dir, directory=tmp_path, options=[])


def test_run_ids_are_valid_names(service: Service, failed: Run) -> None:
    assert failed.name == f"runs/{run_id_of(failed.name)}"


def test_a_process_that_cannot_start_fails_the_run(
    trainer_service: Callable[..., Program], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    data_dir = tmp_path / "trainer-data"
    with stub_for(trainer_service().target) as stub:
        # A file in place of the folder of runs: nothing can be written below it.
        (data_dir / "runs").rmdir()
        (data_dir / "runs").touch()
        run = wait_ended(stub, Service(stub=stub, data_dir=data_dir, rows=rows).create().name)
    assert run.state == Run.STATE_FAILED
    assert "could not be started: [Errno 20] Not a directory" in run.error.message
    assert run.attempts[0].error == run.error
