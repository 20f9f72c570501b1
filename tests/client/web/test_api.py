"""The HTTP API against a real run service: every rpc has a path, and errors are problem documents."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from stillhouse.client.core.settings import load_settings
from stillhouse.client.web.api.routes import ROUTES
from stillhouse.client.web.openapi.document import document
from stillhouse.client.web.server import bind
from stillhouse.client.web.settings import WebSettings
from stillhouse.client.web.upstream import RUN_SERVICE, TEACHER_SERVICE
from tests.client.web.conftest import World


def test_every_rpc_has_a_route() -> None:
    unary = [
        each.name
        for each in TEACHER_SERVICE.methods
        if not each.client_streaming and not each.server_streaming
    ]
    rpcs = {f"RunService.{each.name}" for each in RUN_SERVICE.methods} | {
        f"TeacherService.{each}" for each in unary
    }
    assert {each.rpc for each in ROUTES} == rpcs
    operations = [one for path in document()["paths"].values() for one in path.values()]
    assert {each.rpc.partition(".")[2] for each in ROUTES} <= {each.get("operationId") for each in operations}


def test_small_responses_are_not_held_back() -> None:
    settings = WebSettings(services=load_settings({}), listen="127.0.0.1:0")
    with bind(settings) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.fixture(scope="module")
def run(world: World) -> str:
    """Id of a run that has failed."""
    with world.client() as client:
        created = client.post("/api/v1/runs", json={"spec": world.spec(labels={"team": "a"})})
        assert created.status_code == 201, created.text
        assert created.headers["location"] == f"/api/v1/{created.json()['name']}"
        with client.stream("GET", f"{created.headers['location']}/events") as events:
            events.read()
        return str(created.json()["name"].removeprefix("runs/"))


def test_a_run_is_read_and_its_failure_explained(world: World, run: str) -> None:
    with world.client() as client:
        shown = client.get(f"/api/v1/runs/{run}").json()
        assert shown["state"] == "FAILED"
        assert shown["error"]["reason"]
        assert shown["spec"]["labels"] == {"team": "a"}
        listed = client.get(
            "/api/v1/runs", params=[("states", "FAILED"), ("states", "RUNNING"), ("page_size", "1")]
        )
        assert [each["name"] for each in listed.json()["runs"]] == [f"runs/{run}"]
        assert client.get(f"/api/v1/runs/{run}/metrics").json() == {"series": []}
        log = client.get(f"/api/v1/runs/{run}/logs")
        assert log.headers["content-type"].startswith("text/plain")
        assert (
            client.get(f"/api/v1/runs/{run}/logs", params={"start_offset": "-5"}).content == log.content[-5:]
        )
        stopped = client.post(f"/api/v1/runs/{run}:stop")
        assert (stopped.status_code, stopped.json()["reason"]) == (409, "RUN_STATE")


def test_artifacts_are_downloaded_in_ranges(world: World, run: str) -> None:
    with world.client() as client:
        path = f"/api/v1/runs/{run}/artifacts"
        result = {"score": 1, "text": "x" * 1000}
        attached = client.put(f"/api/v1/runs/{run}/results/mine.json", json=result).json()["artifact"]
        listed = client.get(path).json()["artifacts"]
        assert attached in listed
        url = f"{path}/{attached['path']}"
        whole = client.get(url)
        assert hashlib.sha256(whole.content).hexdigest() == attached["sha256"]
        assert whole.headers["content-disposition"] == "attachment; filename*=UTF-8''mine.json"
        size, tag = len(whole.content), whole.headers["etag"]
        for asked, status, part in (
            ("bytes=0-9", 206, slice(0, 10)),
            ("bytes=5-", 206, slice(5, None)),
            ("bytes=-7", 206, slice(size - 7, None)),
            (f"bytes=0-{size + 5}", 206, slice(None)),
            ("bytes=0-1,3-4", 200, slice(None)),
            ("lines=0-1", 200, slice(None)),
        ):
            answer = client.get(url, headers={"range": asked})
            assert (answer.status_code, answer.content) == (status, whole.content[part]), asked
        assert client.get(url, headers={"range": f"bytes={size}-"}).status_code == 416
        assert client.get(url, headers={"range": "bytes=0-9", "if-range": '"other"'}).content == whole.content
        assert client.get(url, headers={"if-none-match": tag}).status_code == 304
        head = client.head(url)
        assert (head.headers["content-length"], head.content) == (str(size), b"")
        assert client.get(f"{path}/evaluations/../../tokens.json").status_code == 404
        assert client.get(f"{path}/evaluations/%2e%2e/%2e%2e/tokens.json").status_code == 404


def test_a_dataset_is_uploaded_as_it_arrives(world: World) -> None:
    content = b'{"text": "row"}\n' * 100_000  # more than one message
    kind = {"content-type": "application/octet-stream"}
    with world.client() as client:
        query = {"file_name": "rows.jsonl", "dataset_id": "mine", "num_rows": "100000"}
        stored = client.post("/api/v1/datasets", params=query, content=content, headers=kind)
        assert stored.status_code == 201, stored.text
        assert stored.json()["dataset"]["sha256"] == hashlib.sha256(content).hexdigest()
        assert stored.headers["location"] == "/api/v1/datasets/mine@1"
        found = client.get("/api/v1/datasets/mine").json()
        assert (found["num_rows"], found["owner"]) == (100_000, "ada")
        assert (
            client.get("/api/v1/datasets", params={"dataset_id": "mine"}).json()["datasets"][0]["name"]
            == found["name"]
        )
        too_large = client.post("/api/v1/datasets", params=query, content=content * 3, headers=kind)
        assert (too_large.status_code, too_large.json()["reason"]) == (429, "QUOTA")
        assert (
            client.post("/api/v1/datasets", params=query, content=b"x").json()["reason"] == "INVALID_REQUEST"
        )

        def dying() -> Iterator[bytes]:
            yield content[:600_000]
            raise OSError("the caller dies")

        with pytest.raises(OSError, match="dies"), world.client() as other:
            other.post("/api/v1/datasets", params={"file_name": "half.jsonl"}, content=dying(), headers=kind)
        assert len(client.get("/api/v1/datasets").json()["datasets"]) == 1
        assert client.delete("/api/v1/datasets/mine@1").status_code == 204
        assert client.get("/api/v1/datasets/mine").status_code == 404


def test_problems_name_every_wrong_field_with_its_line(world: World) -> None:
    with world.client() as client:
        text = "student:\n  modle: x\nloss: {top_k: -3}\n"
        refused = client.post("/api/v1/runs", content=text, headers={"content-type": "application/yaml"})
        assert refused.status_code == 400
        assert refused.headers["content-type"] == "application/problem+json"
        problem = refused.json()
        assert (problem["status"], problem["reason"]) == (400, "INVALID_SPEC")
        assert problem["remedy"].startswith("Correct the fields")
        lines = {each["field"]: each.get("line") for each in problem["violations"]}
        assert lines["student.modle"] == 2
        assert lines["loss.top_k"] == 3
        explained = client.get(problem["type"]).json()
        assert explained["remedy"] == problem["remedy"]
        fields = client.post(
            "/api/v1/runs", json={"spec": {"student": {"modle": "x"}}, "validate_only": True}
        ).json()
        assert "student.modle" in [each["field"] for each in fields["violations"]]


def test_no_file_of_the_servers_host_is_read_for_a_run(world: World, tmp_path: Path) -> None:
    secret = tmp_path / "secret.jinja"  # outside of the trainer's --allow-root
    secret.write_text("{{ secret }}")
    spec = world.spec(
        data={"train": [{"path": str(world.root / "rows.jsonl")}], "chat_template": str(secret)}
    )
    with world.client() as client:
        answer = client.post("/api/v1/runs", json={"spec": spec, "validate_only": True})
    assert (answer.status_code, "{{ secret }}" in answer.text) == (400, False)


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/api/v1/runs?page=1", b"", 400),
        ("GET", "/api/v1/runs?page_size=x", b"", 400),
        ("GET", "/api/v1/runs?states=ASLEEP", b"", 400),
        ("GET", "/api/v1/runs?page_size=99999999999", b"", 400),
        ("GET", "/api/v1/runs/NOT-AN-ID", b"", 400),
        ("GET", "/api/v1/runs/aaaaaaaaaaaa", b"", 404),
        ("GET", "/api/v1/nothing", b"", 404),
        ("PATCH", "/api/v1/runs", b"", 405),
        ("POST", "/api/v1/runs", b"[" * 100_000, 400),
        ("POST", "/api/v1/runs", b'{"spec": 1}', 400),
        ("POST", "/api/v1/runs", b'{"spec": {"display_name": "\\ud800"}}', 400),
        ("POST", "/api/v1/runs", b'{"nothing": 1}', 400),
        ("POST", "/api/v1/rows:inspect", b'{"spec": {}, "padding": "' + b"x" * 9_000_000 + b'"}', 413),
        ("POST", "/api/v1/runs/aaaaaaaaaaaa:resume", b'{"name": "runs/bbbbbbbbbbbb"}', 400),
        ("GET", "/api/v1/teachers/7", b"", 404),
        ("GET", "/api/v1/runs/aaaaaaaaaaaa/events", b"", 404),
        ("GET", "/api/v1/runs/aaaaaaaaaaaa/events?sequence=1", b"", 400),
        ("GET", "/api/v1/runs/aaaaaaaaaaaa/logs?follow=maybe", b"", 400),
        ("GET", "/api/v1/runs/aaaaaaaaaaaa/logs?offset=1", b"", 400),
        ("POST", "/api/v1/runs/aaaaaaaaaaaa:stop", b'{"reason": "x"}', 400),
        ("DELETE", "/api/v1/runs/aaaaaaaaaaaa", b'{"force": true}', 400),
    ],
)
def test_a_wrong_request_is_refused(
    world: World, method: str, path: str, content: bytes, status: int
) -> None:
    with world.client() as client:
        kind = {"content-type": "application/json"} if content else {}
        refused = client.request(method, path, content=content, headers=kind)
    assert (refused.status_code, refused.headers["content-type"]) == (status, "application/problem+json"), (
        refused.text
    )
    problem = refused.json()
    assert problem["status"] == status
    assert problem["detail"]


def test_a_teacher_that_does_not_answer_is_told(world: World) -> None:
    with world.client() as client:
        assert client.get("/api/v1/teachers").json() == {
            "teachers": [{"id": "1", "target": "127.0.0.1:7401"}]
        }
        lost = client.get("/api/v1/teachers/1")
        assert (lost.status_code, lost.json()["reason"]) == (503, "TEACHER_UNREACHABLE")


def test_a_task_of_the_old_platform_lives_over_its_paths(world: World) -> None:
    form = {
        "taskName": "TASK_AB12CD34",
        "studentModel": world.spec()["student"]["model"],
        "datasetId": str(world.root / "rows.jsonl"),
        "epochs": 2,
        "learningRate": 1e-3,
        "softLabelWeight": 0,
        "hardLabelWeight": 1,
    }
    with world.client() as client:
        created = client.post("/model-distillation/tasks", json=form).json()
        assert (created["code"], created["message"]) == (200, "success"), created
        assert created["data"]["taskName"] == "TASK_AB12CD34"
        task = f"/model-distillation/tasks/{created['data']['taskId']}"
        assert client.post(f"{task}/start").json()["code"] == 200
        reported = client.put(f"{task}/progress", params={"currentEpoch": 1, "accuracy": 0.5, "loss": 2})
        assert reported.json()["code"] == 200, reported.text
        refused = client.post(f"{task}/complete")
        assert (refused.status_code, refused.json()["code"]) == (409, 409)
        run = created["data"]["taskId"]
        kept = client.get(f"/api/v1/runs/{run}/artifacts/evaluations/attached/task_progress.json")
        assert json.loads(kept.content) == {"currentEpoch": 1, "accuracy": 0.5, "loss": 2}
        assert client.get("/model-distillation/tasks/aaaaaaaaaaaa").json()["code"] == 404
        refused = httpx.get(world.web.target + task)
        assert (refused.json()["code"], refused.headers["www-authenticate"]) == (401, "Bearer")
