"""Examples and caches of runs, as JSON and as pages, from files that a training process leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.protos.evaluation.examples import FOLDER, FORMAT, INDEX, MAX_BYTES, place_of
from tests.client.web.conftest import World

HOSTILE = "<script>alert(1)</script>"


def ended_run(world: World, **changes: Any) -> tuple[str, Path]:
    """Id and directory of a run that has failed."""
    with world.client() as client:
        created = client.post("/api/v1/runs", json={"spec": world.spec(**changes)})
        assert created.status_code == 201, created.text
        with client.stream("GET", f"{created.headers['location']}/events") as events:
            events.read()
    name: str = created.json()["name"]
    return name.removeprefix("runs/"), world.root / "data" / name


def examples(step: int) -> dict[str, Any]:
    target = {"at": 1, "kl": 0.5, "student_logprob": -1.0, "teacher_logprob": -0.5, "student_tail": -2.0}
    row = {
        "set": "",
        "number": 0,
        "place": HOSTILE,
        "begin": 0,
        "num_tokens": 2,
        "tokens": [3, 4],
        "texts": ["a", HOSTILE],
        "targets": [{**target, "teacher_tail": None, "top": [[4, -0.5, -1.0], [5, None, -1.5]]}],
    }
    return {
        "format": FORMAT,
        "step": step,
        "subject": "before",
        "top_k": 10,
        "teacher_top_k": 64,
        "from_cache": False,
        "left_out": 0,
        "rows": [row],
        "texts": {"4": "b", "5": "c"},
    }


@pytest.fixture(scope="module")
def run(world: World) -> tuple[str, Path]:
    """A run with the examples of one evaluation, and broken ones of others."""
    run_id, path = ended_run(world)
    (path / FOLDER).mkdir(parents=True)
    entries = [{"step": 0, "subject": "before", "path": place_of(0), "kl": 0.5}]
    (path / INDEX).write_text(json.dumps({"format": FORMAT, "evaluations": entries}))
    (path / place_of(0)).write_text(json.dumps(examples(0)))
    (path / place_of(1)).write_text("[")
    (path / place_of(2)).write_text(json.dumps({**examples(2), "format": FORMAT + 1}))
    (path / place_of(3)).write_bytes(b" " * (MAX_BYTES + 1))
    return run_id, path


def test_examples_are_read_and_bad_files_told(world: World, run: tuple[str, Path]) -> None:
    run_id, _ = run
    url = f"/api/v1/runs/{run_id}/examples"
    with world.client() as client:
        assert [each["step"] for each in client.get(url).json()["evaluations"]] == [0]
        assert client.get(f"{url}/0").json() == examples(0)
        for step, status, reason in (
            ("1", 500, "CHECKPOINT_CORRUPT"),
            ("2", 500, "CHECKPOINT_CORRUPT"),
            ("3", 500, "CHECKPOINT_CORRUPT"),
            ("4", 404, "ARTIFACT_NOT_FOUND"),
            ("-1", 400, "INVALID_REQUEST"),
            ("index", 400, "INVALID_REQUEST"),
        ):
            told = client.get(f"{url}/{step}")
            assert (told.status_code, told.json()["reason"]) == (status, reason), step
        assert client.get("/api/v1/runs/aaaaaaaaaaaa/examples").status_code == 404
        assert client.get(f"{url}?step=0").status_code == 400
        assert place_of(0) in [
            each["path"] for each in client.get(url.replace("examples", "artifacts")).json()["artifacts"]
        ]
    with world.client("asker") as asker:
        assert asker.get(url).status_code == 403
    other, _ = ended_run(world)
    with world.client() as client:
        assert client.get(f"/api/v1/runs/{other}/examples").json()["evaluations"] == []


def test_the_page_holds_what_a_browser_needs(world: World, run: tuple[str, Path]) -> None:
    run_id, _ = run
    with world.client() as client:
        shown = client.get(f"/runs/{run_id}/tokens")
        assert shown.status_code == 200
        for part in (f'data-run="{run_id}"', 'id="step" type="range"', 'role="status"', "level-7"):
            assert part in shown.text, part
        assert f"/runs/{run_id}/tokens" in client.get(f"/runs/{run_id}").text
        off, _ = ended_run(world, evaluation={"examples": 0})
        assert "evaluation.examples" in client.get(f"/runs/{off}/tokens").text
        assert f"/runs/{off}/tokens" not in client.get(f"/runs/{off}").text
        assert client.get("/runs/aaaaaaaaaaaa/tokens").status_code == 404


def test_caches_are_listed_with_what_their_builds_tell(world: World) -> None:
    teachers = [{"targets": ["127.0.0.1:1"]}]
    loss = {"terms": [{"divergence": "forward_kl"}]}
    built, path = ended_run(
        world,
        task="cache",
        cache={"path": "caches/mine"},
        teachers=teachers,
        loss=loss,
    )
    later, _ = ended_run(
        world, cache={"path": "caches/mine", "mode": "only"}, loss=loss, display_name=HOSTILE
    )
    other, _ = ended_run(world, cache={"path": "caches/other", "mode": "only"}, loss=loss)
    with world.client() as client:
        assert client.get(f"/api/v1/runs/{built}/cache").status_code == 404
        assert "once its build has ended" in client.get("/caches").text
        kind = {"model": HOSTILE, "teacher_fingerprint": "f" * 64, "top_k": 64, "logprob_dtype": "float16"}
        totals = {"sequences": 1234, "tokens": 56789, "bytes": 5_000_000, "bytes_per_token": 88.1}
        contents = {"kinds": [{**kind, **totals}, "odd"], **totals, "broken": [{"name": "a", "why": "cut"}]}
        (path / "exports").mkdir(exist_ok=True)
        (path / "exports/cache.json").write_text(json.dumps(contents))
        listed = {each["path"]: each for each in client.get("/api/v1/caches").json()["caches"]}
        assert (listed["caches/mine"]["last_run"], listed["caches/mine"]["build"]) == (later, built)
        assert (listed["caches/other"]["last_run"], listed["caches/other"]["build"]) == (other, None)
        assert listed["caches/mine"]["num_runs"] == 2
        assert client.get(f"/api/v1/runs/{built}/cache").json() == contents
        shown = client.get("/caches")
        for text in ("caches/mine", "56,789", "88.1", "f" * 64, "top-64, float16", "Damaged: cut"):
            assert text in shown.text, text
        assert HOSTILE not in shown.text
        (path / "exports/cache.json").write_text('{"kinds": 3, "tokens": "many", "bytes": null}')
        assert client.get("/caches").status_code == 200
        (path / "exports/cache.json").write_text("{")
        assert "is not JSON" in client.get("/caches").text


def test_no_page_is_shown_to_strangers(world: World, run: tuple[str, Path]) -> None:
    run_id, _ = run
    with world.client("") as nobody:
        for path in (f"/runs/{run_id}/tokens", "/caches"):
            led = nobody.get(path)
            assert (led.status_code, led.headers["location"].partition("?")[0]) == (303, "/sign-in")
