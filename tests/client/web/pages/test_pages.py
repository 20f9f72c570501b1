"""The pages in front of a real run service: content, escaping, security policy, and files that browsers keep."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import pytest

from stillhouse.client.web.static import files
from tests.client.web.conftest import World

HOSTILE = "<script>alert(1)</script>\"'{{ 7*7 }}"
LINKS = ("src", "href", "action", "hx-get", "hx-post", "data-url", "data-then", "formaction", "poster")


class Page(HTMLParser):
    """Elements of an HTML document."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.scripts = ""
        self._within = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._within = tag

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within in ("script", "style"):
            self.scripts += data.strip()

    def links(self) -> list[str]:
        return [attrs[name] for _, attrs in self.elements for name in LINKS if name in attrs]


@pytest.fixture(scope="module")
def runs(world: World) -> list[str]:
    """Ids of two runs that have failed; names and labels of the first are hostile."""
    wanted = ((HOSTILE, "<img src=x onerror=alert(1)>", 1e-3), ("plain", "b", 2e-3))
    return [
        _failed_run(world, display_name=name, labels={"team": label}, optimizer={"learning_rate": rate})
        for name, label, rate in wanted
    ]


def _failed_run(world: World, **changes: Any) -> str:
    """Id of a run whose process is killed before it loads anything, with the metrics of one step."""
    with world.client() as client:
        created = client.post("/api/v1/runs", json={"spec": world.spec(**changes)})
        assert created.status_code == 201, created.text
        name: str = created.json()["name"]
        folder = world.root / "data" / name
        while not (folder / "process.json").exists():
            time.sleep(0.02)
        pid = json.loads((folder / "process.json").read_text())["pid"]
        os.kill(pid, signal.SIGSTOP)
        line = {"sequence": 1, "attempt": 1, "time": "2026-01-01T00:00:00Z", "step": 1}
        values = {"train/loss": changes["optimizer"]["learning_rate"] * 1e3, "eval/kl": 0.25}
        (folder / "metrics.jsonl").write_text(json.dumps({**line, "values": values}) + "\n")
        os.kill(pid, signal.SIGKILL)
        with client.stream("GET", f"{created.headers['location']}/events") as events:
            events.read()
    return name.removeprefix("runs/")


@pytest.fixture(scope="module")
def browser(world: World) -> Iterator[httpx.Client]:
    """A caller with the session cookie of ada."""
    with world.client("") as client:
        assert client.post("/api/v1/session", json={"token": world.tokens["ada"]}).status_code == 201
        yield client


def paths_of(runs: list[str]) -> list[str]:
    first, second = runs
    run = f"/runs/{first}"
    return [
        "/",
        "/sign-in",
        run,
        f"{run}/head",
        f"{run}/artifacts",
        f"{run}/tokens",
        "/caches",
        "/teachers",
        f"/compare?run={first}&run={second}",
    ]


def test_a_page_asks_for_all_of_its_modules_at_once() -> None:
    modules = {name: content.decode() for name, content in files.contents().items() if name.endswith(".js")}
    for name, content in modules.items():
        imported = [
            line for line in content.splitlines() if name.startswith("own/") and line.startswith("import ")
        ]
        known = files.imports_of(name)
        assert set(known) <= set(modules)
        assert all(any(each.rpartition("/")[2] in line for each in known) for line in imported), name
    assert "own/series.js" in files.imports_of("own/run.js")


def test_every_page_keeps_a_strict_policy_and_this_host(
    world: World, browser: httpx.Client, runs: list[str]
) -> None:
    for path in [*paths_of(runs), "/runs/aaaaaaaaaaaa", "/?state=ASLEEP"]:
        shown = browser.get(path)
        assert shown.headers["content-type"] == "text/html; charset=utf-8", path
        policy = shown.headers["content-security-policy"]
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert shown.headers["cache-control"] == "no-store"
        page = Page(shown.text)
        assert page.scripts == "", path
        for tag, attrs in page.elements:
            assert not [name for name in attrs if name == "style" or name.startswith("on")], (path, tag)
        for link in page.links():
            assert urlsplit(urljoin(world.web.target, link)).netloc == urlsplit(world.web.target).netloc, link
            if link.startswith("/static/"):
                assert browser.get(link).status_code == 200, link
    for name, content in files.contents().items():
        if name.startswith("own/") and not name.endswith(".svg"):
            assert not re.search(rb"https?://|@import|url\(|innerHTML =|eval\(", content), name


def test_names_and_labels_are_text(browser: httpx.Client, runs: list[str]) -> None:
    for path in paths_of(runs)[:3] + paths_of(runs)[-1:]:
        if path == "/sign-in":
            continue
        shown = browser.get(path).text
        assert "<script>alert" not in shown
        assert "<img" not in shown
        assert "&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;{{ 7*7 }}" in shown, path
    answer = browser.get("/", params={"text": '"><script>alert(1)</script>'})
    assert (answer.status_code, "<script>alert" in answer.text) == (200, False)


def test_the_list_is_filtered_and_paged(browser: httpx.Client, runs: list[str]) -> None:
    def listed(**query: str) -> list[str]:
        shown = browser.get("/", params=query)
        assert shown.status_code == 200, shown.text
        return [each["value"] for tag, each in Page(shown.text).elements if each.get("type") == "checkbox"]

    assert listed() == runs[::-1]
    assert listed(state="FAILED", label="team") == runs[::-1]
    assert listed(label="team=b") == runs[1:]
    assert listed(text="PLAIN") == runs[1:]
    assert listed(text=runs[0]) == runs[:1]
    assert listed(state="RUNNING") == listed(label="team=c") == listed(text="absent") == []
    for query in ("state=ASLEEP", "page_token=nothing", "page=1", f"text={'x' * 201}"):
        refused = browser.get(f"/?{query}")
        assert (refused.status_code, "What to do" in refused.text) == (400, True), query


def test_a_failed_run_says_first_why_and_what_to_do(browser: httpx.Client, runs: list[str]) -> None:
    run = browser.get(f"/api/v1/runs/{runs[1]}").json()
    reason = browser.get(f"/api/v1/errors/{run['error']['reason']}").json()
    shown = browser.get(f"/runs/{runs[1]}").text
    plain = (
        re.sub("</?code>", "`", shown)
        .replace("&#39;", "'")
        .replace("&#34;", '"')
        .replace("&gt;", ">")
        .replace("&lt;", "<")
    )
    assert "<code>stillhouse run logs" in shown
    places = [plain.index(run["error"]["message"]), plain.index(reason["remedy"]), plain.index("Curves")]
    assert places == sorted(places)
    ids = {attrs.get("id") for _, attrs in Page(shown).elements}
    assert ids >= {"resume", "delete", "log", "charts", "attempts", "smoothing", "log-scale"}
    assert "stop" not in ids
    written = [
        name
        for mark, name in re.findall(r'<tr( class="written")?><th scope="row"><code>([^<]+)', shown)
        if mark
    ]
    assert "optimizer.learning_rate" in written
    assert "student.model" in written
    assert "data.seed" not in written


def test_runs_are_compared_by_what_differs(browser: httpx.Client, runs: list[str]) -> None:
    shown = browser.get("/compare", params={"run": runs})
    assert ("optimizer.learning_rate" in shown.text, "0.002" in shown.text) == (True, True)
    assert "optimizer.weight_decay" not in shown.text
    rows = re.findall(r"<code>(eval/kl|train/loss)</code></th>(.*?)</tr>", shown.text)
    values = [(name, re.findall(r"<td class=\"value\">(.*?)</td>", rest)) for name, rest in rows]
    assert values == [("eval/kl", ["0.25", "0.25"]), ("train/loss", ["1", "2"])]
    for chosen in ([], runs[:1], [f"{'a' * 11}{each}" for each in "abcdefghi"]):
        refused = browser.get("/compare", params={"run": chosen})
        assert (refused.status_code, "choose 2 to 8" in refused.text) == (400, True)
    assert browser.get("/compare", params={"run": [runs[0], "aaaaaaaaaaaa"]}).status_code == 404


def test_actions_need_the_token_of_the_page(browser: httpx.Client, runs: list[str]) -> None:
    page = Page(browser.get(f"/runs/{runs[0]}").text)
    (token,) = [attrs["content"] for _, attrs in page.elements if attrs.get("name") == "csrf-token"]
    (delete,) = [attrs for _, attrs in page.elements if attrs.get("id") == "delete"]
    stop = f"/api/v1/runs/{runs[0]}:stop"
    assert (delete["data-method"], delete["data-repeat"]) == ("DELETE", runs[0])
    assert browser.delete(delete["data-url"]).status_code == 403
    assert browser.post(stop, headers={"x-csrf-token": "other"}).status_code == 403
    assert browser.post(stop, headers={"x-csrf-token": token}).json()["reason"] == "RUN_STATE"


def test_whom_nothing_proves_is_sent_to_sign_in(world: World, runs: list[str]) -> None:
    with world.client("") as nobody:
        assert (nobody.get("/runs/a?x=1").status_code, nobody.get("/sign-in").status_code) == (400, 200)
        sent = nobody.get("/?text=a%26b")
        assert (sent.status_code, sent.headers["location"]) == (303, "/sign-in?next=%2F%3Ftext%3Da%2526b")
        part = nobody.get(f"/runs/{runs[0]}/head", headers={"hx-request": "true"})
        assert (part.status_code, part.headers["hx-redirect"], part.content) == (401, "/sign-in", b"")
        wrong = nobody.get("/", headers={"authorization": "Bearer sth_aaaaaaaa_wrong"})
        assert (wrong.status_code, wrong.headers["www-authenticate"]) == (
            401,
            "Bearer",
        )  # the guard counts it
    with world.client("asker") as asker:  # may ask a teacher alone
        refused = asker.get("/")
        assert (refused.status_code, "PERMISSION_DENIED" in refused.text) == (403, True)


def test_files_are_kept_for_good_below_their_digest(world: World) -> None:
    types = {
        "own/app.css": "text/css",
        "own/run.js": "text/javascript",
        "vendor/htmx.min.js": "text/javascript",
    }
    with world.client("") as nobody:
        for name, kind in types.items():
            found = nobody.get(files.url_of(name))
            assert found.headers["content-type"].startswith(kind)
            assert found.headers["cache-control"] == "public, max-age=31536000, immutable"
            assert found.content == files.contents()[name]
        known = files.digest()
        for path in (
            "0" * 16 + "/own/app.css",
            f"{known}/own/none.js",
            f"{known}/../files.py",
            f"{known}/%2e%2e/files.py",
        ):
            assert nobody.get(f"/static/{path}").status_code == 404, path
        assert nobody.get("/favicon.ico").headers["location"] == files.url_of("own/icon.svg")
