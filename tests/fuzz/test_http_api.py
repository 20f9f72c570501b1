"""Requests to the HTTP API, made from its OpenAPI document and against it: no server error, no response that it does not describe."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable

from tests.client.web.conftest import start_web
from tests.conftest import Models
from tests.fuzz.conftest import SEED, scaled, show
from tests.student_trainer.runs.api.caller import model_of_no_kind
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_trainer

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
NO_TEACHER = ("/api/v1/teachers/{", "/v1/")
"""Beginnings of paths that are unavailable without a teacher."""


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URL of a web server, and the id of a run that has failed."""
    root = tmp_path_factory.mktemp("fuzz-web")
    (root / "rows.jsonl").write_text('{"text": "a"}\n')
    spec = {
        "student": {"model": str(model_of_no_kind(root))},
        "data": {"train": [{"path": str(root / "rows.jsonl")}]},
        "loss": {"terms": [{"weight": 0}], "hard_weight": 1},
    }
    options = ["--stop-runs-on-exit", "--max-queued-runs", "60", "--log-level", "warning"]
    with (
        no_process_left() as mark,
        start_trainer(root / "data", directory=root, options=options, environment=mark) as trainer,
        start_web(root, trainer.target, "--log-level", "warning", environment=mark) as web,
    ):
        run = httpx.post(f"{web.target}/api/v1/runs", json={"spec": spec}).json()["name"]
        httpx.get(f"{web.target}/api/v1/{run}/events", timeout=60)
        yield web.target, run.removeprefix("runs/")
        assert "internal error" not in web.log(1_000_000)


@pytest.mark.slow
def test_every_response_is_one_of_the_document(api: tuple[str, str]) -> None:
    from schemathesis import GenerationMode

    url, run = api
    counts: Counter[str] = Counter()
    schema: Any = schemathesis.openapi.from_url(f"{url}/api/v1/openapi.json")
    for each in schema.get_all_operations():
        operation = each.ok()
        if operation.path.startswith(NO_TEACHER):
            continue
        known: list[dict[str, str] | None] = [None]
        if "{run}" in operation.path and operation.method != "delete":
            known.append({"run": run})
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            for parameters in known:
                attack(operation, mode, parameters, counts)
    show("HTTP API", (f"{status} {number}" for status, number in sorted(counts.items())))
    assert counts["200"]


@pytest.fixture(scope="module")
def door(
    hf_teacher: Program, models: Models, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """URL of a web server in front of a teacher, with a folder for batches, and the teacher's model."""
    root = tmp_path_factory.mktemp("fuzz-openai")
    options = ("--teacher", hf_teacher.target, "--batch-dir", str(root / "kept"), "--log-level", "warning")
    with no_process_left() as mark, start_web(root, "127.0.0.1:1", *options, environment=mark) as web:
        yield web.target, str(models.teacher)
        assert "internal error" not in web.log(1_000_000)


@pytest.mark.slow
def test_every_response_of_openais_paths_is_one_of_the_document(door: tuple[str, str]) -> None:
    from schemathesis import GenerationMode

    url, model = door
    counts: Counter[str] = Counter()
    content = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "b"}}'
    files: dict[str, tuple[str | None, bytes]] = {"file": ("in.jsonl", content), "purpose": (None, b"batch")}
    file = httpx.post(f"{url}/v1/files", files=files).json()["id"]
    created = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = httpx.post(f"{url}/v1/batches", json=created).json()["id"]

    def small(case: Any) -> None:
        """Names what is there, and keeps answers short."""
        body = case.body
        if not isinstance(body, dict):
            return
        names = {"model": model, "input_file_id": file}
        body.update({name: names[name] for name in names if isinstance(body.get(name), str)})
        for name, most in (("max_tokens", 3), ("max_completion_tokens", 3), ("n", 2)):
            if isinstance(body.get(name), int):
                body[name] = min(body[name], most)
        if "messages" in body and "max_tokens" not in body:
            body.setdefault("max_completion_tokens", 2)

    schema: Any = schemathesis.openapi.from_url(f"{url}/api/v1/openapi.json")
    for each in schema.get_all_operations():
        operation = each.ok()
        if not operation.path.startswith("/v1/"):
            continue
        known: list[dict[str, str] | None] = [None]
        for name, value in (("model", model), ("file", file), ("batch", batch)):
            if f"{{{name}}}" in operation.path and operation.method != "delete":
                known.append({name: value})
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            for parameters in known:
                attack(operation, mode, parameters, counts, small)
    show("OpenAI's API", (f"{status} {number}" for status, number in sorted(counts.items())))
    assert counts["200"]


def attack(
    operation: Any,
    mode: Any,
    parameters: dict[str, str] | None,
    counts: Counter[str],
    change: Callable[[Any], None] = lambda _: None,
) -> None:
    """Sends some requests, and checks every response."""
    from schemathesis import checks

    expected = [
        getattr(checks, name)
        for name in (
            "not_a_server_error",
            "status_code_conformance",
            "content_type_conformance",
            "response_schema_conformance",
        )
    ]

    @seed(int(SEED))
    @settings(
        max_examples=scaled(3, 300),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        if parameters is not None:
            case.path_parameters.update(parameters)
        change(case)
        response = case.call()
        counts[str(response.status_code)] += 1
        case.validate_response(response, checks=expected)

    with contextlib.suppress(Unsatisfiable):  # an operation without parameters has no wrong ones
        send()


@pytest.mark.slow
def test_prompts_of_any_kind_get_a_response_of_the_document(hf_teacher: Program, tmp_path: Path) -> None:
    from schemathesis import GenerationMode

    counts: Counter[str] = Counter()
    options = ("--teacher", hf_teacher.target, "--log-level", "warning")
    with no_process_left() as mark, start_web(tmp_path, "127.0.0.1:1", *options, environment=mark) as web:
        schema: Any = schemathesis.openapi.from_url(f"{web.target}/api/v1/openapi.json")
        for each in schema.get_all_operations():
            operation = each.ok()
            if operation.path.startswith(NO_TEACHER) and ":" in operation.path:
                for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                    attack(operation, mode, {"teacher": "1"}, counts)
        assert "internal error" not in web.log(1_000_000)
    show("prompts over HTTP", (f"{status} {number}" for status, number in sorted(counts.items())))
    assert counts["200"]
