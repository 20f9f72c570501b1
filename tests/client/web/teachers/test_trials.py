"""Prompts tried over HTTP have the teacher's own tokens and numbers; bad requests name their field; the page tells the load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest

from stillhouse.client.api import Teacher
from tests.client.web.conftest import start_web
from tests.conftest import Models
from tests.support.processes import no_process_left
from tests.support.programs import Program

PROMPT = "Number seven: "


@dataclass(frozen=True, kw_only=True, slots=True)
class Door:
    """The two ways to one teacher."""

    client: httpx.Client
    teacher: Teacher
    model: str


@pytest.fixture(scope="module")
def door(hf_teacher: Program, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    root = tmp_path_factory.mktemp("trials")
    options = ("--teacher", f"{hf_teacher.target},127.0.0.1:1")
    with (
        no_process_left() as mark,
        start_web(root, "127.0.0.1:1", *options, environment=mark) as web,
        httpx.Client(base_url=web.target, timeout=60) as client,
        Teacher(hf_teacher.target) as teacher,
    ):
        yield Door(client=client, teacher=teacher, model=str(models.teacher))


def events(text: str) -> list[tuple[str, Any]]:
    parts = [dict(line.split(": ", 1) for line in part.splitlines()) for part in text.strip().split("\n\n")]
    return [(part["event"], json.loads(part["data"])) for part in parts]


def test_a_continuation_streams_the_teachers_tokens_and_numbers(door: Door) -> None:
    [theirs] = door.teacher.complete([PROMPT], temperature=0, max_new_tokens=12, top_k_logprobs=5)
    sampling = {"temperature": 0, "max_new_tokens": 12}
    with door.client.stream(
        "POST", "/api/v1/teachers/1:generate", json={"text": PROMPT, "sampling": sampling, "top_k": 5}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, (last, end) = events(response.read().decode())
    assert {name for name, _ in chunks} == {"chunk"}
    assert (last, end) == ("end", {"prompt_tokens": theirs.prompt_tokens, "generated_tokens": 12})
    tokens = [token for _, chunk in chunks for token in chunk["tokens"]]
    assert "".join(chunk["text"] for _, chunk in chunks) == theirs.text
    assert chunks[-1][1]["finish_reason"] == theirs.finish
    assert [token["id"] for token in tokens] == theirs.token_ids.tolist()
    rows = theirs.distributions
    assert rows is not None
    assert [token["logprob"] for token in tokens] == pytest.approx(rows.target_logprobs.tolist(), abs=1e-6)
    assert [[each["id"] for each in token["top"]] for token in tokens] == rows.token_ids.tolist()
    tops = np.array([[each["logprob"] for each in token["top"]] for token in tokens])
    np.testing.assert_allclose(tops, rows.logprobs, atol=1e-6)
    assert [token["tail"] for token in tokens] == pytest.approx(rows.log_tail.tolist(), abs=1e-6)


def test_a_text_is_scored_from_a_position_on(door: Door) -> None:
    ids = [5, 9, 20, 31, 7]
    [theirs] = door.teacher.score([(0, ids)], top_k=3)
    told = door.client.post(
        "/api/v1/teachers/1:score", json={"token_ids": ids, "start": 2, "top_k": 3}
    ).json()
    assert told["start"] == 2
    assert [each["id"] for each in told["before"]] == ids[:2]
    assert [each["id"] for each in told["tokens"]] == ids[2:]
    assert theirs.distributions is not None
    own = theirs.distributions.target_logprobs[1:].tolist()
    assert [each["logprob"] for each in told["tokens"]] == pytest.approx(own, abs=1e-6)
    text = door.client.post("/api/v1/teachers/1:score", json={"text": PROMPT}).json()
    shown = [*text["before"], *text["tokens"]]
    assert "".join(each["text"] for each in shown).endswith(PROMPT)
    assert text["tokens"][0]["top"] == []


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("generate", {}, ""),
        ("generate", {"text": "a", "token_ids": [1]}, ""),
        ("generate", {"text": ""}, "text"),
        ("generate", {"text": "\ud800"}, "text"),
        ("generate", {"text": "a", "tools": []}, "text"),
        ("generate", {"messages": [{"role": 1}]}, "messages"),
        ("generate", {"text": "a", "num_samples": 65}, "num_samples"),
        ("generate", {"text": "a", "sampling": {"max_tokens": 3}}, ""),
        ("generate", {"text": "a", "sampling": [1]}, "sampling"),
        ("generate", {"text": "a", "top_k": True}, "top_k"),
        ("generate", {"text": "a", "adapter": 3}, "adapter"),
        ("generate", {"text": "a", "prompt": "b"}, "prompt"),
        ("score", {"token_ids": [1, 2**31]}, "token_ids"),
        ("score", {"token_ids": [1, 10**6]}, "token_ids"),
        ("score", {"token_ids": [3, 4], "start": 2}, "start"),
        ("score", {"token_ids": [3, 4], "top_k": 257}, "top_k"),
    ],
)
def test_a_bad_request_names_its_field(door: Door, path: str, body: Any, field: str) -> None:
    content = json.dumps(body).encode()
    kind = {"content-type": "application/json"}
    refused = door.client.post(f"/api/v1/teachers/1:{path}", content=content, headers=kind)
    problem = refused.json()
    assert refused.status_code == 400, problem
    assert refused.headers["content-type"] == "application/problem+json"
    if field:
        assert [each["field"].partition("[")[0] for each in problem["violations"]] == [field], problem


def test_what_is_not_there_is_a_problem_document(door: Door) -> None:
    for path, body, status in (
        ("/api/v1/teachers/3:score", {"text": "a b"}, 404),
        ("/api/v1/teachers/2:score", {"text": "a b"}, 503),
        ("/api/v1/teachers/1:generate", {"text": "a", "adapter": "none"}, 404),
        ("/api/v1/teachers/1:score", {"text": "x" * 1_100_000}, 413),
    ):
        refused = door.client.post(path, json=body)
        assert refused.status_code == status, refused.text
        assert refused.json()["remedy"]
    assert door.client.post("/api/v1/teachers/1:score?text=a", json={}).status_code == 400


def test_the_load_names_clients_and_the_page_shows_it(door: Door) -> None:
    before = door.client.get("/api/v1/teachers/1?load=true").json()["load"]
    assert door.client.post("/api/v1/teachers/1:score", json={"token_ids": [3, 4, 5, 6]}).status_code == 200
    load = door.client.get("/api/v1/teachers/1?load=true").json()["load"]
    assert load["tokens_scored"] == before["tokens_scored"] + 3
    assert any(each["scored_per_s"] > 0 for each in load["clients"] if "stillhouse-web" in each["name"])
    assert "load" not in door.client.get("/api/v1/teachers/1").json()
    page = door.client.get("/teachers")
    assert page.status_code == 200
    for text in (door.model, "stillhouse-web", "query logprobs", "127.0.0.1:1", "Try a prompt"):
        assert text in page.text, text
    part = door.client.get("/teachers/load", headers={"hx-request": "true"})
    assert door.model in part.text
    assert "<html" not in part.text
