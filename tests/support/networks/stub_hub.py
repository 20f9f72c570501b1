"""A model hub on a free port of this machine: repositories, preupload, git-lfs batches and commits, as huggingface_hub asks."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stub"
OWNER = "me"
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")


@dataclass
class StubHub:
    """The content of the hub."""

    endpoint: str = ""
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Repository to its visibility, its files by name and its commits."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Uploaded large files by SHA-256."""
    broken: str = ""
    """Part of a path at which requests are answered 500."""
    requests: list[str] = field(default_factory=list)


@contextmanager
def stub_hub() -> Iterator[StubHub]:
    """Serves a hub without repositories."""
    hub = StubHub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: StubHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = self._parts()
        if parts[:2] == ["api", "models"] and len(parts) in (4, 6):
            name = "/".join(parts[2:4])
            repository = self.state.repositories.get(name)
            if self._allowed() and self._found(repository is not None):
                assert repository is not None
                sha = f"{len(repository['commits']):040x}"
                self._send(
                    {"id": name, "private": repository["private"], "sha": sha, "siblings": [], "tags": []}
                )
            return
        self._found(False)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self._allowed():
            return
        parts = self._parts()
        if self.state.broken and self.state.broken in self.path:
            self._send({"error": "out of order"}, status=500)
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif "preupload" in parts:
            files = json.loads(body)["files"]
            self._send(
                {
                    "files": [
                        {
                            "path": each["path"],
                            "uploadMode": "lfs" if each["path"].endswith(LFS_SUFFIXES) else "regular",
                            "shouldIgnore": False,
                        }
                        for each in files
                    ]
                }
            )
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif "commit" in parts:
            self._commit("/".join(parts[2:4]), body)
        else:
            self._found(False)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self._parts()[-1]
        assert hashlib.sha256(content).hexdigest() == oid
        self.state.objects[oid] = content
        self._send({})

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked.get("organization") or OWNER
        if owner != OWNER:
            self._send({"error": f"you cannot write to {owner}"}, status=403)
            return
        name = f"{owner}/{asked['name']}"
        is_new = name not in self.state.repositories
        private = asked.get("private", asked.get("visibility") == "private")
        self.state.repositories.setdefault(name, {"private": private, "files": {}, "commits": []})
        self._send(
            {"url": f"{self.state.endpoint}/{name}", "name": name, "id": name}, status=200 if is_new else 409
        )

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for each in asked["objects"]:
            upload = {"href": f"{self.state.endpoint}/objects/{each['oid']}", "header": {}}
            known = each["oid"] in self.state.objects
            objects.append({**each, **({} if known else {"actions": {"upload": upload}})})
        self._send({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        repository = self.state.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository["files"][value["path"]] = self.state.objects[value["oid"]]
            else:
                repository["commits"].append(value["summary"])
        number = f"{len(repository['commits']):040x}"
        self._send(
            {
                "commitUrl": f"{self.state.endpoint}/{name}/commit/{number}",
                "commitOid": number,
                "success": True,
            }
        )

    def _parts(self) -> list[str]:
        self.state.requests.append(f"{self.command} {self.path}")
        return self.path.partition("?")[0].strip("/").split("/")

    def _allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._send({"error": "Invalid credentials"}, status=401)
        return False

    def _found(self, is_found: bool) -> bool:
        if not is_found:
            self._send({"error": "Repository not found"}, status=404)
        return is_found

    def _send(self, value: Any, *, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Writes nothing."""
