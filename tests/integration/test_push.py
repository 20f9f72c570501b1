"""`stillhouse run push`: a run's model in one commit on a hub that speaks the hub's protocol, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from stillhouse.client.api import RunHandle, Trainer
from tests.conftest import Models
from tests.student_trainer.config.specs import cross_entropy_spec
from tests.support.networks.stub_hub import OWNER, TOKEN, StubHub, stub_hub
from tests.support.runs import Service

SECRET_ENV = {
    "HF_TOKEN": TOKEN,
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


@pytest.fixture
def hub() -> Iterator[StubHub]:
    with stub_hub() as served:
        yield served


@pytest.fixture(scope="module")
def finished(trainer: Trainer, models: Models, dataset_file: Path) -> RunHandle:
    run = trainer.create_run(cross_entropy_spec(models.student, dataset_file))
    run.wait()
    return run


def push(
    service: Service, hub: StubHub, directory: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stillhouse.client", "--trainer", service.target, "run", "push", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=directory,
        env={**os.environ, **SECRET_ENV, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(directory / "hf")}
        | environment,
        check=False,
    )


def test_a_pushed_model_is_the_runs_own_in_one_commit_and_private(
    service: Service, hub: StubHub, finished: RunHandle, tmp_path: Path
) -> None:
    done = push(service, hub, tmp_path, finished.id, f"{OWNER}/tiny", "--license", "apache-2.0")
    assert done.returncode == 0, done.stderr
    assert f"private repository {OWNER}/tiny" in done.stdout
    repository = hub.repositories[f"{OWNER}/tiny"]
    assert repository["private"]
    assert repository["commits"] == [f"Run {finished.id}, final"]
    final = service.run_path(finished.name) / "final"
    own = {
        path.relative_to(final).as_posix(): path.read_bytes() for path in final.rglob("*") if path.is_file()
    }
    card = ModelCard(repository["files"].pop("README.md").decode())
    assert card.data["license"] == "apache-2.0"
    assert card.data["tags"] == ["stillhouse", "knowledge-distillation"]
    own.pop("README.md")
    assert repository["files"] == own
    assert (tmp_path / finished.id / "final" / "config.json").is_file()
    assert any("objects/batch" in each for each in hub.requests)

    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "secret.txt").write_text("mine")
    done = push(service, hub, tmp_path, finished.id, f"{OWNER}/open", "--public", "--json", "--to", "to")
    assert done.returncode == 0, done.stderr
    assert '"private": false' in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert hub.repositories[f"{OWNER}/open"]["files"].keys() == {*own, "README.md"}


@pytest.mark.parametrize(
    ("repo_id", "environment", "told"),
    [
        (f"{OWNER}/tiny", {"HF_TOKEN": ""}, "There is no token for the hub. Set HF_TOKEN"),
        (f"{OWNER}/tiny", {"HF_TOKEN": "wrong"}, "Set HF_TOKEN to a valid token"),
        ("others/tiny", {}, "Give HF_TOKEN a token that may write to others/tiny"),
        ("not/a/name", {}, "is no name of a repository"),
        (f"{OWNER}/tiny", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (f"{OWNER}/tiny", {"HF_ENDPOINT": "http://127.0.0.1:1"}, "was not reached"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_with_a_remedy(
    *,
    service: Service,
    hub: StubHub,
    finished: RunHandle,
    tmp_path: Path,
    repo_id: str,
    environment: dict[str, str],
    told: str,
) -> None:
    done = push(service, hub, tmp_path, finished.id, repo_id, **environment)
    assert done.returncode != 0
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert all(not each["files"] for each in hub.repositories.values())


def test_a_broken_upload_leaves_the_repository_as_it_was(
    service: Service, hub: StubHub, finished: RunHandle, tmp_path: Path
) -> None:
    hub.broken = "/commit/"
    done = push(service, hub, tmp_path, finished.id, f"{OWNER}/tiny")
    assert done.returncode != 0
    assert "Try again later" in done.stderr
    assert hub.repositories[f"{OWNER}/tiny"]["files"] == {}
    hub.broken = ""
    assert push(service, hub, tmp_path, finished.id, f"{OWNER}/tiny").returncode == 0
