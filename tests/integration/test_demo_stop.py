"""Ctrl-C ends the demo and everything that it started: while it trains, with no run left to wait; and while its page stays up."""

from __future__ import annotations

import re
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from tests.support.processes import MARK, marked_processes, no_process_left
from tests.support.programs import start_program
from tests.support.runs import wait_until


@pytest.mark.slow
def test_an_interrupted_demo_leaves_no_process_and_no_waiting_run(tmp_path: Path) -> None:
    with (
        no_process_left(patience_s=0.5) as mark,
        start_program(
            "demo",
            [
                "examples.demo",
                "--engine=hf",
                f"--work-dir={tmp_path}",
                "--teacher-steps=3",
                "--student-steps=5000",
            ],
            directory=tmp_path / "log",
            environment=mark,
            listens=False,
        ) as demo,
    ):

        def two_runs_train() -> bool:
            assert demo.process.poll() is None, demo.log()
            return len(list((tmp_path / "trainer" / "runs").glob("*/process.json"))) == 2

        wait_until(two_runs_train, "two training processes")
        assert len(marked_processes(mark[MARK])) >= 5, "demo, teacher, trainer and two runs"
        interrupted = time.monotonic()
        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(60) == 130, demo.log()
        assert time.monotonic() - interrupted < 45
        assert "interrupted" in demo.log()
    with closing(sqlite3.connect(tmp_path / "trainer" / "stillhouse.db")) as database:
        states = [state for (state,) in database.execute("SELECT state FROM runs")]
    assert states == [Run.STATE_STOPPED] * 6, "the next service on this data starts nothing"


@pytest.mark.slow
def test_the_page_of_the_demo_stays_up_until_ctrl_c(tmp_path: Path) -> None:
    with (
        no_process_left(patience_s=0.5) as mark,
        start_program(
            "demo",
            [
                *("examples.demo", "--engine=hf", "--stay"),
                *(f"--work-dir={tmp_path}", "--teacher-steps=3", "--student-steps=2"),
            ],
            directory=tmp_path / "log",
            environment=mark,
            listens=False,
        ) as demo,
    ):

        def stays() -> bool:
            assert demo.process.poll() is None, demo.log()
            return "Ctrl-C ends them" in demo.log()

        wait_until(stays, "the page stays", patience_s=300)
        (page,) = set(re.findall(r"http://127\.0\.0\.1:\d+", demo.log()))
        assert httpx.get(page).text.count("cross-entropy, learning rate") >= 3
        assert httpx.get(f"{page}/api/v1/teachers/1").status_code == 200
        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(60) == 0, demo.log()
