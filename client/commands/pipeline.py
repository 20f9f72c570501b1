"""`stillhouse pipeline run | show | watch`: runs the stages of a file in order, and shows them as one thing."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stillhouse.client.terminal.session import Session, command

if TYPE_CHECKING:
    from stillhouse.client.pipeline.definition import Pipeline, Stage
    from stillhouse.client.pipeline.state import StageRecord
    from stillhouse.client.trainer.run_handle import RunHandle

POLL_S = 0.5


@click.group()
def pipeline() -> None:
    """Run several stages, from prompts to a judged student, as one thing."""


class _View:
    """Shows a pipeline that runs here."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def stage(self, stage: Stage, record: StageRecord, note: str) -> None:
        if self._session.as_json:
            self._session.emit(_as_json(stage, record))
        else:
            self._session.say(_line(stage, record, note))

    def note(self, sentence: str) -> None:
        self._session.note(sentence)

    def follow(self, run: RunHandle) -> None:
        from stillhouse.client.commands.run.control import follow
        from stillhouse.client.core.errors import ExitCode

        if follow(self._session, run) == ExitCode.INTERRUPTED:
            raise KeyboardInterrupt


@command(pipeline, name="run")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--validate", is_flag=True, help="Check the file and list its stages; run nothing.")
def run(session: Session, *, file: Path, validate: bool) -> int:
    """Run the stages of FILE that are not done, in order.

    The same command goes on after a failure, a kill or Ctrl-C: a stage whose text, inputs and outputs are unchanged is
    not run again, a batch goes on at its next row, and a run at its last checkpoint. A run of the run service goes on
    while no pipeline waits for it.
    """
    from stillhouse.client.core.errors import ExitCode
    from stillhouse.client.pipeline.definition import load_pipeline
    from stillhouse.client.pipeline.execution import StageError, run_pipeline

    loaded = load_pipeline(file)
    _check(loaded, inputs=not validate)
    if validate:
        _show(session, loaded)
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run_pipeline(
            loaded,
            trainer=lambda: session.trainer,
            shared_options=session.shared_arguments(),
            view=_View(session),
        )
    except StageError as error:
        session.note(f"Error: {error}")
        return int(ExitCode.FAILED)
    return 0


def _check(loaded: Pipeline, *, inputs: bool) -> None:
    """Refuses what would break a later stage: options, runs, and with `inputs` files that are missing."""
    from stillhouse.client.commands.pipeline_options import option_problems
    from stillhouse.client.pipeline.run_file import check_stages, missing_inputs
    from stillhouse.client.runfile.source_map import invalid

    problems = [*option_problems(loaded, click.get_current_context())]
    if inputs:
        problems += missing_inputs(loaded)
    if problems:
        raise invalid(problems)
    check_stages(loaded)


def _interrupt(_number: int, _frame: object) -> None:
    """Ends the stage's command with the pipeline, as Ctrl-C does."""
    raise KeyboardInterrupt


@command(pipeline, name="show")
@click.argument("file", type=click.Path(path_type=Path))
def show(session: Session, *, file: Path) -> None:
    """Show the stages of FILE: state, time, runs and outputs."""
    from stillhouse.client.pipeline.definition import load_pipeline

    _show(session, load_pipeline(file))


@command(pipeline, name="watch")
@click.argument("file", type=click.Path(path_type=Path))
def watch(session: Session, *, file: Path) -> int:
    """Follow FILE, which `pipeline run` runs in another process, until that ends.

    The exit code is 0 if every stage is done, else 1.
    """
    from stillhouse.client.core.errors import ExitCode
    from stillhouse.client.pipeline.definition import load_pipeline
    from stillhouse.client.pipeline.state import PipelineState, StageState

    loaded = load_pipeline(file)
    shown: dict[str, tuple[str, str]] = {}
    while True:
        state = PipelineState(loaded.work, loaded.path)
        is_running = state.is_running  # before the file is read, whose last change comes before the end
        state.load()
        for stage in loaded.stages:
            record = state.record(stage.id)
            if shown.get(stage.id, (StageState.WAITING.value, "")) != (record.state.value, record.run):
                shown[stage.id] = record.state.value, record.run
                note = f"run {record.run}" if record.run else ""
                if session.as_json:
                    session.emit(_as_json(stage, record))
                else:
                    session.say(_line(stage, record, note))
        if not is_running:
            done = all(state.record(each.id).state is StageState.DONE for each in loaded.stages)
            return int(ExitCode.OK if done else ExitCode.FAILED)
        time.sleep(POLL_S)


def _show(session: Session, loaded: Pipeline) -> None:
    from stillhouse.client.pipeline.state import PipelineState

    state = PipelineState(loaded.work, loaded.path).load()
    if session.as_json:
        stages = [_as_json(each, state.record(each.id)) for each in loaded.stages]
        session.emit({"name": loaded.name, "running": state.is_running, "stages": stages})
        return
    activity = "running" if state.is_running else "not running"
    session.say(f"pipeline {loaded.name}, {activity}, files in {loaded.work}")
    for stage in loaded.stages:
        record = state.record(stage.id)
        session.say("  " + _line(stage, record, f"run {record.run}" if record.run else ""))
        if record.error:
            session.say(f"      {record.error}")


def _line(stage: Stage, record: StageRecord, note: str) -> str:
    from stillhouse.client.terminal.render import duration_text

    seconds = record.ended_at - record.started_at if record.ended_at else 0.0
    took = f" in {duration_text(seconds)}" if seconds else ""
    return f"{record.state.value:8} {stage.id} ({stage.kind}){took}" + (f": {note}" if note else "")


def _as_json(stage: Stage, record: StageRecord) -> dict[str, object]:
    return {
        "stage": stage.id,
        "kind": stage.kind,
        "state": record.state.value,
        "run": record.run or None,
        "started_at": record.started_at or None,
        "ended_at": record.ended_at or None,
        "error": record.error or None,
        "outputs": dict(stage.outputs),
    }
