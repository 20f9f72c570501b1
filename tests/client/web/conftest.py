"""A web server, as a process, in front of a real run service whose runs fail at once or wait."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from stillhouse.protos.rpc.tokens import Scope, create
from tests.student_trainer.runs.api.caller import model_of_no_kind
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_program, start_trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The two services."""

    trainer: Program
    web: Program
    root: Path
    tokens: dict[str, str]
    """Token by name."""

    def client(self, token: str = "ada", **options: Any) -> httpx.Client:
        """A caller with a token; without one if it is empty."""
        headers = {"authorization": f"Bearer {self.tokens[token]}"} if token else {}
        return httpx.Client(base_url=self.web.target, headers=headers, timeout=60, **options)

    def spec(self, **changes: Any) -> dict[str, Any]:
        """A run that fails at once, since its student is of no known kind."""
        return {
            "student": {"model": str(model_of_no_kind(self.root))},
            "data": {"train": [{"path": str(self.root / "rows.jsonl")}]},
            "loss": {"terms": [{"weight": 0}], "hard_weight": 1},
            **changes,
        }


def start_web(directory: Path, trainer: str, *options: str, environment: dict[str, str]) -> Program:
    """A `stillhouse web` on a free port."""
    arguments = ["stillhouse.client", "web", "--trainer", trainer, "--listen", "127.0.0.1:0", *options]
    config = {"XDG_CONFIG_HOME": str(directory)}
    return start_program("web", arguments, directory=directory, environment={**environment, **config})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("web")
    (root / "rows.jsonl").write_text('{"text": "a"}\n' * 8)
    data = root / "data"
    data.mkdir()
    scopes = {"ada": Scope.SUBMIT, "eve": Scope.SUBMIT, "root": Scope.ADMIN, "asker": Scope.INFER}
    tokens = {
        name: create(data / "tokens.json", name=name, scopes=[scope], lifetime_s=None)[0]
        for name, scope in scopes.items()
    }
    options = [
        "--stop-runs-on-exit",
        "--stop-grace-s",
        "1",
        "--max-upload-bytes",
        "3000000",
        "--allow-root",
        str(root),
    ]
    with (
        no_process_left() as mark,
        start_trainer(data, directory=root, options=options, environment=mark) as trainer,
        start_web(root, trainer.target, "--log-level", "debug", environment=mark) as web,
    ):
        yield World(trainer=trainer, web=web, root=root, tokens=tokens)
