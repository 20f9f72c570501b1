"""Retention: deletes runs that ended longer ago than the operator's limit, with their files, and prepared data beyond it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.prepared_store import PreparedStore
from stillhouse.student_trainer.runs.store.database import DatabaseThread
from stillhouse.student_trainer.runs.store.queries import now_us
from stillhouse.student_trainer.runs.store.store import Store

SWEEP_S = 600.0
"""Interval between sweeps."""
AT_ONCE = 100
DAY_US = 86_400_000_000

log = structlog.get_logger(__name__)


async def sweep(
    store: Store, db: DatabaseThread, keep_days: float, remove: Callable[[str], Awaitable[None]]
) -> int:
    """Deletes runs that ended more than `keep_days` ago by `remove`, called with an id; returns their number."""
    removed = 0
    while True:
        ids = await db(store.ended_before, now_us() - round(keep_days * DAY_US), limit=AT_ONCE)
        for run_id in ids:
            try:
                await remove(run_id)
            except StillhouseError as error:
                # Resumed or deleted meanwhile.
                if error.reason not in (Reason.RUN_STATE, Reason.RUN_NOT_FOUND):
                    raise
            else:
                removed += 1
                log.info("run removed", run=run_id, keep_days=keep_days)
        if len(ids) < AT_ONCE:
            return removed


async def keep_sweeping(
    store: Store, db: DatabaseThread, keep_days: float, remove: Callable[[str], Awaitable[None]]
) -> None:
    """Sweeps until cancelled; failures are retried at the next sweep."""
    while True:
        try:
            await sweep(store, db, keep_days, remove)
        except Exception:
            log.exception("old runs not removed")
        await asyncio.sleep(SWEEP_S)


async def keep_cleaning(prepared: PreparedStore, *, max_bytes: int, keep_days: float) -> None:
    """Keeps prepared data within its bounds until cancelled; failures are retried at the next sweep."""
    while True:
        try:
            freed = await asyncio.to_thread(prepared.clean, max_bytes=max_bytes, keep_days=keep_days)
            if freed:
                log.info("prepared data removed", bytes=freed)
        except OSError:
            log.exception("prepared data not removed")
        await asyncio.sleep(SWEEP_S)
