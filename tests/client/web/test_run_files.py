"""Run files over the HTTP API: edits, checks and forecasts; datasets as a run reads them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import yaml

from stillhouse.client.runfile.schema import schema_text
from tests.client.web.conftest import World

CHECK, ESTIMATE = "/api/v1/run-files:check", "/api/v1/run-files:estimate"
SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}


def text_of(world: World, **changes: Any) -> str:
    return yaml.safe_dump(world.spec(**changes), sort_keys=False)


def check(client: httpx.Client, text: str, **fields: Any) -> dict[str, Any]:
    answer = client.post(CHECK, json={"text": text, **fields})
    assert answer.status_code == 200, answer.text
    checked: dict[str, Any] = answer.json()
    return checked


def test_the_schema_is_that_of_the_command_line(world: World) -> None:
    with world.client() as client:
        assert client.get("/api/v1/run-files/schema").json() == json.loads(schema_text())


def test_a_change_keeps_comments_and_tells_values_and_command(world: World) -> None:
    opened = "# mine\n" + text_of(world)
    changes = [
        {"path": "optimizer.learning_rate", "value": "2e-4"},
        {"path": "labels", "value": {"team": "a b"}},
    ]
    with world.client() as client:
        changed = check(client, opened, changes=changes, opened=opened)
        assert changed["problems"] == []
        assert changed["text"].startswith(opened)
        assert (
            changed["text"].removeprefix(opened)
            == "optimizer:\n  learning_rate: 2e-4\nlabels:\n  team: a b\n"
        )
        assert changed["keeps_comments"]
        assert changed["written"]["optimizer"] == {"learning_rate": 0.0002}
        assert changed["effective_spec"]["optimizer"]["name"] == "adamw"
        assert (
            changed["command"]
            == "stillhouse run create run.yaml --set optimizer.learning_rate=0.0002 --set 'labels.team=a b'"
        )
        removed = check(
            client,
            changed["text"],
            changes=[{"path": "labels", "value": None}, {"path": "optimizer", "value": None}],
            opened=changed["text"],
            validate=False,
        )
        assert (removed["text"], removed["command"]) == (opened, None)
        assert "effective_spec" not in removed


def test_problems_of_file_and_service_have_their_lines(world: World) -> None:
    with world.client() as client:
        text = text_of(world) + "optimizer:\n  epochs: many\n  name: adamw\nretry:\n  max_attempts: -1\n"
        found = check(client, text)
        lines = {each["field"]: each["line"] for each in found["problems"]}
        numbered = text.split("\n")
        assert numbered[lines["optimizer.epochs"] - 1] == "  epochs: many"
        assert numbered[lines["retry.max_attempts"] - 1] == "  max_attempts: -1"
        assert found["written"]["retry"] == {"max_attempts": -1}
        broken = check(client, "a: [\n", changes=[{"path": "student.model", "value": "x"}])
        assert (broken["text"], "written" in broken) == ("a: [\n", False)
        assert broken["problems"][0]["line"] == 2


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": 1},
        {"text": "", "more": 1},
        {"text": "", "changes": {}},
        {"text": "", "changes": [{"path": "student.model"}]},
        {"text": "", "changes": [{"path": "student.model", "value": 1}]},
        {"text": "", "changes": [{"path": "labels", "value": {"a": ["b"]}}]},
        {"text": "", "changes": [{"path": "student.model", "value": "x"}] * 101},
        {"text": "", "validate": "yes"},
        {"text": "x" * 300_000},
    ],
)
def test_another_body_is_refused(world: World, body: dict[str, Any]) -> None:
    with world.client() as client:
        refused = client.post(CHECK, json=body)
        assert (refused.status_code, refused.json()["reason"]) == (400, "INVALID_REQUEST")


def test_half_a_character_is_a_problem_of_the_text(world: World) -> None:
    with world.client() as client:
        answer = client.post(
            CHECK,
            content=b'{"text": "student: {model: \\ud800}"}',
            headers={"content-type": "application/json"},
        )
    assert (answer.status_code, answer.json()["problems"][0]["line"]) == (200, 1)


def test_memory_is_forecast_from_the_trainers_host(world: World) -> None:
    shaped = world.root / "shaped"
    shaped.mkdir()
    (shaped / "config.json").write_text(json.dumps(SHAPE))
    with world.client() as client:
        text = text_of(world, student={"model": str(shaped)})
        found = client.post(ESTIMATE, json={"text": text})
        assert found.status_code == 200, found.text
        forecast = found.json()
        assert (forecast["device"], forecast["fits"], forecast["remedies"]) == ("cpu", True, [])
        assert forecast["student"]["total_bytes"] == sum(forecast["student"]["parts_bytes"].values())
        assert 0 < forecast["together"]["total_bytes"] < forecast["memory_bytes"]
        shapeless = client.post(ESTIMATE, json={"text": text_of(world)})
        assert (shapeless.status_code, "hidden_size" in shapeless.json()["detail"]) == (400, True)
        outside = client.post(ESTIMATE, json={"text": "student: {model: /etc}"})
        assert (outside.status_code, outside.json()["reason"]) == (400, "INVALID_SPEC")
        wrong = client.post(ESTIMATE, json={"text": "student: {model: m}\noptimizer: {epochs: -1}"})
        assert [each["line"] for each in wrong.json()["violations"]] == [2]


def test_a_dataset_is_read_where_it_lies(world: World) -> None:
    rows = [{"text": f"row {number}"} for number in range(1, 9)]
    lines = [json.dumps(each) for each in rows]
    lines[3:3] = ['{"text": 1}', "{"]
    kind = {"content-type": "application/octet-stream"}
    with world.client() as client:
        client.post(
            "/api/v1/datasets",
            params={"file_name": "rows.jsonl", "dataset_id": "seen"},
            content="\n".join(lines).encode(),
            headers=kind,
        )
        asked = {"dataset": {"path": "datasets/seen"}, "first_row": 3, "num_rows": 2}
        answer = client.post("/api/v1/datasets:inspect", json=asked)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert (found["container"], found["format"], found["complete"]) == ("JSONL", "text", True)
        assert (found["num_rows"], found["num_refused"]) == (8, 2)
        assert [each["number"] for each in found["refusals"]] == [4, 5]
        assert found["refusals"][0]["field"] == "text"
        assert "encoding" not in found
        assert [(each["number"], json.loads(each["json"])) for each in found["rows"]] == [
            (3, rows[2]),
            (6, rows[3]),
        ]
        assert found["fields"] == [{"name": "text", "num_rows": 8, "kinds": ["text"], "example": "row 1"}]
        part = client.post("/api/v1/datasets:inspect", json={**asked, "max_rows": 2, "first_row": 1}).json()
        assert (part["num_rows"], part["complete"]) == (2, False)
        assert client.delete("/api/v1/datasets/seen@1").status_code == 204
        gone = client.post("/api/v1/datasets:inspect", json=asked)
        assert [each["field"] for each in gone.json()["violations"]] == ["dataset.path"]


def test_pages_need_the_scope_of_runs(world: World) -> None:
    with world.client("asker") as asker:  # may ask a teacher alone
        for path, body in (
            (CHECK, {"text": "a: 1"}),
            (ESTIMATE, {"text": "a: 1"}),
            ("/api/v1/datasets:inspect", {}),
            ("/api/v1/students:inspect", {}),
        ):
            refused = asker.post(path, json=body)
            assert (refused.status_code, refused.json()["reason"]) == (403, "PERMISSION_DENIED"), path
        for page in ("/runs/new", "/data", "/data/mine@1"):
            assert asker.get(page).status_code == 403
    with world.client("") as nobody:
        for page in ("/runs/new", "/data"):
            assert nobody.get(page).status_code == 303
        assert nobody.post(CHECK, json={"text": "a: 1"}).status_code == 401
