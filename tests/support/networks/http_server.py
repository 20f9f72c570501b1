"""An HTTP server on a free port of this machine whose every answer is chosen by a test: also slow, endless and broken ones."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer; `body` is sent as JSON unless it is bytes, or an iterator of bytes, sent until the client leaves."""

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Received:
    """A request."""

    method: str
    path: str
    headers: Mapping[str, str]
    """By lower-case name."""
    body: Any
    """Content of a JSON body; None without one."""


@dataclass
class HttpServer:
    """A running server."""

    answer: Callable[[Received], Reply]
    url: str = ""
    requests: list[Received] = field(default_factory=list)
    asked: threading.Event = field(default_factory=threading.Event)
    """Set by the first request."""
    left: threading.Event = field(default_factory=threading.Event)
    """Set once a client has left in the middle of an answer."""


@contextmanager
def http_server(answer: Callable[[Received], Reply]) -> Iterator[HttpServer]:
    """Serves with `answer`, which may be replaced meanwhile; it is called in a thread of each connection."""
    state = HttpServer(answer)

    class Handler(_Handler):
        server_state = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_state: HttpServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._reply(None)

    def do_POST(self) -> None:
        self._reply(json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0))))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it
        pass

    def _reply(self, body: Any) -> None:
        state = self.server_state
        headers = {name.lower(): value for name, value in self.headers.items()}
        received = Received(method=self.command, path=self.path, headers=headers, body=body)
        state.requests.append(received)
        state.asked.set()
        reply = state.answer(received)
        content = reply.body
        if not isinstance(content, bytes | Iterator):
            content = json.dumps(content).encode()
        try:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if isinstance(content, bytes):
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                return
            self.send_header("Connection", "close")
            self.end_headers()
            for part in content:
                self.wfile.write(part)
            self.close_connection = True
        except OSError:  # the client left
            state.left.set()
            self.close_connection = True
