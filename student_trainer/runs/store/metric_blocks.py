"""Blocks of consecutive metric points, downsampled, so that the curves of a long run are read quickly.

A block of level 1 stands for BLOCK_POINTS points, one of a further level for FAN_OUT blocks of the level below; it has
the first, least, greatest and last value of each metric. The points themselves stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import ColumnElement, Connection, RowMapping, func, insert, select

from stillhouse.protos.stillhouse.v1.run_pb2 import MetricPoint, QueryMetricsResponse
from stillhouse.student_trainer.runs.store.metric_series import Measured, to_series
from stillhouse.student_trainer.runs.store.schema import events, metric_blocks

BLOCK_POINTS, FAN_OUT, LEVELS = 32, 8, 5
KEPT_POINTS = 4
POINTS_AT_ONCE = 8192
"""Points that one call of `extend` makes blocks of."""
COARSE_LEVEL = 3
"""Level of few blocks, which tell where in the history a range of steps lies."""
_B, _E = metric_blocks.c, events.c


@dataclass(frozen=True, slots=True)
class Stored:
    """A serialised measurement, or block of them, which need not be parsed on the database's thread."""

    payload: bytes
    is_block: bool

    def parse(self) -> Measured:
        """The message."""
        return (QueryMetricsResponse if self.is_block else MetricPoint).FromString(self.payload)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Range:
    """Steps, and the parts of a run's history that have all of them."""

    run_id: str
    start: int
    end: int | None
    windows: Sequence[tuple[int, int | None]] = ((1, None),)
    """First and last sequence of each part, in order; without a last one up to the end."""

    @property
    def everywhere(self) -> _Range:
        """The same steps in the whole history."""
        return replace(self, windows=((1, None),))

    def points(self, after: int = 0) -> Iterator[ColumnElement[bool]]:
        """Conditions on events behind a sequence, one for each window."""
        steps = (_E.run_id == self.run_id) & (_E.kind == "metrics") & (_E.step >= self.start)
        if self.end is not None:
            steps &= _E.step < self.end
        for first, last in self.windows:
            window = steps & (_E.sequence >= max(first, after + 1))
            yield window if last is None else window & (_E.sequence <= last)

    def blocks(self, level: int, after: int = 0) -> Iterator[ColumnElement[bool]]:
        """Conditions on the blocks of a level behind a sequence."""
        steps = (_B.run_id == self.run_id) & (_B.level == level) & (_B.last_step >= self.start)
        if self.end is not None:
            steps &= _B.first_step < self.end
        for first, last in self.windows:
            window = steps & (_B.last_sequence >= max(first, after + 1))
            yield window if last is None else window & (_B.last_sequence <= last)


def extend(db: Connection, run_id: str, last_sequence: int) -> bool:
    """Makes the blocks that are due up to event `last_sequence`; True if there may be more than one call makes."""
    after = _covered(db, run_id, 1)
    if last_sequence - after < BLOCK_POINTS:
        return False
    whole = _Range(run_id=run_id, start=0, end=None)
    found = _select_points(db, whole, after=after, limit=POINTS_AT_ONCE)
    made = 0
    for chunk in _chunks(found, BLOCK_POINTS):
        _insert(db, run_id, 1, chunk, [Stored(each["payload"], is_block=False) for each in chunk])
        made += 1
    for level in range(2, LEVELS + 1) if made else ():
        found = _select_blocks(db, whole, level - 1, after=_covered(db, run_id, level))
        for chunk in _chunks(found, FAN_OUT):
            _insert(db, run_id, level, chunk, _exact(db, chunk, whole))
    return made * BLOCK_POINTS == POINTS_AT_ONCE


def read(db: Connection, run_id: str, *, start: int, end: int | None, max_points: int) -> list[Stored]:
    """Measurements with the steps in [start, end), and some around them, in order of measurement.

    They are blocks where these suffice to downsample to `max_points`, else points.
    """
    wanted = _Range(run_id=run_id, start=start, end=end, windows=_windows(db, run_id, start, end))
    blocks: list[RowMapping] = []
    after = 0
    for level in range(_level(db, wanted, max_points), 0, -1):
        window = wanted if level < COARSE_LEVEL else wanted.everywhere
        blocks += _select_blocks(db, window, level, after=after)
        after = max(after, _covered(db, run_id, level))
    points = _select_points(db, wanted, after=after)
    least = min((each["step"] for each in points), default=math.inf)
    rest = [Stored(each["payload"], is_block=False) for each in points]
    return [*_exact(db, blocks, wanted, least), *rest]


def _windows(db: Connection, run_id: str, start: int, end: int | None) -> list[tuple[int, int | None]]:
    """The part of the coarse blocks that has steps in [start, end), if any, and what lies behind all of them."""
    behind = _covered(db, run_id, COARSE_LEVEL) + 1
    (condition,) = _Range(run_id=run_id, start=start, end=end).blocks(COARSE_LEVEL)
    first, last = db.execute(
        select(func.min(_B.first_sequence), func.max(_B.last_sequence)).where(condition)
    ).one()
    return [(behind, None)] if first is None else [(first, last), (behind, None)]


def _level(db: Connection, wanted: _Range, max_points: int) -> int:
    """The coarsest level with enough blocks for `max_points`; 0 if none has."""
    for level in range(LEVELS, 0, -1):
        window = wanted if level < COARSE_LEVEL else wanted.everywhere
        counts = (select(func.count()).where(each) for each in window.blocks(level))
        if KEPT_POINTS * sum(int(db.execute(each).scalar_one()) for each in counts) >= max_points:
            return level
    return 0


def _exact(
    db: Connection, blocks: Sequence[RowMapping], wanted: _Range, least: float = math.inf
) -> list[Stored]:
    """The blocks; in place of some of them those below, or points.

    These are the ones that reach out of the wanted steps, and the ones that a rollback has cut, to step `least` behind all of
    them or to the steps of a later one: what they have kept may lie outside, or was rolled back.
    """
    result: list[Stored] = []
    for block in reversed(blocks):
        first, last = block["first_step"], block["last_step"]
        reaches_out = first < wanted.start or (wanted.end is not None and last >= wanted.end)
        if not reaches_out and not first <= least < last:
            result.append(Stored(block["payload"], is_block=True))
            least = min(least, first)
            continue
        window = ((block["first_sequence"], block["last_sequence"]),)
        inside = replace(wanted, windows=window)
        if block["level"] == 1:
            points = _select_points(db, inside)
            result += (Stored(each["payload"], is_block=False) for each in reversed(points))
        else:
            finer = _select_blocks(db, inside, block["level"] - 1)
            result += reversed(_exact(db, finer, wanted, least))
        least = min(least, first)
    return result[::-1]


def _select_blocks(db: Connection, wanted: _Range, level: int, *, after: int = 0) -> list[RowMapping]:
    found: list[RowMapping] = []
    for condition in wanted.blocks(level, after):
        query = select(metric_blocks).where(condition).order_by(_B.last_sequence)
        found += db.execute(query).mappings().all()
    return found


def _select_points(
    db: Connection, wanted: _Range, *, after: int = 0, limit: int | None = None
) -> list[RowMapping]:
    found: list[RowMapping] = []
    for condition in wanted.points(after):
        query = select(_E.sequence, _E.step, _E.payload).where(condition).order_by(_E.sequence).limit(limit)
        found += db.execute(query).mappings().all()
    return found


def _insert(
    db: Connection, run_id: str, level: int, chunk: Sequence[RowMapping], measured: Sequence[Stored]
) -> None:
    """Stores the block of some points or blocks."""
    series = to_series((each.parse() for each in measured), max_points=KEPT_POINTS)
    of_points = level == 1
    db.execute(
        insert(metric_blocks).values(
            run_id=run_id,
            level=level,
            first_sequence=chunk[0]["sequence" if of_points else "first_sequence"],
            last_sequence=chunk[-1]["sequence" if of_points else "last_sequence"],
            first_step=min(each["step" if of_points else "first_step"] for each in chunk),
            last_step=max(each["step" if of_points else "last_step"] for each in chunk),
            payload=QueryMetricsResponse(series=series).SerializeToString(deterministic=True),
        )
    )


def _covered(db: Connection, run_id: str, level: int) -> int:
    """The last event that blocks of a level stand for; 0 if there are none."""
    query = select(func.coalesce(func.max(_B.last_sequence), 0)).where(_B.run_id == run_id, _B.level == level)
    return int(db.execute(query).scalar_one())


def _chunks(found: Sequence[RowMapping], size: int) -> Iterator[Sequence[RowMapping]]:
    """Whole chunks; what is left over waits for more."""
    for at in range(0, len(found) - size + 1, size):
        yield found[at : at + size]
