"""Progress on a terminal: a bar, lines above it, and Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.stillhouse.v1.run_pb2 import MetricPoint, Progress, Run, WatchRunResponse
from stillhouse.protos.tensors.distributions import encode
from tests.client.teacher.odd_services import odd_service

NAME = "runs/abcabcabcabc"
WATCH = [sys.executable, "-m", "stillhouse.client", "run", "watch", "abcabcabcabc", "--trainer"]


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


def test_ctrl_c_leaves_the_run_and_says_how_to_watch_it_again() -> None:
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
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, said = process.communicate(timeout=60)
        done.set()
    assert process.returncode == 130
    assert first + rest == "run abcabcabcabc: RUNNING at step 3/9\n"
    assert said.strip() == (
        "No longer watching; run abcabcabcabc continues. To see it again: stillhouse run watch abcabcabcabc. "
        "To end it: stillhouse run stop abcabcabcabc."
    )


def info(_: Any) -> Iterator[teacher_pb2.GetTeacherInfoResponse]:
    yield teacher_pb2.GetTeacherInfoResponse(max_prompts=9, max_sequence_tokens=9)


def batch(target: str, folder: Path) -> list[str]:
    (folder / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "seed": "x"}\n')
    files = ["--in", f"{folder}/in.jsonl", "--out", f"{folder}/out.jsonl"]
    return [sys.executable, "-m", "stillhouse.client", "--teacher", target, "generate", *files]


def test_a_batch_shows_a_bar_on_a_terminal_and_nothing_elsewhere(tmp_path: Path) -> None:
    def generate(request: teacher_pb2.GenerateRequest) -> Iterator[teacher_pb2.GenerateResponse]:
        chunk = teacher_pb2.SampleChunk(
            token_ids=encode(np.array([5, 6], np.int32)),
            finish_reason=teacher_pb2.SampleChunk.FINISH_REASON_STOP,
        )
        yield teacher_pb2.GenerateResponse(chunks=[chunk])

    ours, theirs = pty.openpty()
    with odd_service(GetTeacherInfo=info, Generate=generate) as target:
        environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm"}
        arguments = batch(target, tmp_path)
        with subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment
        ) as process:
            os.close(theirs)
            shown = read_all(ours)
            said = process.stdout.read() if process.stdout else ""
            assert process.wait(60) == 1
        quiet = subprocess.run([*arguments, "--overwrite"], capture_output=True, text=True, check=False)
        as_json = subprocess.run(
            [*arguments, "--json", "--overwrite"], capture_output=True, text=True, check=False
        )
    os.close(ours)
    for part in ("out.jsonl", "100%", "2/2 rows, 1 failed", "tokens/s"):
        assert part in shown
    summary = f"{tmp_path}/out.jsonl: 2 rows, 1 failed; 2 of them in this command, 2 tokens in"
    assert said.startswith(summary)
    assert quiet.stdout.startswith(summary)
    assert (quiet.stderr, as_json.stderr) == ("", "")
    assert json.loads(as_json.stdout)["failed"] == 1


def test_ctrl_c_says_how_a_batch_is_resumed(tmp_path: Path) -> None:
    asked, done = threading.Event(), threading.Event()

    def generate(_: Any) -> Iterator[teacher_pb2.GenerateResponse]:
        asked.set()
        done.wait(60)
        yield teacher_pb2.GenerateResponse()

    with odd_service(GetTeacherInfo=info, Generate=generate) as target:
        process = subprocess.Popen(batch(target, tmp_path), stderr=subprocess.PIPE, text=True)
        assert asked.wait(60)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        done.set()
    assert (process.returncode, said) == (130, "Interrupted; the same command resumes it.\n")
