"""What a training process tells the world: metrics lines, TensorBoard files and a heartbeat."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import structlog

from student_trainer.run_dir import Attempt
from student_trainer.train.waits import Waits

log = structlog.get_logger()

HEARTBEAT_S = 5.0
"""Between two signs of life."""


class Reporter:
    """Metrics and heartbeat of one attempt; a context manager."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._writer: Any = None
        self._first_step = 0
        self._waits = Waits()

    def __enter__(self) -> Self:
        self._attempt.heartbeat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if self._writer is not None:
            self._writer.close()

    def resume_at(self, step: int) -> None:
        """Curves that an earlier attempt drew beyond `step` are cut."""
        self._first_step = step

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step; what is no number is left out, because JSON has no word for it."""
        if not self._attempt.writes:
            return
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._attempt.report_metrics(step, finite)
        self._waits.note(step, finite)
        for name, value in finite.items():
            self._tensorboard().add_scalar(name, value, step)

    def _tensorboard(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            path = str(self._attempt.run_dir.tensorboard_path)
            self._writer = SummaryWriter(path, purge_step=self._first_step + 1 if self._first_step else None)
        return self._writer

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            try:
                self._attempt.heartbeat()
            except OSError as error:  # a full disk ends the run where it writes something that matters
                log.warning("no heartbeat", why=str(error))
