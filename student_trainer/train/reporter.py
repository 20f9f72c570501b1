"""What a training process tells the world: metrics lines and TensorBoard files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from student_trainer.run_dir import Attempt
from student_trainer.train.waits import Waits


class Reporter:
    """Metrics of one attempt; a context manager."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._writer: Any = None
        self._first_step = 0
        self._waits = Waits()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
