"""The web server as a child of the run service: started with it, started again if it ends, ended before it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

import structlog

from stillhouse.protos.child_process import end_process
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.runs.data_dir import DataDir
from stillhouse.student_trainer.runs.settings import RunServiceSettings
from stillhouse.student_trainer.runs.supervision.training_process import environment_of_child

START_S = 60.0
STOP_S = 10.0
AGAIN_S = 5.0
ADDRESS_FILE = "web.address"
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - addresses that listen everywhere, compared

log = structlog.get_logger(__name__)


def page_address(data_dir: DataDir) -> str:
    """Address of the web server that the service has started; empty if there is none."""
    try:
        return (data_dir.path / ADDRESS_FILE).read_text().strip()
    except OSError:
        return ""


class WebProcess:
    """`stillhouse web` in a process of its own, so that no page slows the service."""

    def __init__(self, settings: RunServiceSettings, data_dir: DataDir, address: str) -> None:
        """`address` is that of the run service."""
        self._address_file = data_dir.path / ADDRESS_FILE
        self._arguments = _arguments(settings, data_dir, address)
        self._wanted = settings.web
        self._process: asyncio.subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns once the server listens, at once without --web. Raises StillhouseError(INVALID_CONFIG) if it ends instead."""
        self._address_file.unlink(missing_ok=True)
        if not self._wanted:
            return
        process = await self._spawn()
        try:
            async with asyncio.timeout(START_S):
                while not self._address_file.exists() and process.returncode is None:  # noqa: ASYNC110 - a file has no event
                    await asyncio.sleep(0.05)
        except TimeoutError:
            await self.stop()
        if process.returncode is not None:
            raise StillhouseError(
                Reason.INVALID_CONFIG,
                f"The web server did not start (exit code {process.returncode}); its last lines have the reason. Correct it, or "
                "leave out --web.",
            )
        log.info("web server started", url=self._address_file.read_text(), pid=process.pid)
        self._watching = asyncio.create_task(self._watch(), name="web server")

    async def stop(self) -> None:
        """Ends it, by force if it does not end by itself."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait({self._watching})
        if self._process is not None:
            await end_process(self._process, grace_s=STOP_S)

    async def _spawn(self) -> asyncio.subprocess.Process:
        self._process = await asyncio.create_subprocess_exec(
            *self._arguments,
            stdin=asyncio.subprocess.DEVNULL,
            env=environment_of_child(),
            start_new_session=True,  # Ctrl-C reaches the service alone, which ends it
        )
        return self._process

    async def _watch(self) -> None:
        while self._process is not None:
            code = await self._process.wait()
            log.error("web server ended; it is started again", exit_code=code, in_s=AGAIN_S)
            await asyncio.sleep(AGAIN_S)
            try:
                await self._spawn()
            except OSError as error:  # such as no memory for a process
                log.error("web server cannot be started", why=str(error))  # noqa: TRY400 - the text says it


def _arguments(settings: RunServiceSettings, data_dir: DataDir, address: str) -> Sequence[str]:
    host, _, port = address.rpartition(":")
    target = f"{_EVERYWHERE[host]}:{port}" if host in _EVERYWHERE else address
    arguments = [
        *(sys.executable, "-P", "-m", "stillhouse.client", "web"),
        *("--trainer", target, "--listen", settings.web_listen, "--parent", str(os.getpid())),
        *("--address-file", str(data_dir.path / ADDRESS_FILE)),
        *("--sign-in-file", str(data_dir.path / "web-sign-in"), "--log-level", settings.log_level),
        *("--batch-dir", str(data_dir.path / "web-batches")),
    ]
    if settings.tls_cert is not None and settings.tls_key is not None:
        arguments += ["--tls", "--https-cert", str(settings.tls_cert), "--https-key", str(settings.tls_key)]
    if settings.insecure:
        arguments.append("--insecure")
    return arguments
