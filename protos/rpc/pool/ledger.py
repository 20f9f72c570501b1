"""Bookkeeping of a pool: the items of each replica, their results, and the replicas in use. The pool holds a lock around it."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rpc.pool.bounded_wait import Clock, backoff_s
from stillhouse.protos.rpc.pool.load_balancing import Load, earliest_finish
from stillhouse.protos.rpc.pool.replica import Item, Loss, PoolOptions, R

REFUSED_RETRY_S = 20.0
"""Pause before an unusable replica is probed again: an operator may have corrected it."""
MAX_LOSSES = 100
"""Losses that wait to be reported; older ones are dropped."""

LEAST_LATE_S = 1.0
"""Time that an item has at least before it is late."""
NUM_TIMED, LEAST_TIMED = 64, 8
"""Last answers of a replica whose times are kept, and the fewest that tell how long it takes."""

Answer = TypeVar("Answer")


@dataclass(eq=False, slots=True)
class Task(Generic[Item, R]):
    """An unanswered item."""

    item: Item
    cost: int
    attempts: int = 0
    member: Member[R] | None = None
    """The replica that has it."""
    since_s: float = 0.0
    """Time at which it got it."""
    num_moves: int = 0
    """Times that it was late and another replica got it."""
    is_answered: bool = False
    """Its answer is there, though not yet stored."""


@dataclass(eq=False, slots=True)
class Member(Generic[R]):
    """State of one replica in one pool."""

    replica: R
    is_open: bool
    """In use: given items."""
    queue: list[int] = field(default_factory=list)
    """Heap of items that it has and that are not sent."""
    num_owed: int = 0
    """Items that it has, sent or not."""
    last_answer_s: float = 0.0
    not_before_s: float = 0.0
    """Time of its next probe."""
    num_breaks: int = 0
    """Breaks since its last answer."""
    num_same: int = 0
    """Number of the last of these that have the same reason."""
    error: StillhouseError | None = None
    """Error of its last break."""
    refused: StillhouseError | None = None
    """The same, if it cannot recover by itself."""
    times_s: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_TIMED))
    """Times that its last answers took."""
    num_threads: int = 0
    num_busy: int = 0
    """Threads in a call or a probe; these fields are the pool's."""
    is_probed: bool = False
    is_pinged: bool = False
    hang: StillhouseError | None = None
    """Error of its calls that were cancelled because it does not react."""


class Ledger(Generic[Item, Answer, R]):
    """Items by id; a lower id is sent earlier."""

    def __init__(
        self,
        replicas: Sequence[R],
        options: PoolOptions[Item],
        clock: Clock,
        on_change: Callable[[Member[R] | None], None],
    ) -> None:
        """`on_change` is told of a replica that has something to do, and with None that a result or a loss is there."""
        self.members = [Member(each, each.is_ready) for each in replicas]
        self.tasks: dict[int, Task[Item, R]] = {}
        self.failure: BaseException | None = None
        """Error after which no result will come."""
        self.last_error: StillhouseError | None = None
        self.losses: deque[Loss] = deque(maxlen=MAX_LOSSES)
        self._options = options
        self._clock = clock
        self._on_change = on_change
        self._waiting: list[int] = []
        """Heap of items that no replica has."""
        self._results: dict[int, tuple[Answer | StillhouseError, int]] = {}
        """Results with the costs of their items."""
        self._held_cost = 0
        """Cost of everything put and not got."""
        self._last_answer_s = self._all_lost_s = clock.now_s()

    @property
    def is_empty(self) -> bool:
        """True once every result was got."""
        return not (self.tasks or self._results)

    def has_room(self, cost: int) -> bool:
        """Returns whether a replica in use could be given this much more."""
        limit = self._options.window * len(self.members)
        is_bounded = not self._held_cost or self._held_cost + cost <= limit
        return not self._waiting and is_bounded and bool(self._open_members(cost))

    def put(self, items: Mapping[int, Item]) -> None:
        """Adds items."""
        if not self.tasks:
            self._last_answer_s = self._clock.now_s()
        for item_id, item in items.items():
            task = self.tasks[item_id] = Task(item, self._options.cost_of(item))
            self._held_cost += task.cost
            self._wait([item_id])
        self.assign()

    def assign(self) -> None:
        """Gives waiting items to the replicas in use, chunk by chunk."""
        while self._waiting:
            chunk: list[int] = []
            cost = 0
            while self._waiting:
                added = self.tasks[self._waiting[0]].cost
                if chunk and cost + added > self._options.chunk:
                    break
                chunk.append(heapq.heappop(self._waiting))
                cost += added
            members = self._open_members(cost)
            if not members:
                self._wait(chunk)
                return
            self._give(chunk, members)

    def take_late(self) -> dict[Member[R], list[int]]:
        """Gives free replicas the items for which others take far longer than they do; returns these by the replica that had them.

        An item has twice the time after each move, so that one that takes any replica longer than the last ones is answered.
        """
        free = [
            each
            for each in self.members
            if each.is_open and not each.num_owed and len(each.times_s) >= LEAST_TIMED
        ]
        late: dict[Member[R], list[int]] = {}
        if not free:
            return late
        limit_s = max(LEAST_LATE_S, self._options.late * min(max(each.times_s) for each in free))
        now_s = self._clock.now_s()
        for item_id, task in self.tasks.items():
            is_late = now_s - task.since_s > limit_s * 2**task.num_moves
            if is_late and task.member is not None and not task.is_answered:
                late.setdefault(task.member, []).append(item_id)
        for member, item_ids in late.items():
            member.queue = sorted(set(member.queue).difference(item_ids))
            for item_id in item_ids:
                self._withdraw(self.tasks[item_id])
                self.tasks[item_id].num_moves += 1
                self._give([item_id], free)
        return late

    def _give(self, item_ids: Sequence[int], members: Sequence[Member[R]]) -> None:
        """Gives items together to one of some replicas."""
        cost = sum(self.tasks[each].cost for each in item_ids)
        member = members[earliest_finish([each.replica.load for each in members], cost)]
        if not member.num_owed:
            member.last_answer_s = self._clock.now_s()
        for item_id in item_ids:
            task = self.tasks[item_id]
            task.member, task.since_s = member, self._clock.now_s()
            member.num_owed += 1
            member.replica.load.assign(task.cost)
            heapq.heappush(member.queue, item_id)
        self._on_change(member)

    def take(self, member: Member[R], fits: Callable[[Item], bool]) -> dict[int, Item]:
        """Removes the items that `fits` accepts from a replica's queue: they are sent."""
        taken = {each: item for each in sorted(member.queue) if fits(item := self.tasks[each].item)}
        member.queue = sorted(each for each in member.queue if each not in taken)
        if member.queue:
            self._on_change(member)
        return taken

    def take_first(self, member: Member[R]) -> tuple[int, Item]:
        """Removes the item with the lowest id from a replica's queue: it is sent."""
        item_id = heapq.heappop(member.queue)
        return item_id, self.tasks[item_id].item

    def finish(self, item_id: int, answer: Answer | StillhouseError) -> None:
        """Stores the result of an item."""
        task = self.tasks.pop(item_id)
        member = task.member
        if member is not None:
            member.num_owed -= 1
            member.num_breaks = member.num_same = 0
            member.last_answer_s = self._last_answer_s = self._clock.now_s()
            member.times_s.append(member.last_answer_s - task.since_s)
            member.replica.load.complete(task.cost)
        self._results[item_id] = answer, task.cost
        self._on_change(None)

    def get(self, item_id: int | None) -> tuple[int, Answer | StillhouseError] | None:
        """Removes and returns the result of an item, or the first that came."""
        found = next(iter(self._results), None) if item_id is None else item_id
        if found is None or found not in self._results:
            return None
        result, cost = self._results.pop(found)
        self._held_cost -= cost
        self._on_change(None)
        return found, result

    def requeue(self, item_ids: Iterable[int], error: StillhouseError | None = None) -> None:
        """Takes items back from a replica; `error` counts as an attempt of each of them."""
        for item_id in item_ids:
            task = self.tasks[item_id]
            self._withdraw(task)
            task.attempts += error is not None
            if error is not None and task.attempts == self._options.max_attempts:
                self.finish(item_id, error)
            else:
                self._wait([item_id])

    def open(self, member: Member[R]) -> None:
        """Uses a replica."""
        member.is_open, member.refused = True, None
        member.last_answer_s = self._clock.now_s()
        self.assign()
        self._on_change(None)

    def lose(self, member: Member[R], error: StillhouseError, *, num_left: int) -> None:
        """Leaves a replica alone for a while, and takes back what it has not sent; `num_left` items more are its calls'."""
        was_open, member.is_open = member.is_open, False
        member.replica.load.num_breaks += was_open
        is_same = member.error is not None and member.error.reason is error.reason
        member.num_same = member.num_same + 1 if is_same else 1
        is_passing = self._options.is_passing(error, member.num_same)
        pause_s = backoff_s(member.num_breaks, error) if is_passing else REFUSED_RETRY_S
        member.num_breaks += 1
        member.not_before_s = self._clock.now_s() + pause_s
        member.error = self.last_error = error
        member.refused = None if is_passing else error
        queued, member.queue = member.queue, []
        self.requeue(queued)
        if was_open and not any(each.is_open for each in self.members):
            self._all_lost_s = self._clock.now_s()
        refusals = [each.refused for each in self.members if each.refused is not None]
        if len(refusals) == len(self.members):
            self.failure = self.failure or _all_refused(refusals)
        num_requeued = num_left + len(queued)
        self.losses.append(Loss(member.replica.target, error, pause_s, was_open, is_passing, num_requeued))
        self._on_change(member)
        self._on_change(None)

    def silent_since(self) -> float | None:
        """Returns the time since which no replica answers, None while one does."""
        if not any(member.is_open for member in self.members):
            return max(self._last_answer_s, self._all_lost_s)
        is_silent = self._clock.now_s() - self._last_answer_s > self._options.silence_s
        return self._last_answer_s if is_silent else None

    def clear(self) -> None:
        """Drops what is unanswered."""
        for task in self.tasks.values():
            self._withdraw(task)
        self.tasks.clear()
        self._waiting.clear()
        for member in self.members:
            member.queue.clear()

    def _withdraw(self, task: Task[Item, R]) -> None:
        if task.member is not None:
            task.member.num_owed -= 1
            task.member.replica.load.withdraw(task.cost)
            task.member = None

    def _wait(self, item_ids: Iterable[int]) -> None:
        for item_id in item_ids:
            heapq.heappush(self._waiting, item_id)

    def _open_members(self, cost: int) -> list[Member[R]]:
        def has_room(load: Load) -> bool:
            return not load.num_outstanding or load.outstanding_cost + cost <= self._options.window

        return [each for each in self.members if each.is_open and has_room(each.replica.load)]


def _all_refused(refusals: Sequence[StillhouseError]) -> StillhouseError:
    first = refusals[0]
    if len(refusals) == 1:
        return first
    sentences = " ".join(dict.fromkeys(each.message for each in refusals))
    return StillhouseError(
        first.reason,
        f"None of the {len(refusals)} services can be used. {sentences}",
        metadata=first.metadata,
    )
