"""`stillhouse-trainer --web`: the HTTP API comes and goes with the run service, whatever ends it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.programs import Program, ProgramError


def test_the_web_server_lives_as_long_as_the_service(
    trainer_service: Callable[..., Program], tmp_path: Path
) -> None:
    options = ("--web", "--web-listen", "127.0.0.1:0")
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
    deadline = time.monotonic() + 20
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the web server outlived the service"
        time.sleep(0.05)
