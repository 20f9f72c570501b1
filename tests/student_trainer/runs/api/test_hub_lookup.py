"""Hub ids of a run file: taken from the cache of the host or a hub that has them, refused at once elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from stillhouse.student_trainer.runs.api.hub_lookup import HubId, hub_problems

REVISION = "0" * 40
FILES = {
    "org/rows": ["train.jsonl"],
    "org/model": ["config.json", "model.safetensors"],
    "org/gguf": ["model.gguf"],
}
CODES = {"org/private": "GatedRepo", "org/model/revision/v9": "RevisionNotFound"}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that tells of models."""

    def do_GET(self) -> None:
        kind, _, name = self.path.removeprefix("/api/").partition("/")
        known = FILES.get(name.partition("/revision/")[0]) if name not in CODES else None
        known = known if (kind == "datasets") == name.startswith("org/rows") else None
        self.send_response(404 if known is None else 200)
        if known is None:
            self.send_header("X-Error-Code", CODES.get(name, "RepoNotFound"))
        body = json.dumps({"id": name, "siblings": [{"rfilename": each} for each in known or ()]}).encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "models--org--cached"
    (cached / "snapshots" / REVISION).mkdir(parents=True)
    (cached / "snapshots" / REVISION / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(REVISION)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever).start()
        online(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


def online(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)


def problem(name: str, revision: str = "") -> str:
    """The only problem of a model; empty if it has none."""
    found = hub_problems([HubId(field="student.model", name=name, revision=revision)])
    assert all(each.field == "student.model" for each in found)
    return found[0].description if found else ""


@pytest.mark.parametrize("name", ["nobody/nothing", "modles/student", "studnet"])
def test_offline_a_name_that_is_not_in_the_cache_is_refused_at_once(name: str) -> None:
    assert constants.HF_HUB_OFFLINE
    began = time.monotonic()
    assert problem(name) == (
        f'"{name}" is neither a directory on the trainer\'s host nor in its cache of Hugging Face models, and '
        "HF_HUB_OFFLINE keeps it from looking further; give a directory, or download the model there."
    )
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("name", "revision"), [("a--b", ""), ("a..b/c", ""), ("org/model", "x\0y")])
def test_a_name_that_the_hub_cannot_have_is_refused(name: str, revision: str) -> None:
    assert f'"{name}" is neither a directory on the trainer\'s host nor ' in problem(name, revision)


def test_a_model_in_the_cache_is_taken_offline() -> None:
    assert problem("org/cached") == ""
    assert problem("org/cached", "v9") != ""


@pytest.mark.usefixtures("hub")
def test_the_hub_has_what_the_cache_lacks_or_the_name_is_refused() -> None:
    assert problem("org/model") == problem("org/cached") == ""
    assert "nor a model that Hugging Face shows it; correct the path or the id" in problem("modles/student")
    assert "holds no config.json" in problem("org/gguf")
    assert "is gated on Hugging Face; accept its terms" in problem("org/private")
    assert 'has no revision "v9"' in problem("org/model", "v9")


def test_a_hub_that_is_not_reached_is_a_refusal_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch, "http://127.0.0.1:9")
    assert "and Hugging Face cannot be reached from there (" in problem("nobody/nothing")


def dataset_problem(name: str) -> str:
    found = hub_problems([HubId(field="data.train[0].path", name=name, kind="dataset")])
    return found[0].description if found else ""


@pytest.mark.usefixtures("hub")
def test_a_dataset_is_taken_from_a_hub_that_has_it() -> None:
    assert dataset_problem("org/rows") == ""
    assert "nor a dataset that Hugging Face shows it; correct the path or the id" in dataset_problem(
        "org/model"
    )


def test_a_dataset_that_was_prepared_before_is_taken_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "datasets" / "org___my_rows").mkdir(parents=True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    assert dataset_problem("org/MyRows") == ""
    assert dataset_problem("org/rows") == (
        '"org/rows" is neither a path on the trainer\'s host nor in its cache of Hugging Face datasets, and HF_HUB_OFFLINE '
        "keeps it from looking further; give a path, or download the dataset there."
    )
