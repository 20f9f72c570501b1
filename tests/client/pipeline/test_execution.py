"""Stages run once, go on where they broke, and run again if what they read or do has changed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from stillhouse.client.pipeline.content import content_hash
from stillhouse.client.pipeline.definition import Stage, load_pipeline
from stillhouse.client.pipeline.execution import StageError, run_pipeline
from stillhouse.client.pipeline.state import PipelineState, StageRecord
from stillhouse.client.trainer.run_handle import ENDED, RunHandle
from stillhouse.client.trainer.trainer import Trainer
from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from tests.student_trainer.runs.api.caller import model_of_no_kind
from tests.support.programs import Program

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


def test_a_signal_that_ends_a_stage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "killed.yaml"
    path.write_text('stages: [{name: only, command: [sh, -c, "kill -9 $$$$"]}]\n')
    failed = run(path)
    assert failed.returncode == 1
    assert "stage only was ended by SIGKILL: sh -c" in failed.stderr


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "work: in.txt\nstages: [{name: a, command: ['true']}]\n",
            "cannot make the work folder .*in.txt: File exists",
        ),
        ("stages: [{name: a, command: ['']}]\n", "cannot start '': "),
        ('stages: [{name: a, command: ["a\\0b"]}]\n', "embedded null byte"),
    ],
)
def test_what_cannot_begin_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(StillhouseError, match=said):
        run_here(recipe(tmp_path, text))


def test_what_breaks_a_later_stage_is_told_before_the_first_runs(tmp_path: Path) -> None:
    text = """
stages:
  - {name: a, command: [sh, -c, "echo a >> log"]}
  - {name: b, inputs: {x: none}, filter: {in: "${inputs.x}", no_duplicate: true}}
  - {name: c, convert: {files: x, to: rows, out: y, chatt: true}}
  - {name: d, generate: {files: [hello], n: 2, trainer: "127.0.0.1:1"}}
"""
    path = recipe(tmp_path, text)
    refused = run(path)
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        f"{path}:4:5: stage b: filter needs out.",
        f"{path}:4:5: stage b: inputs.x: reads {tmp_path}/none, which does not exist. Make it; if a "
        "stage makes it, declare it among that stage's outputs, and write ${STAGE.NAME} where it is read.",
        f'{path}:4:62: no_duplicate: there is no such option of filter; did you mean "no_duplicates"?',
        f'{path}:5:53: chatt: there is no such option of convert; did you mean "chat"?',
    ]
    path.write_text(
        text.split("  - {name: b", maxsplit=1)[0] + "  - {name: e, distil: {studnt: {model: x}}}\n"
    )
    refused = run(path, "--validate")
    assert (refused.returncode, 'did you mean "student"?' in refused.stderr) == (2, True)
    assert ran(path) == []


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
            PipelineState(tmp_path, tmp_path / "recipe.yaml").load()


class Seen:
    """A view that leaves a run as soon as it has begun."""

    def __init__(self) -> None:
        self.runs: list[RunHandle] = []
        self.notes: list[str] = []

    def stage(self, stage: Stage, record: StageRecord, note: str) -> None:
        pass

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def follow(self, run: RunHandle) -> None:
        self.runs.append(run)
        raise KeyboardInterrupt


def run_here(path: Path, trainer: Callable[[], Trainer] = Trainer) -> Seen:
    """Runs a pipeline in this process, until its first run has begun."""
    seen = Seen()
    with suppress(KeyboardInterrupt):
        run_pipeline(load_pipeline(path), trainer=trainer, shared_options=(), view=seen)
    return seen


def test_what_a_failed_try_has_left_is_not_what_the_next_one_makes(tmp_path: Path) -> None:
    script = 'test -e "$1.tried" || { echo half > "$1"; touch "$1.tried"; exit 1; }'
    text = (
        f"stages:\n  - {{name: a, outputs: {{x: x}}, command: [sh, -c, '{script}', sh, '${{outputs.x}}']}}\n"
    )
    path = recipe(tmp_path, text)
    with pytest.raises(StageError, match="exit code 1"):
        run_here(path)
    with pytest.raises(StageError, match="ended without its output x"):
        run_here(path)


def test_two_files_do_not_share_a_work_folder(tmp_path: Path) -> None:
    text = "work: w\nstages:\n  - {name: a, command: ['true']}\n"
    path = recipe(tmp_path, text)
    run_here(path)
    other = path.with_name("other.yaml")
    other.write_text(text)
    for command in ("run", "show"):
        refused = run(other, command=command)
        assert refused.returncode == 2
        assert f"holds the stages of {path}; give {other} another `work` folder" in refused.stderr
    path.unlink()  # as if it had been renamed
    run_here(other)


def test_links_in_a_folder_are_read(tmp_path: Path) -> None:
    folder, linked = tmp_path / "folder", tmp_path / "linked"
    for each in (folder, linked):
        each.mkdir()
    (folder / "link").symlink_to(linked)
    (linked / "rows").write_text("a")
    before = content_hash(folder)
    (linked / "rows").write_text("b")
    assert content_hash(folder) != before
    (linked / "up").symlink_to(folder)
    with pytest.raises(StillhouseError, match="a link to a folder that it lies in"):
        content_hash(folder)
    (linked / "up").unlink()
    os.mkfifo(linked / "pipe")
    with pytest.raises(StillhouseError, match="neither a file nor a folder"):
        content_hash(folder)


def one_run(tmp_path: Path) -> str:
    """A pipeline whose only stage is a run."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 8)
    return f"""
stages:
  - name: a
    distil:
      student: {{model: "{model_of_no_kind(tmp_path)}"}}
      data: {{train: [{{path: rows.jsonl}}]}}
      loss: {{terms: [{{weight: 0}}], hard_weight: 1}}
      optimizer: {{max_steps: 1}}
"""


class KilledTrainer(Trainer):
    """Dies as soon as a run is created, before anything is noted of it."""

    def create_run(self, *arguments: Any, **options: Any) -> RunHandle:
        super().create_run(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def run_killed(path: Path, target: str) -> None:
    """Runs a pipeline in a process that dies once its first run is created."""
    run_here(path, lambda: KilledTrainer(target))


@pytest.mark.parametrize("changed", [False, True])
def test_a_run_that_was_created_just_before_a_kill_is_found_again(
    tmp_path: Path, trainer_service: Callable[..., Program], changed: bool
) -> None:
    text = one_run(tmp_path)
    path = recipe(tmp_path, text)
    service = trainer_service()
    target = service.target
    process = multiprocessing.get_context("spawn").Process(target=run_killed, args=(path, target))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (record,) = PipelineState(tmp_path / "recipe.work", path).load().records.values()
    assert not record.run
    with Trainer(target) as trainer:
        (orphan,) = trainer.runs()
        if changed:
            path.write_text(text.replace("max_steps: 1", "max_steps: 2"))
        seen = run_here(path, lambda: trainer)
        assert len(list(trainer.runs())) == 1 + changed
        assert (seen.runs[0].name == orphan.name) is not changed
        assert len(seen.notes) == changed
        if changed:
            assert trainer.run(orphan.name).get().state in (*ENDED, Run.STATE_STOPPING)
    service.kill()  # a run that is just starting ends late


def test_the_run_of_a_former_text_is_stopped(tmp_path: Path, trainer_service: Callable[..., Program]) -> None:
    text = one_run(tmp_path)
    path = recipe(tmp_path, text)
    service = trainer_service()
    with Trainer(service.target) as trainer:
        runs: list[str] = []
        for changed in (
            text,
            text.replace("max_steps: 1", "max_steps: 2"),
            text.replace("name: a", "name: b"),
        ):
            path.write_text(changed)
            seen = run_here(path, lambda: trainer)
            assert [note.split("former run ")[1].split()[0] for note in seen.notes] == runs[-1:]
            runs.append(seen.runs[0].id)
            assert run_here(path, lambda: trainer).runs[0].id == runs[-1], (
                "the same text goes on with its run"
            )
        assert len(set(runs)) == 3
        assert all(trainer.run(each).get().state in (*ENDED, Run.STATE_STOPPING) for each in runs[:2])
    service.kill()
