"""Runs a pipeline: stages in order, those that are done left alone, the one that broke taken up where it stood."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from stillhouse.client.core.errors import ExitCode, file_errors, usage_error
from stillhouse.client.pipeline.content import content_hash
from stillhouse.client.pipeline.definition import RUN_KINDS, Pipeline, Stage
from stillhouse.client.pipeline.resolution import Resolved, argv, fingerprint, resolved
from stillhouse.client.pipeline.run_file import stage_run
from stillhouse.client.pipeline.state import PipelineState, StageRecord, StageState
from stillhouse.client.trainer.run_handle import ENDED, RunHandle
from stillhouse.client.trainer.trainer import Trainer
from stillhouse.protos.child_process import signal_name
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.locks import try_lock
from stillhouse.protos.stillhouse.v1.run_pb2 import Run

CLIENT = (sys.executable, "-m", "stillhouse.client")
CONTINUED = ("generate", *RUN_KINDS)
"""Stages that go on from what their last try has left in their outputs."""
REQUEST_LABEL = "pipeline_request"
"""Label of a stage's run that holds the request id by which it was created, and is found again before its id is recorded."""
STOP_GRACE_S = 20.0
"""Time that an interrupted command has to end by itself."""


class View(Protocol):
    """Shows a pipeline that runs."""

    def stage(self, stage: Stage, record: StageRecord, note: str) -> None:
        """Shows a stage whose state has changed, or what it does."""

    def note(self, sentence: str) -> None:
        """Shows a sentence beside the stages."""

    def follow(self, run: RunHandle) -> None:
        """Shows a run until it ends."""


class StageError(Exception):
    """A stage failed; the message names it and says how to go on."""


def run_pipeline(
    pipeline: Pipeline,
    *,
    trainer: Callable[[], Trainer],
    shared_options: Sequence[str],
    view: View,
) -> PipelineState:
    """Runs every stage that is not done, and returns the state at the end.

    A stage is done while what it does, and the content of its inputs and outputs, are those of its last try. The run of a
    stage that does something else by now is stopped. `trainer` connects on first use; `shared_options` are added to each
    command of the client.

    Raises:
        StageError: A stage failed.
        StillhouseError: Another process runs this pipeline, or an input is missing.
    """
    with file_errors("make the work folder", pipeline.work):
        pipeline.work.mkdir(parents=True, exist_ok=True)
    state = PipelineState(pipeline.work, pipeline.path)
    lock = try_lock(state.lock_path)
    if lock is None:
        raise usage_error(
            f"another process runs this pipeline in {pipeline.work}, or a command that a killed one has left; follow it with `stillhouse pipeline watch {pipeline.path}`."
        )
    with lock:
        state.load()  # behind the lock: its last holder may just have ended
        _forget_unknown(pipeline, state, trainer, view)
        for stage in pipeline.stages:
            _Execution(
                pipeline=pipeline,
                stage=stage,
                state=state,
                record=state.record(stage.id),
                trainer=trainer,
                shared_options=shared_options,
                view=view,
                lock=lock,
            ).run()
    return state


def _forget_unknown(
    pipeline: Pipeline, state: PipelineState, trainer: Callable[[], Trainer], view: View
) -> None:
    """Drops records of stages that the file no longer has."""
    known = {each.id for each in pipeline.stages}
    for name, record in state.records.items():
        if name not in known:
            _stop_run(name, record, trainer, view)
    state.records = {name: each for name, each in state.records.items() if name in known}
    state.save()


def _stop_run(stage_id: str, record: StageRecord, trainer: Callable[[], Trainer], view: View) -> None:
    """Stops the run of a record that is given up, so that it does not train on with nobody who waits for it."""
    if not (record.run or record.request_id) or record.state is StageState.DONE:
        return
    handle = _recorded_run(record, trainer())
    if handle is None:
        return
    try:
        if handle.get().state in ENDED:
            return
        handle.stop()
    except StillhouseError as error:
        if error.reason not in (Reason.RUN_NOT_FOUND, Reason.RUN_STATE):
            raise
        return
    view.note(
        f"stage {stage_id} has changed: its former run {handle.id} is stopped. `stillhouse run resume {handle.id}` takes "
        f"it up, `stillhouse run delete {handle.id}` removes it."
    )


def _recorded_run(record: StageRecord, trainer: Trainer) -> RunHandle | None:
    """The run that was created for a record, also one whose id a killed pipeline could not note; None if there is none."""
    if record.run:
        return RunHandle(trainer, f"runs/{record.run}")
    if not record.request_id:
        return None
    for run in trainer.runs():
        if run.spec.labels.get(REQUEST_LABEL) == record.request_id:
            return RunHandle(trainer, run.name)
    return None


@dataclass(kw_only=True, slots=True)
class _Execution:
    """One stage of one run of the pipeline."""

    pipeline: Pipeline
    stage: Stage
    state: PipelineState
    record: StageRecord
    trainer: Callable[[], Trainer]
    shared_options: Sequence[str]
    view: View
    lock: BinaryIO

    def run(self) -> None:
        resolution = resolved(self.pipeline, self.stage, self.state)
        file = stage_run(resolution, self.pipeline) if self.stage.is_run else None
        mark = fingerprint(resolution, file)
        if self.record.state is StageState.DONE and self._is_kept(resolution, mark):
            self.view.stage(self.stage, self.record, "unchanged")
            return
        self._begin(resolution, mark)
        work = self._run if self.stage.is_run else self._command
        try:
            work(resolution)
            self.record.outputs = self._made(resolution)
        except BaseException as error:
            self._end(StageState.FAILED, _sentence(error))
            raise
        self._end(StageState.DONE, "")

    def _is_kept(self, resolution: Resolved, mark: str) -> bool:
        if mark != self.record.fingerprint:
            return False
        if any(not path.exists() for path in resolution.outputs.values()):
            return False
        return {name: content_hash(path) for name, path in resolution.outputs.items()} == self.record.outputs

    def _begin(self, resolution: Resolved, mark: str) -> None:
        """Marks the stage as running; one that does something else than in its last try starts from nothing."""
        is_same = mark == self.record.fingerprint
        is_new = not is_same or self.record.state is StageState.DONE
        if is_new or self.stage.kind not in CONTINUED:
            # Leftovers of a failed try must not count as what this one makes.
            for path in resolution.outputs.values():
                _remove(path)
        if is_new:
            if not is_same:
                _stop_run(self.stage.id, self.record, self.trainer, self.view)
            made = self.record
            self.record = self.state.records[self.stage.id] = StageRecord(fingerprint=mark)
            if is_same:  # a run that has ended is not trained again for a file that is lost here
                self.record.run, self.record.request_id = made.run, made.request_id
        for path in resolution.outputs.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        self.record.state = StageState.RUNNING
        self.record.started_at, self.record.ended_at, self.record.error = time.time(), 0.0, ""
        self.state.save()

    def _end(self, state: StageState, error: str) -> None:
        self.record.state, self.record.error, self.record.ended_at = state, error, time.time()
        self.state.save()
        self.view.stage(self.stage, self.record, "")

    def _made(self, resolution: Resolved) -> dict[str, str]:
        missing = [f"{name} ({path})" for name, path in resolution.outputs.items() if not path.exists()]
        if missing:
            raise self._failed(f"ended without its output {', '.join(missing)}")
        return {name: content_hash(path) for name, path in resolution.outputs.items()}

    def _failed(self, problem: str) -> StageError:
        return StageError(
            f"stage {self.stage.id} {problem}. Mend it, and the same command goes on from there: "
            f"stillhouse pipeline run {self.pipeline.path}.",
        )

    def _command(self, resolution: Resolved) -> None:
        words = argv(resolution)
        shown = words
        if self.stage.kind != "command":
            shown = ["stillhouse", *words]
            words = [*CLIENT, *_with_options(words, self.shared_options)]
        self.view.stage(self.stage, self.record, shlex.join(shown))
        code = _run_command(words, self.pipeline, self.lock)
        if code == ExitCode.INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            how = f"failed with exit code {code}" if code > 0 else f"was ended by {signal_name(-code)}"
            raise self._failed(f"{how}: {shlex.join(shown)}")

    def _run(self, resolution: Resolved) -> None:
        """One run: created once, found again by a later process, resumed where it stopped or failed."""
        trainer = self.trainer()
        handle = self._existing(trainer)
        if handle is None:
            file = stage_run(resolution, self.pipeline)
            trainer.push_datasets_of(file)
            if not self.record.request_id:
                self.record.request_id = str(uuid.uuid4())
                self.state.save()
            file.spec.labels[REQUEST_LABEL] = self.record.request_id
            handle = trainer.create_run(file, request_id=self.record.request_id)
        if self.record.run != handle.id:
            self.record.run = handle.id
            self.state.save()
        self.view.stage(self.stage, self.record, f"run {handle.id}")
        self.view.follow(handle)
        run = handle.get()
        if run.state != Run.STATE_COMPLETED:
            name = Run.State.Name(run.state).removeprefix("STATE_").lower()
            raise self._failed(
                f"is not done: run {handle.id} is {name} (stillhouse run show {handle.id} tells why)"
            )
        for path in resolution.outputs.values():
            handle.pull("final", path)

    def _existing(self, trainer: Trainer) -> RunHandle | None:
        """The run of an earlier try, going on; None if there is none."""
        handle = _recorded_run(self.record, trainer)
        if handle is None:
            return None
        try:
            state = handle.get().state
        except StillhouseError as error:
            if error.reason is not Reason.RUN_NOT_FOUND:
                raise
            self.record.run = self.record.request_id = ""
            return None
        if state in (Run.STATE_STOPPED, Run.STATE_FAILED):
            handle.resume()
        return handle


def _with_options(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """The command with the shared options before its positional arguments."""
    at = words.index("--") if "--" in words else len(words)
    return [*words[:at], *options, *words[at:]]


def _run_command(words: Sequence[str], pipeline: Pipeline, lock: BinaryIO) -> int:
    """Runs a command in the pipeline's folder until it ends; an interrupted one is given time to end by itself.

    The command holds `lock` as well: while one that a killed pipeline has left is at work, no other begins.
    """
    try:
        # A group of its own: Ctrl-C reaches the command once, from here, together with what it has started.
        process = subprocess.Popen(
            words,
            cwd=pipeline.directory,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )
    except (OSError, ValueError) as error:  # a word with NUL is a ValueError
        said = getattr(error, "strerror", None) or error
        raise usage_error(f"cannot start {words[0]!r}: {said}.") from error
    try:
        return process.wait()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_GRACE_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sentence(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
