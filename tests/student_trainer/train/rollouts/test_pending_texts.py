"""Texts that services are still writing when a checkpoint is due: it does without them, and a later wait gets them."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import pytest

from stillhouse.protos.rpc.pool.bounded_wait import BoundedWait
from stillhouse.protos.rpc.pool.load_balancing import Load
from stillhouse.protos.rpc.pool.replica import PoolOptions
from stillhouse.protos.rpc.pool.service_pool import ServicePool
from stillhouse.student_trainer.train.rollouts.rollout_buffer import RolloutBuffer
from stillhouse.student_trainer.train.rollouts.sampler_pool import PendingTexts
from tests.protos.rpc.pool.world import Member, lost

LIMIT_S = 0.5


@pytest.mark.parametrize("is_lost", [True, False], ids=["silent since before", "slow"])
def test_a_checkpoint_that_gives_up_on_late_rollouts_leaves_them_to_the_next_wait(is_lost: bool) -> None:
    member = Member("rollouts", Load(), probe_error=lost() if is_lost else None)
    pool: ServicePool[Any, Any, Any] = ServicePool([member], Member.serve, PoolOptions(name="test-pool"))
    try:
        query: Any = 0
        texts: Any = PendingTexts(pool, {0: query}, ExitStack())
        buffer: Any = RolloutBuffer(pending={(0, 5): texts.result})
        time.sleep(1.5 * LIMIT_S)
        buffer.finish_all(LIMIT_S)
        assert list(buffer.pending) == [(0, 5)]
        member.probe_error = None
        member.gate.set()
        buffer.finish((0, 5), BoundedWait(30))
        assert buffer.rollouts == {(0, 5): ["rollouts"]}
    finally:
        pool.close()
