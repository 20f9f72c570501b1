"""`stillhouse-trainer --web`: the HTTP API comes and goes with the run service, whatever ends it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from stillhouse.student_trainer.runs import web_process
from stillhouse.student_trainer.runs.data_dir import DataDir
from stillhouse.student_trainer.runs.settings import RunServiceSettings
from stillhouse.student_trainer.runs.web_process import WebProcess
from tests.support.programs import Program, ProgramError


def test_the_web_server_lives_as_long_as_the_service(
    trainer_service: Callable[..., Program], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        options = ("--web", "--web-listen", f"127.0.0.1:{free.getsockname()[1]}")
    data = tmp_path / "trainer-data"
    with pytest.raises(ProgramError, match="give HOST:PORT"):
        trainer_service("--web", "--web-listen", "nowhere")
    trainer = trainer_service(*options)
    url = (data / "web.address").read_text()
    assert httpx.get(f"{url}/api/v1/runs").json()["runs"] == []
    children = psutil.Process(trainer.pid).children()
    assert trainer.stop() == 0
    assert not any(each.is_running() for each in children)

    killed = trainer_service(*options)
    (child,) = psutil.Process(killed.pid).children()
    os.kill(killed.pid, signal.SIGKILL)
    killed.process.wait()
    again = trainer_service(
        *options
    )  # on the port and the folder of batches of a server that may not have ended yet
    assert (data / "web-batches").stat().st_mode & 0o077 == 0
    assert again.stop() == 0
    deadline = time.monotonic() + 20
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the web server outlived the service"
        time.sleep(0.05)


async def test_a_start_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_process, "AGAIN_S", 0.05)
    data_dir = DataDir.open(tmp_path / "data")
    web = WebProcess(RunServiceSettings(data_dir=data_dir.path, web=True), data_dir, "127.0.0.1:1")
    address, program = data_dir.path / "web.address", tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho there > {address}\nexec sleep 60\n")
    program.chmod(0o755)
    web._arguments = [str(program)]
    await web.start()
    away = program.rename(tmp_path / "away")
    assert web._process is not None
    web._process.kill()
    await asyncio.sleep(0.5)
    address.unlink()
    away.rename(program)
    async with asyncio.timeout(20):
        while not address.exists():  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.02)
    await web.stop()
    data_dir.close()
