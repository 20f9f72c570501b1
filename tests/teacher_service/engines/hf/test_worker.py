"""The reference engine's thread loses no work, however calls from the event loop fall between its turns."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stillhouse.teacher_service.engine import DistributionOptions, ScoreInput
from stillhouse.teacher_service.engines.hf.worker import ScoreJob, Worker


@pytest.fixture
def hurried_threads() -> Iterator[None]:
    """Threads change places so often that a narrow race is met within seconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hurried_threads")
async def test_every_sequence_is_answered_while_others_come() -> None:
    answer: Any = object()  # the worker hands it on as it is

    def score(batch: list[ScoreJob]) -> None:
        for job in batch:
            job.future.set_result(answer)

    def step(_: Any) -> Any:
        raise AssertionError("nothing is to be written")

    def take(waiting: deque[ScoreJob]) -> list[ScoreJob]:
        return [waiting.popleft()]

    item = ScoreInput(token_ids=np.arange(2, dtype=np.int32), start=1, options=DistributionOptions(top_k=1))
    worker = Worker(score=score, step=step, select_batch=take, num_threads=1)
    try:
        for _ in range(6000):
            tasks = [asyncio.create_task(worker.score(item)) for _ in range(20)]
            _, unanswered = await asyncio.wait(tasks, timeout=60)
            assert not unanswered
    finally:
        worker.close()
