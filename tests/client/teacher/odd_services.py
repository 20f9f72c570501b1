"""Faulty servers that break off, repeat themselves or lie, and a TCP proxy that can be cut."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import grpc
from grpc_status import rpc_status

from stillhouse.protos.errors import StillhouseError, to_status
from stillhouse.protos.stillhouse.v1.run_pb2_grpc import RunServiceServicer, add_RunServiceServicer_to_server
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import (
    TeacherServiceServicer,
    add_TeacherServiceServicer_to_server,
)

Answer = Callable[[Any], Iterator[Any]]


class _Scripted:
    """Serves each rpc with the function of its name; a StillhouseError that it raises becomes the status."""

    def __init__(self, answers: dict[str, Answer]) -> None:
        self._answers = answers

    def __getattribute__(self, name: str) -> Any:
        answers: dict[str, Answer] = object.__getattribute__(self, "_answers")
        if name not in answers:
            return object.__getattribute__(self, name)

        def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                yield from answers[name](request)
            except StillhouseError as error:
                context.abort_with_status(rpc_status.to_status(to_status(error)))

        def unary(request: Any, context: grpc.ServicerContext) -> Any:
            return next(stream(request, context))

        return stream if name in STREAMS else unary


STREAMS = {"WatchRun", "StreamLogs", "DownloadArtifact", "GetTokenizer", "Generate", "Score"}


class _Trainer(_Scripted, RunServiceServicer):
    pass


class _Teacher(_Scripted, TeacherServiceServicer):
    pass


@contextmanager
def odd_service(**answers: Answer) -> Iterator[str]:
    """Starts a server that is trainer and teacher at once and yields its target; each response is a generator of messages."""
    server = grpc.server(ThreadPoolExecutor(4))
    add_RunServiceServicer_to_server(_Trainer(answers), server)
    add_TeacherServiceServicer_to_server(_Teacher(answers), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


class TcpLine:
    """Forwards connections to `target`; `cut` ends all of them, like a failing network."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._to = (host, int(port))
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> TcpLine:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Ends every connection; later ones are forwarded again."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._to)
            with self._lock:
                self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_copy, args=(source, sink), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
