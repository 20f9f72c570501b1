"""The surroundings of one attempt of a run, and everything that is closed when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.run_dir import Attempt, RunDir
from stillhouse.student_trainer.train.distributed.ranks import Ranks
from stillhouse.student_trainer.train.process.reporter import Reporter
from stillhouse.student_trainer.train.process.waiting import TeacherWait


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Result of an attempt that ended without an error, and its last step."""

    kind: Literal["completed", "stopped"]
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunScope:
    """The surroundings that every stage of set-up works in."""

    config: RunConfig
    attempt: Attempt
    ranks: Ranks
    reporter: Reporter
    patience: TeacherWait
    stack: ExitStack
    """Closes caches, connections and streams, the newest first."""

    @property
    def run_dir(self) -> RunDir:
        """The run directory."""
        return self.attempt.run_dir

    @property
    def data_dir(self) -> Path:
        """The folder of names such as "runs/..." and "caches/..."."""
        return self.run_dir.path.resolve().parent.parent


@contextmanager
def open_scope(
    config: RunConfig, attempt: Attempt, stop_requested: Callable[[], bool], ranks: Ranks | None = None
) -> Iterator[RunScope]:
    """Opens the scope of `attempt` and closes all that was put into it."""
    with ExitStack() as stack:
        yield RunScope(
            config=config,
            attempt=attempt,
            ranks=ranks or Ranks(),
            reporter=stack.enter_context(closing(Reporter(attempt))),
            patience=TeacherWait(attempt, stop_requested, config.retry.teacher_wait_s),
            stack=stack,
        )
