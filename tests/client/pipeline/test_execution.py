"""Stages run once, go on where they broke, and run again if what they read or do has changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from stillhouse.client.pipeline.state import PipelineState
from stillhouse.protos.errors import StillhouseError

CLIENT = (sys.executable, "-m", "stillhouse.client")

RECIPE = """
stages:
  - name: first
    inputs: {text: in.txt}
    outputs: {text: first.txt}
    command: [sh, -c, 'echo first >> log; tr a-z A-Z < "$1" > "$2"', sh, "${inputs.text}", "${outputs.text}"]
  - name: second
    outputs: {text: second.txt}
    command: [sh, -c, 'echo second >> log; test ! -e broken && cp "$1" "$2"', sh, "${first.text}", "${outputs.text}"]
  - name: third
    command: [sh, -c, 'echo third >> log; cat "$1" > seen', sh, "${second.text}"]
"""


def recipe(directory: Path, text: str = RECIPE) -> Path:
    (directory / "in.txt").write_text("abc\n")
    path = directory / "recipe.yaml"
    path.write_text(text)
    return path


def run(path: Path, *arguments: str, command: str = "run") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLIENT, "pipeline", command, str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def ran(path: Path) -> list[str]:
    """The stages that ran since the last call."""
    log = path.parent / "log"
    lines = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def states(path: Path) -> dict[str, Any]:
    shown = json.loads(run(path, "--json", command="show").stdout)
    return {stage["stage"]: stage["state"] for stage in shown["stages"]}


def test_stages_run_once_and_again_after_a_change(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    done = run(path)
    assert done.returncode == 0, done.stderr
    assert ran(path) == ["first", "second", "third"]
    assert (tmp_path / "seen").read_text() == "ABC\n"

    assert run(path).returncode == 0
    assert ran(path) == []

    (tmp_path / "in.txt").write_text("xyz\n")
    assert run(path).returncode == 0
    assert ran(path) == ["first", "second", "third"]
    assert (tmp_path / "seen").read_text() == "XYZ\n"

    (tmp_path / "recipe.work" / "second.txt").write_text("damaged")
    assert run(path).returncode == 0
    assert ran(path) == ["second"]  # which makes the same again, so that the third has nothing new to read

    path.write_text(RECIPE.replace("> seen", "> seen2"))
    assert run(path).returncode == 0
    assert ran(path) == ["third"]


def test_a_failed_stage_is_named_and_taken_up_again(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    (tmp_path / "broken").touch()
    failed = run(path)
    assert failed.returncode == 1
    assert "stage second failed with exit code 1" in failed.stderr
    assert f"stillhouse pipeline run {path}" in failed.stderr
    assert states(path) == {"first": "DONE", "second": "FAILED", "third": "WAITING"}
    assert run(path, command="watch").returncode == 1
    ran(path)

    (tmp_path / "broken").unlink()
    assert run(path).returncode == 0
    assert ran(path) == ["second", "third"]
    watched = run(path, command="watch")
    assert watched.returncode == 0
    assert watched.stdout.count("DONE") == 3


def test_a_stage_without_its_output_has_failed(tmp_path: Path) -> None:
    path = recipe(tmp_path, "stages:\n  - {name: a, outputs: {x: x}, command: ['true']}\n")
    failed = run(path)
    assert failed.returncode == 1
    assert "ended without its output x" in failed.stderr


def test_an_input_that_is_missing_is_named(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    (tmp_path / "in.txt").unlink()
    failed = run(path)
    assert failed.returncode == 2
    assert f"{tmp_path}/in.txt" in failed.stderr
    assert "recipe.yaml:3" in failed.stderr


SLOW = """
stages:
  - name: slow
    outputs: {x: x}
    command: [sh, -c, 'echo $$$$ > pid; echo slow >> log; test -e go || sleep 50; touch "$1"', sh, "${outputs.x}"]
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_pipeline_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    path = recipe(tmp_path, SLOW)
    process = subprocess.Popen([*CLIENT, "pipeline", "run", str(path)], start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "log").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = run(path)
        assert second.returncode == 2
        assert "another process runs this pipeline" in second.stderr
        process.send_signal(number)
        assert process.wait(30) != 0
        if number == signal.SIGKILL:
            left = run(path)
            assert left.returncode == 2
            assert "a command that a killed one has left" in left.stderr
    finally:
        process.kill()
        process.wait()
        with suppress(ProcessLookupError):  # which only a killed pipeline leaves
            os.killpg(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    (tmp_path / "go").touch()
    assert run(path).returncode == 0
    assert ran(path) == ["slow", "slow"]
    assert states(path) == {"slow": "DONE"}


def test_a_state_of_another_kind_is_refused(tmp_path: Path) -> None:
    for content in (
        "{",
        "[]",
        '{"format": 9, "stages": {}}',
        '{"format": 1, "stages": {"first": {"state": "X"}}}',
    ):
        (tmp_path / "pipeline.json").write_text(content)
        with pytest.raises(StillhouseError, match="is no state of a pipeline"):
            PipelineState(tmp_path).load()
