"""Worker thread of the reference engine: no work is lost, whenever calls from the event loop arrive."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.teacher_service.engine import DistributionOptions, ScoreInput
from stillhouse.teacher_service.engines.hf.worker import ScoreJob, Worker, as_input_error


@pytest.fixture
def hurried_threads() -> Iterator[None]:
    """Switches threads so often that a narrow race is met within seconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hurried_threads")
async def test_every_sequence_is_scored_while_others_arrive() -> None:
    answer: Any = object()  # the worker passes it through

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


def test_a_cpu_without_memory_refuses_the_sequence_alone() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 46)
    refused = as_input_error(caught.value)
    assert isinstance(refused, StillhouseError)
    assert refused.reason is Reason.OUT_OF_MEMORY
    bug = RuntimeError("shapes do not match")
    assert as_input_error(bug) is bug
