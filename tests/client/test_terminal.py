"""What a person sees on a terminal: a progress bar, lines above it, and what Ctrl-C does."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from protos.stillhouse.v1.run_pb2 import MetricPoint, Progress, Run, WatchRunResponse
from tests.client.odd_services import odd_service

NAME = "runs/abcabcabcabc"
WATCH = [sys.executable, "-m", "client", "run", "watch", "abcabcabcabc", "--trainer"]


def running(sequence: int, state: Run.State.ValueType, step: int) -> WatchRunResponse:
    run = Run(name=NAME, state=state, progress=Progress(step=step, total_steps=9))
    return WatchRunResponse(sequence=sequence, run=run)


def read_all(descriptor: int) -> str:
    pieces = []
    try:
        while piece := os.read(descriptor, 65536):
            pieces.append(piece)
    except OSError:
        pass  # Linux says so when the other side has closed
    return b"".join(pieces).decode()


def test_a_terminal_gets_a_bar_with_lines_above_it() -> None:
    def watch(_: Any) -> Iterator[WatchRunResponse]:
        yield running(1, Run.STATE_RUNNING, 0)
        values = {"train/loss": 1.25, "train/tokens_per_second": 456.0, "eval/kl": 0.5}
        yield WatchRunResponse(sequence=2, metrics=MetricPoint(step=4, values=values))
        yield running(3, Run.STATE_COMPLETED, 9)

    ours, theirs = pty.openpty()
    with odd_service(WatchRun=watch) as target:
        environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm"}
        process = subprocess.Popen([*WATCH, target], stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        shown = read_all(ours)
        assert process.wait(60) == 0
    os.close(ours)
    assert "run abcabcabcabc: RUNNING\r\n" in shown
    assert "step 4  evaluation:  kl 0.5\r\n" in shown
    assert "run abcabcabcabc: COMPLETED at step 9/9\r\n" in shown
    assert "loss 1.25" in shown
    assert "456 tokens/s" in shown
    assert "9/9" in shown


def test_ctrl_c_leaves_the_run_and_says_how_to_go_on() -> None:
    asked, done = threading.Event(), threading.Event()

    def watch(_: Any) -> Iterator[WatchRunResponse]:
        yield running(1, Run.STATE_RUNNING, 3)
        asked.set()
        done.wait(60)

    with odd_service(WatchRun=watch) as target:
        process = subprocess.Popen(
            [*WATCH, target], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert asked.wait(60)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        shown, said = process.communicate(timeout=60)
        done.set()
    assert process.returncode == 130
    assert shown == "run abcabcabcabc: RUNNING at step 3/9\n"
    assert said.strip() == (
        "No longer watching; run abcabcabcabc goes on. To see it again: stillhouse run watch abcabcabcabc. "
        "To end it: stillhouse run stop abcabcabcabc."
    )
