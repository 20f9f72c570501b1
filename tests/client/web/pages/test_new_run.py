"""Pages of a new run and of datasets, in front of a real run service."""

from __future__ import annotations

import html
import re

import pytest
import yaml

from tests.client.web.conftest import World
from tests.client.web.pages.test_pages import HOSTILE, Page

KIND = {"content-type": "application/octet-stream"}


def text_of(page: str) -> str:
    found = re.search(r"<textarea id=\"yaml\"[^>]*>\n(.*?)</textarea>", page, re.S)
    assert found is not None
    return html.unescape(found[1])


def test_a_new_run_begins_with_the_teacher_and_the_dataset_that_is_named(world: World) -> None:
    with world.client() as client:
        text = text_of(client.get("/runs/new", params={"data": "datasets/mine@2"}).text)
        assert yaml.safe_load(text) == {
            "student": {"model": None},
            "teachers": [{"targets": ["127.0.0.1:7401"]}],
            "data": {"train": [{"path": "datasets/mine@2"}]},
        }
        hostile = client.get("/runs/new", params={"data": HOSTILE})
        assert ("<script>alert" in hostile.text, hostile.status_code) == (False, 200)
        assert yaml.safe_load(text_of(hostile.text))["data"]["train"] == [{"path": HOSTILE}]
        problems = client.post("/api/v1/run-files:check", json={"text": text}).json()["problems"]
        assert {each["field"] for each in problems} == {"student.model", "data.train[0].path"}
        assert client.get("/runs/new", params={"data": "x" * 201}).status_code == 400
        assert client.get("/runs/new", params={"of": "x"}).status_code == 400


def test_a_clone_has_the_settings_that_its_run_was_created_with(world: World) -> None:
    with world.client() as client:
        spec = world.spec(display_name=HOSTILE, labels={"team": "a: b"}, optimizer={"max_steps": 3})
        created = client.post("/api/v1/runs", json={"spec": spec})
        run = created.json()["name"].removeprefix("runs/")
        page = client.get("/runs/new", params={"from": run})
        assert "<script>alert" not in page.text
        text = text_of(page.text)
        assert text.startswith(f"# Settings of run {run}, ")
        assert yaml.safe_load(text) == spec
        checked = client.post("/api/v1/run-files:check", json={"text": text, "opened": text}).json()
        assert (checked["problems"], checked["command"]) == ([], "stillhouse run create run.yaml")
        again = client.post("/api/v1/runs", content=text, headers={"content-type": "application/yaml"})
        assert again.json()["spec"] == created.json()["spec"]
        assert f"/runs/new?from={run}" in Page(client.get(f"/runs/{run}").text).links()
        missing = client.get("/runs/new", params={"from": "a" * 12})
        assert (missing.status_code, "RUN_NOT_FOUND" in missing.text) == (404, True)


def test_datasets_are_listed_shown_and_deleted_unless_a_run_uses_them(world: World) -> None:
    with world.client() as client:
        query = {"file_name": "<b>.jsonl", "dataset_id": "listed", "num_rows": "2", "num_tokens": "1234"}
        for content in (b'{"text": "one"}\n', b'{"text": "two"}\n'):
            client.post("/api/v1/datasets", params=query, content=content, headers=KIND)
        listed = client.get("/data", params={"dataset_id": "listed"}).text
        assert [each for each in Page(listed).links() if each.startswith("/data/")] == [
            "/data/listed%402",
            "/data/listed%401",
        ]
        assert ("1,234" in listed, ">ada<" in listed, "<b>" in listed) == (True, True, False)
        assert "/data/listed%402" in client.get("/data").text
        assert client.get("/data", params={"page_token": "nothing"}).status_code == 400
        page = Page(client.get("/data/listed%402").text)
        (delete,) = [attrs for _, attrs in page.elements if attrs.get("id") == "delete"]
        assert (delete["data-url"], delete["data-repeat"]) == ("/api/v1/datasets/listed%402", "listed")
        assert "/runs/new?data=datasets/listed%402" in page.links()
        spec = world.spec(data={"train": [{"path": "datasets/listed@2"}]})
        run = client.post("/api/v1/runs", json={"spec": spec}).json()["name"]
        used = Page(client.get("/data/listed%402").text)
        assert f"/{run}" in used.links()
        assert not [attrs for _, attrs in used.elements if attrs.get("id") == "delete"]
        refused = client.delete("/api/v1/datasets/listed%402")
        assert (refused.status_code, refused.json()["reason"]) == (409, "DATASET_IN_USE")
        assert client.delete("/api/v1/datasets/listed%401").status_code == 204
        assert client.get("/data/listed%401").status_code == 404


@pytest.mark.parametrize("path", ["/runs/new", "/data", "/data/policy"])
def test_every_input_has_a_label_and_nothing_is_inline(world: World, path: str) -> None:
    with world.client() as client:
        query = {"file_name": "rows.jsonl", "dataset_id": "policy"}
        client.post("/api/v1/datasets", params=query, content=b'{"text": "policy"}\n', headers=KIND)
        shown = client.get(path)
        assert shown.status_code == 200, shown.text
        page = Page(shown.text)
        assert page.scripts == ""
        labelled = {attrs["for"] for tag, attrs in page.elements if tag == "label"}
        for tag, attrs in page.elements:
            assert not [name for name in attrs if name == "style" or name.startswith("on")], tag
            if tag in ("input", "select", "textarea"):
                assert attrs.get("id") in labelled or "aria-labelledby" in attrs or "aria-label" in attrs, (
                    attrs
                )
        for link in page.links():
            if link.startswith("/static/"):
                assert client.get(link).status_code == 200, link
        scripts = [
            attrs["src"] for tag, attrs in page.elements if tag == "script" and "/own/" in attrs["src"]
        ]
        assert scripts
        for script in scripts:
            for imported in re.findall(r'from "(\.[^"]+)"', client.get(script).text):
                assert client.get(str(client.base_url.join(script).join(imported))).status_code == 200
