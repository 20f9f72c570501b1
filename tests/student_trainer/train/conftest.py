"""Fixtures of the tests of the training process: a run from a spec to its end, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.student_trainer.run_dir import RunDir
from tests.student_trainer.train.runs import events, finish_here, make_run


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., RunDir]:
    """Trains a spec in this process and returns its directory; `code` is the exit code to expect."""
    count = 0

    def train(spec: dict[str, Any], *, code: int = 0, stopped: Callable[[], bool] = lambda: False) -> RunDir:
        nonlocal count
        count += 1
        run_dir = make_run(tmp_path, f"run-{count}", spec)
        assert finish_here(run_dir, stopped=stopped) == code, events(run_dir)
        return run_dir

    return train
