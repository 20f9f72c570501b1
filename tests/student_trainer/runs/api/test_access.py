"""A run service with tokens: ownership, audit log, metrics and limits."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stillhouse.protos.errors import Reason, from_status
from stillhouse.protos.rpc import tokens as auth_tokens
from stillhouse.protos.rpc.channel import ChannelOptions, connect
from stillhouse.protos.rpc.tokens import Scope
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2 import Run, RunSpec
from stillhouse.protos.stillhouse.v1.run_pb2_grpc import RunServiceStub
from tests.student_trainer.config.specs import spec_of
from tests.student_trainer.runs.api.caller import PATIENCE_S, model_of_no_kind, refused, wait_ended
from tests.support.programs import Program


@contextmanager
def stub_of(target: str, token: str | None) -> Iterator[RunServiceStub]:
    with connect(ChannelOptions(target=target, token=token)) as channel:
        yield RunServiceStub(channel)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def doomed_spec(folder: Path) -> RunSpec:
    """A run that fails at once: its student is of no known kind."""
    (folder / "rows.jsonl").write_text('{"text": "a"}\n' * 8)
    return spec_of(
        {
            "student": {"model": str(model_of_no_kind(folder))},
            "data": {"train": [{"path": str(folder / "rows.jsonl")}]},
            "loss": {"terms": [{"weight": 0}], "hard_weight": 1},
        }
    )


def read_page(port: int) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as page:
        families = text_string_to_metric_families(page.read().decode())
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }


def test_tokens_determine_the_owner_of_a_run(trainer_service: Callable[..., Program], tmp_path: Path) -> None:
    data_dir, port = tmp_path / "trainer-data", free_port()
    # Without a slot nothing leaves the queue, so that no request races with a run's end.
    service = trainer_service("--cpu-slots", "1", "--max-queued-runs", "2", "--metrics-port", str(port))
    spec = doomed_spec(tmp_path)

    with stub_of(service.target, None) as anybody:
        first = wait_ended(anybody, anybody.CreateRun(pb.CreateRunRequest(spec=spec)).name)
        assert first.state == Run.STATE_FAILED
        # The file applies from its creation on, without a restart.
        tokens = {
            name: auth_tokens.create(data_dir / "tokens.json", name=name, scopes=[scope], lifetime_s=None)[0]
            for name, scope in (
                ("ada", Scope.SUBMIT),
                ("ben", Scope.SUBMIT),
                ("op", Scope.ADMIN),
                ("inf", Scope.INFER),
            )
        }
        with refused(Reason.UNAUTHENTICATED):
            anybody.ListRuns(pb.ListRunsRequest())

    with (
        stub_of(service.target, tokens["ada"]) as ada,
        stub_of(service.target, tokens["ben"]) as ben,
        stub_of(service.target, tokens["op"]) as op,
        stub_of(service.target, tokens["inf"]) as inf,
    ):
        with refused(Reason.PERMISSION_DENIED):
            inf.CreateRun(pb.CreateRunRequest(spec=spec))
        run = ada.CreateRun(pb.CreateRunRequest(spec=spec))
        assert ben.GetRun(pb.GetRunRequest(name=run.name)).name == run.name, "everybody may read"
        ended = wait_ended(ada, run.name)
        assert ended.state == Run.STATE_FAILED
        steered: list[tuple[Any, Any]] = [
            (ben.StopRun, pb.StopRunRequest(name=run.name)),
            (ben.ResumeRun, pb.ResumeRunRequest(name=run.name)),
            (ben.DeleteRun, pb.DeleteRunRequest(name=run.name)),
            (ben.AttachResult, pb.AttachResultRequest(name=run.name, file_name="a.json", data=b"{}")),
        ]
        for verb, request in steered:
            with refused(Reason.PERMISSION_DENIED) as caught:
                verb(request)
            assert '"ben"' in caught[0].message
        with refused(Reason.PERMISSION_DENIED):
            ada.DeleteRun(pb.DeleteRunRequest(name=first.name))
        ada.DeleteRun(pb.DeleteRunRequest(name=run.name))
        op.DeleteRun(pb.DeleteRunRequest(name=first.name))

        lines = [json.loads(line) for line in (data_dir / "audit.jsonl").read_text().splitlines()]
        told = {(line["who"], line["rpc"], line["what"], line["outcome"]) for line in lines}
        assert ("anybody", "RunService/CreateRun", first.name, "OK") in told
        assert ("ada", "RunService/CreateRun", run.name, "OK") in told
        assert ("ben", "RunService/DeleteRun", run.name, "PERMISSION_DENIED") in told
        assert ("op", "RunService/DeleteRun", first.name, "OK") in told
        assert not any(line["rpc"] == "RunService/GetRun" for line in lines)

        page = read_page(port)
        calls = {(name, *sorted(labels)): value for (name, labels), value in page.items()}
        assert calls["stillhouse_calls_total", ("outcome", "OK"), ("rpc", "DeleteRun")] == 2
        assert calls["stillhouse_calls_total", ("outcome", "PERMISSION_DENIED"), ("rpc", "DeleteRun")] == 2
        assert calls["stillhouse_runs", ("state", "failed")] == 0
        assert calls["stillhouse_slots", ("device", "cpu")] == 1
        assert calls["stillhouse_call_seconds_count", ("rpc", "CreateRun")] == 3
        assert calls["process_resident_memory_bytes",] > 1e6

    everything = (
        service.log() + (data_dir / "audit.jsonl").read_text() + (data_dir / "tokens.json").read_text()
    )
    assert not any(secret in everything for secret in tokens.values())


def test_a_client_may_queue_a_limited_number_of_runs(
    trainer_service: Callable[..., Program], tmp_path: Path
) -> None:
    data_dir = tmp_path / "trainer-data"
    data_dir.mkdir()
    tokens = [
        auth_tokens.create(data_dir / "tokens.json", name=name, scopes=[Scope.SUBMIT], lifetime_s=None)[0]
        for name in ("ada", "ben")
    ]
    service = trainer_service("--max-queued-runs", "3")
    spec = doomed_spec(tmp_path)
    with stub_of(service.target, tokens[0]) as ada, stub_of(service.target, tokens[1]) as ben:
        deadline = time.monotonic() + PATIENCE_S
        with refused(Reason.QUOTA) as caught:  # each start takes a second, each call milliseconds
            while time.monotonic() < deadline:
                ada.CreateRun(pb.CreateRunRequest(spec=spec))
        assert caught[0].metadata == {"queued": "3", "limit": "3"}
        assert "--max-queued-runs" in caught[0].message
        waiting = ben.CreateRun(pb.CreateRunRequest(spec=spec))
        assert waiting.queue_position >= 2, "the queue in front of another client's run is seen"
        for run in ada.ListRuns(pb.ListRunsRequest(states=[Run.STATE_PENDING])).runs:
            if run.name != waiting.name:
                ada.StopRun(pb.StopRunRequest(name=run.name))


@pytest.mark.parametrize(
    ("option", "file"), [("--max-log-bytes", "attempts/1/log"), ("--max-metric-bytes", "metrics.jsonl")]
)
def test_a_run_that_writes_too_much_is_killed(
    trainer_service: Callable[..., Program], tmp_path: Path, option: str, file: str
) -> None:
    # Importing what training needs takes seconds, in which the first line is written and seen.
    data_dir, service = tmp_path / "trainer-data", trainer_service(option, "10")
    with stub_of(service.target, None) as stub:
        created = stub.CreateRun(pb.CreateRunRequest(spec=doomed_spec(tmp_path)))
        log = data_dir / created.name / "attempts/1/log"
        deadline = time.monotonic() + PATIENCE_S
        while not log.exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        with (data_dir / created.name / file).open("ab") as opened:
            opened.write(b"the same again\n" * 3)
        run = wait_ended(stub, created.name)
    assert from_status(run.error).reason is Reason.QUOTA
    assert option in run.error.message
    assert ("the same again" in run.error.message) == file.endswith("log")


def test_ended_runs_are_removed_after_their_time(
    trainer_service: Callable[..., Program], tmp_path: Path
) -> None:
    spec, data_dir = doomed_spec(tmp_path), tmp_path / "trainer-data"
    first = trainer_service()
    with stub_of(first.target, None) as stub:
        name = wait_ended(stub, stub.CreateRun(pb.CreateRunRequest(spec=spec)).name).name
    first.stop()
    kept = trainer_service("--keep-ended-days", "1")
    with stub_of(kept.target, None) as stub:
        assert stub.GetRun(pb.GetRunRequest(name=name)).state == Run.STATE_FAILED
    kept.stop()
    removing = trainer_service("--keep-ended-days", "0")
    with stub_of(removing.target, None) as stub:
        deadline = time.monotonic() + PATIENCE_S
        while stub.ListRuns(pb.ListRunsRequest()).runs or (data_dir / name).exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--metrics-port", "1", "--metrics-host", "192.0.2.1"],
            "--metrics-port 1 on 192.0.2.1 cannot be had",
        ),
        (["--tokens", "/nowhere/tokens.json"], "The tokens file /nowhere/tokens.json cannot be used"),
        (["--audit-log", "/nowhere/audit.jsonl"], "The audit log /nowhere/audit.jsonl cannot be written"),
        (["--listen", "0.0.0.0:0", "--insecure", "--tokens", "/nowhere/t"], "The tokens file /nowhere/t"),
    ],
)
def test_invalid_settings_end_the_service_with_a_sentence(
    tmp_path: Path, options: list[str], sentence: str
) -> None:
    from click.testing import CliRunner

    from stillhouse.student_trainer.runs.__main__ import main

    result = CliRunner().invoke(main, ["--data-dir", str(tmp_path), "--listen", "127.0.0.1:0", *options])
    assert result.exit_code == 2
    assert sentence in result.stderr
