"""Chromium in front of `stillhouse web`, a run service with tokens and a teacher, with runs of every outcome.

Every tab of `open_tab` fails its test for an error on its console, a script's exception, or a request to another host.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page

from stillhouse.protos.rpc.tokens import Scope, create
from tests.client.web.browser.tab import Tab
from tests.client.web.conftest import start_web
from tests.conftest import Models
from tests.support.chromium import chromium_path, is_required, start_chromium
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_trainer
from tests.support.runs import small_spec, wait_until

PEOPLE = {"ada": Scope.SUBMIT, "eve": Scope.SUBMIT, "root": Scope.ADMIN, "asker": Scope.INFER}
NO_TEACHER = "127.0.0.1:1"
ENDED = ("COMPLETED", "FAILED", "STOPPED")


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """The services behind the page, and what runs need."""

    url: str
    data_dir: Path
    teacher: str
    """Address of a teacher without tokens; the web server knows it as number 1."""
    student: Path
    rows: Path
    """JSONL with `prompt` and `completion`."""
    tokens: dict[str, str]
    """Token by person."""

    def spec(self, name: str, *, steps: int = 12, **changes: Any) -> dict[str, Any]:
        """A run of some seconds, evaluated before, between and after; `changes` are sections."""
        defaults = {"evaluation": {"every_steps": max(2, steps // 2)}, "checkpoint": {"every_steps": steps}}
        merged = {**defaults, **changes}
        labels = merged.pop("labels", {})
        spec = small_spec(
            student=self.student, train=self.rows, teacher=self.teacher, steps=steps, changes=merged
        )
        return {"display_name": name, "labels": labels, **spec}

    def client(self, person: str = "ada") -> httpx.Client:
        """A caller of the HTTP API."""
        headers = {"authorization": f"Bearer {self.tokens[person]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def create(self, spec: dict[str, Any], *, person: str = "ada") -> str:
        """Id of a new run."""
        with self.client(person) as client:
            response = client.post("/api/v1/runs", json={"spec": spec})
            assert response.status_code == 201, response.text
            name: str = response.json()["name"]
        return name.removeprefix("runs/")

    def run(self, run: str) -> dict[str, Any]:
        """The run as JSON."""
        with self.client() as client:
            found: dict[str, Any] = client.get(f"/api/v1/runs/{run}").json()
        return found

    def wait_ended(self, run: str) -> str:
        """The state in which it ended."""
        with self.client() as client, client.stream("GET", f"/api/v1/runs/{run}/events") as events:
            events.read()
        state: str = self.run(run)["state"]
        assert state in ENDED
        return state

    def pid(self, run: str, attempt: int = 1) -> int:
        """Process id of an attempt, once it has one."""
        path = self.data_dir / "runs" / run / "process.json"
        wait_until(lambda: path.exists() and json.loads(path.read_text())["attempt"] == attempt, "a process")
        return int(json.loads(path.read_text())["pid"])


@pytest.fixture(scope="session")
def site(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site")
    data = root / "data"
    data.mkdir()
    tokens = {
        name: create(data / "tokens.json", name=name, scopes=[scope], lifetime_s=None)[0]
        for name, scope in PEOPLE.items()
    }
    options = ["--stop-runs-on-exit", "--stop-grace-s", "10", "--cpu-slots", "2", "--allow-root", "/"]
    with (
        no_process_left() as mark,
        start_trainer(data, directory=root, options=options, environment=mark) as trainer,
        start_web(root, trainer.target, "--teacher", hf_teacher.target, environment=mark) as web,
    ):
        yield Site(
            url=web.target,
            data_dir=data,
            teacher=hf_teacher.target,
            student=models.student,
            rows=dataset_file,
            tokens=tokens,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Runs:
    """Ids of runs that have ended, or soon will."""

    first: str
    """Completed, with the label team=a."""
    second: str
    """Completed, with the label team=b and another learning rate."""
    failed: str
    """Without a teacher."""


@pytest.fixture(scope="session")
def runs(site: Site) -> Runs:
    made = Runs(
        failed=site.create(
            {**site.spec("no teacher", retry={"teacher_wait_s": 0}), "teachers": [{"targets": [NO_TEACHER]}]}
        ),
        first=site.create(site.spec("first", labels={"team": "a"})),
        second=site.create(site.spec("second", labels={"team": "b"}, optimizer={"learning_rate": 4e-3})),
    )
    states = [site.wait_ended(each) for each in (made.first, made.second, made.failed)]
    assert states == ["COMPLETED", "COMPLETED", "FAILED"]
    return made


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A browser. Its module has no async tests."""
    path = chromium_path()
    if path is None:
        if is_required():
            pytest.fail("CI needs Chromium for the tests of the page: apt-get install chromium")
        pytest.skip("chromium is not installed")
    with start_chromium(path) as browser:
        yield browser


OpenTab = Callable[..., Tab]


@pytest.fixture
def open_tab(chromium: Browser, site: Site) -> Iterator[OpenTab]:
    """Opens a path in a tab of its own: `open_tab("/", person="ada", width=390, scheme="dark", refusals=(403,))`.

    It is signed in as `person`; as nobody if that is empty. `refusals` are the statuses of responses that are expected.
    """
    with ExitStack() as stack:

        def open_one(
            path: str = "/",
            *,
            person: str = "ada",
            width: int = 1280,
            height: int = 900,
            scheme: Any = "light",
            refusals: tuple[int, ...] = (),
        ) -> Tab:
            context = chromium.new_context(
                base_url=site.url,
                viewport={"width": width, "height": height},
                color_scheme=scheme,
                reduced_motion="reduce",
            )
            stack.callback(context.close)
            if person:
                response = context.request.post("/api/v1/session", data={"token": site.tokens[person]})
                assert response.status == 201, response.text()
            page: Page = context.new_page()
            tab = Tab(page, site.url, refusals)
            stack.callback(tab.check)
            page.goto(path)
            return tab

        yield open_one
