"""A bad network between two programs: it passes bytes on, holds them back, slows them down, or cuts every connection."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any, Literal, Self

Weather = Literal["fine", "silent", "mute", "cut"]
"""fine: bytes pass. silent: none do, and nobody is told, as when a cable is pulled. mute: what the target says is lost.
cut: connections are reset and refused."""
PIECE_BYTES = 1024
LINGER_RESET = struct.pack("ii", 1, 0)
"""Closing with it sends a RST."""


class TcpProxy:
    """Listens on a free port of this machine and forwards to `target`, "host:port" or "unix:PATH"; a context manager."""

    def __init__(self, target: str, *, delay_s_per_kib: float = 0.0) -> None:
        self._upstream = target
        self._delay_s = delay_s_per_kib
        self._weather: Weather = "fine"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy", daemon=True)
        self._passing: asyncio.Event
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server
        self.target = ""
        self.num_connections = 0
        self.num_bytes = 0
        """Passed on, both ways together."""

    def __enter__(self) -> Self:
        self._thread.start()
        self._wait(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def become(self, weather: Weather) -> None:
        """Change the weather, for the connections that are open too."""
        self._wait(self._become(weather))

    def _wait(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _open(self) -> None:
        self._passing = asyncio.Event()
        self._passing.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.target = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _close(self) -> None:
        self._server.close()
        self._reset_all()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _become(self, weather: Weather) -> None:
        self._weather = weather
        if weather == "silent":
            self._passing.clear()
        else:
            self._passing.set()
        if weather == "cut":
            self._reset_all()

    def _reset_all(self) -> None:
        for writer in list(self._writers):
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self.num_connections += 1
        try:
            await self._passing.wait()
            if self._weather == "cut":
                _reset(writer)
                return
            try:
                up_reader, up_writer = await self._connect()
            except OSError:
                _reset(writer)
                return
            self._writers.add(up_writer)
            try:
                await asyncio.gather(
                    self._pump(reader, up_writer), self._pump(up_reader, writer, is_answer=True)
                )
            finally:
                self._writers.discard(up_writer)
                up_writer.close()
        except OSError:
            pass  # one side has gone, and the other is told below
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._upstream.startswith("unix:"):
            return await asyncio.open_unix_connection(self._upstream.removeprefix("unix:"))
        host, port = self._upstream.rsplit(":", 1)
        return await asyncio.open_connection(host, int(port))

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool = False
    ) -> None:
        while data := await reader.read(PIECE_BYTES if self._delay_s else 64 * PIECE_BYTES):
            await self._passing.wait()
            if is_answer and self._weather == "mute":
                continue
            if self._delay_s:
                await asyncio.sleep(self._delay_s * len(data) / 1024)
            writer.write(data)
            self.num_bytes += len(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()
        # Ends the other direction too: neither side of a gRPC connection is ever half open on purpose.
        raise ConnectionResetError


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    writer.transport.abort()
