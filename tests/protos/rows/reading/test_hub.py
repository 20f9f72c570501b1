"""Datasets of a hub: read through its protocol from HF_ENDPOINT, and from the library's cache once it is offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

SHA = "1" * 40
FILES = {
    "train.jsonl": b'{"question": "q", "answer": "a"}\n{"question": "r", "answer": "b"}\n',
    "test.jsonl": b'{"question": "s", "answer": "c"}\n',
}
READ = """
import json, sys
from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rows.reading.source import RowReader, RowSource
said = []
for location, split in (("org/rows", "train"), ("org/rows", "tset"), ("org/rows", ""), ("org/none", "train")):
    columns = {"prompt": "question", "completion": "answer"}
    try:
        said.append([row for _, row in RowReader(RowSource(location=location, split=split, columns=columns))])
    except StillhouseError as error:
        said.append(str(error))
print(json.dumps(said))
print("torch" in sys.modules, file=sys.stderr)
"""


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API by which the library datasets finds and fetches files."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path in (
            "/api/datasets/org/rows",
            f"/api/datasets/org/rows/revision/{SHA}",
            "/api/datasets/org/rows/revision/main",
        ):
            self.answer({"id": "org/rows", "sha": SHA, "siblings": [{"rfilename": name} for name in FILES]})
        elif path.startswith("/api/datasets/org/rows/tree/"):
            self.answer([self.entry(name) for name in FILES])
        else:
            self.file(path)

    def do_HEAD(self) -> None:
        self.file(urlsplit(self.path).path)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        asked = (
            json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
        )
        self.answer([self.entry(name) for name in FILES if name in asked])

    def entry(self, name: str) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(FILES[name]), "oid": f"{len(name):040x}"}

    def file(self, path: str) -> None:
        name = path.rpartition("/")[2]
        if not path.startswith("/datasets/org/rows/resolve/") or name not in FILES:
            kind = "EntryNotFound" if "/org/rows/" in path else "RepoNotFound"
            self.send_response(404)
            self.send_header("X-Error-Code", kind)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.answer(FILES[name])

    def answer(self, content: Any) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{len(body)}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def read(home: Path, **environment: str) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-c", READ],
        env=os.environ | {"HF_HOME": str(home), **environment},
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "False", "torch was imported"
    said: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_rows_come_from_the_hub_and_offline_from_its_cache(hub: str, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": "r", "completion": "b"}]
    found, wrong, several, none = read(tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="0")
    assert found == rows
    assert wrong.startswith(
        "org/rows (split tset) is neither a path nor a dataset that Hugging Face gives here"
    )
    assert "train" in wrong
    assert (
        several == "org/rows holds several splits; name one of train, test with split, as in `split: train`."
    )
    assert none.startswith(
        "org/none (split train) is neither a path nor a dataset that Hugging Face gives here"
    )

    found, _, _, none = read(tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert found == rows
    assert "HF_HUB_OFFLINE keeps it from looking further" in none
