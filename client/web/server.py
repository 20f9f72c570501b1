"""Serves the web application with uvicorn until a signal; streams end before it waits for connections."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
from collections.abc import Iterator

import structlog
import uvicorn

from stillhouse.client.web.app import WebApp, web_app
from stillhouse.client.web.settings import WebSettings
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import write_atomic

SHUTDOWN_S = 5
MAX_CONNECTIONS = 2000
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = structlog.get_logger(__name__)


class _Server(uvicorn.Server):
    """A uvicorn server that ends open streams first, and whose process ends by itself after a signal."""

    def __init__(self, config: uvicorn.Config, app: WebApp) -> None:
        super().__init__(config)
        self._app = app
        self._parent = app.context.settings.parent

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        return await super().on_tick(counter) or (self._parent is not None and os.getppid() != self._parent)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends streams, then connections."""
        self._app.context.close_streams()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stops on SIGTERM and SIGINT, at once on a second one."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)


async def serve(settings: WebSettings) -> None:
    """Serves until a signal. Raises StillhouseError(INVALID_CONFIG) if address or certificate cannot be used."""
    async with web_app(settings) as app:
        listener = bind(settings)
        url = _url(settings, listener)
        config = uvicorn.Config(
            app.asgi,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=SHUTDOWN_S,
            h11_max_incomplete_event_size=64 * 1024,
            http="h11",
            ssl_certfile=settings.https_cert,
            ssl_keyfile=settings.https_key,
        )
        with listener:
            _load(config)
            if settings.guarded:
                log.info("sign in with a token, or with the line of a file", file=str(settings.sign_in_path))
            log.info("web server ready", url=url, trainer=settings.services.trainer)
            if settings.address_file is not None:
                write_atomic(settings.address_file, url.encode(), private=True)
            await _Server(config, app).serve(sockets=[listener])
    log.info("web server ended")


def bind(settings: WebSettings) -> socket.socket:
    """A socket that listens at the address of the settings. Raises StillhouseError(INVALID_CONFIG)."""
    host, port = settings.address
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise _unusable(f"cannot listen on {settings.listen} ({error.strerror or error})") from error
    # Connections inherit it; asyncio sets it on sockets of its own alone. Without it the body of a response waits up to 40 ms
    # until the caller has acknowledged its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _url(settings: WebSettings, listener: socket.socket) -> str:
    host = settings.listen.rpartition(":")[0]
    scheme = "https" if settings.https else "http"
    return f"{scheme}://{host}:{listener.getsockname()[1]}"


def _load(config: uvicorn.Config) -> None:
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise _unusable(f"cannot use --https-cert {config.ssl_certfile} and its key ({error})") from error


def _unusable(problem: str) -> StillhouseError:
    return StillhouseError(
        Reason.INVALID_CONFIG,
        f"The web server {problem}. Choose another --listen, or port 0 for any free one.",
    )
