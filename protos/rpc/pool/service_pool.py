"""Shares items over the replicas of one service: every item is answered once, however often replicas are lost.

Each item goes to the replica that is expected to finish it first. A replica that breaks is left alone for a backoff and
probed before it is used again; what it left unanswered goes to the others, and so may what a slow one has, once another is free. Calls run on the pool's threads; the caller's
thread puts items and gets results.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.pool.bounded_wait import POLL_S, BoundedWait, Clock
from stillhouse.protos.rpc.pool.ledger import Answer, Ledger, Member
from stillhouse.protos.rpc.pool.replica import Item, Loss, PoolOptions, R

PING_AFTER_S = 10.0
"""A replica that has unanswered items and is silent for this long is pinged."""
PING_EVERY_S = 1.0
"""Time between two looks for silent replicas."""
CLOSE_S = 5.0
"""Time that the threads have to end."""


class Call(Generic[Item, Answer]):
    """One call to one replica: takes items from its queue and reports their results."""

    def __init__(self, pool: ServicePool[Item, Answer, Any], member: Member[Any]) -> None:
        self._pool = pool
        self._member = member
        self._is_probe = not member.is_open
        self._is_over = False
        self._cancel: Callable[[], object] = lambda: None
        self._counted: StillhouseError | None = None
        self._unanswered: dict[int, Item] = {}

    def on_cancel(self, cancel: Callable[[], object]) -> None:
        """Sets the function with which another thread ends the call; runs it if the pool is closed already."""
        with self._pool._lock:
            self._cancel = cancel
            is_closed = self._pool._is_closed
        if is_closed:
            cancel()

    def take(self, fits: Callable[[Item], bool] = lambda _: True) -> dict[int, Item]:
        """Takes the queued items that `fits` accepts, lowest id first, without waiting."""
        with self._pool._lock:
            taken = self._pool._ledger.take(self._member, fits)
            self._pool.num_sent += len(taken)
            self._unanswered |= taken
            return taken

    def next_item(self) -> tuple[int, Item] | None:
        """Waits for the next item; None once the call is over, or no item is queued and none will be put."""
        pool, member = self._pool, self._member
        with pool._lock:
            while not (self._is_over or pool._is_closed or (pool._is_complete and not member.queue)):
                if member.queue and member.is_open:
                    item_id, item = pool._ledger.take_first(member)
                    self._unanswered[item_id] = item
                    pool.num_sent += 1
                    return item_id, item
                pool._clock.wait(pool._work, None)
            return None

    def item(self, item_id: int) -> Item | None:
        """Returns an item that this call has taken and not answered."""
        return self._unanswered.get(item_id)

    def answer(
        self, item_id: int, answer: Answer | StillhouseError, *, first: Callable[[], object] = lambda: None
    ) -> None:
        """Sets the result of an item; without effect if the call does not have it any longer.

        `first` runs in this thread, once for every item that is answered, before its result can be got.
        """
        ledger = self._pool._ledger
        with self._pool._lock:
            item = self._unanswered.pop(item_id, None)
            if item is not None and item_id in ledger.tasks:
                ledger.tasks[item_id].is_answered = True
        if item is None:
            return
        try:
            first()
        except BaseException:
            with self._pool._lock:
                self._unanswered[item_id] = item
                if item_id in ledger.tasks:
                    ledger.tasks[item_id].is_answered = False
            raise
        with self._pool._lock:
            if item_id in ledger.tasks:  # the pool is not closed
                ledger.finish(item_id, answer)
                ledger.assign()

    def retry(self, item_id: int, error: StillhouseError) -> bool:
        """Gives one item back to be asked again, and leaves the replica alone for a while; the call may continue.

        False if the item was lost too often: then `error` is its result.
        """
        with self._pool._lock:
            if self._unanswered.pop(item_id, None) is None:
                return True
            self._pool._break(self, error, [item_id])
            self._counted = error
            return item_id in self._pool._ledger.tasks


class ServicePool(Generic[Item, Answer, R]):
    """Items in by id, results out as they come or in the caller's order; a lower id is sent earlier."""

    def __init__(
        self,
        replicas: Sequence[R],
        serve: Callable[[R, Call[Item, Answer]], None],
        options: PoolOptions[Item],
        *,
        on_lost: Callable[[Loss], None] = lambda _: None,
        on_late: Callable[[str, int], None] = lambda _target, _number: None,
        clock: Clock | None = None,
    ) -> None:
        """`serve` makes one call on a thread of the pool; what it leaves unanswered is asked again.

        It raises StillhouseError when the call breaks; anything else that it raises ends the pool.
        `on_lost` runs in the thread that gets results, and so does `on_late`, which is told of a replica whose items another one gets.
        """
        self._serve = serve
        self._options = options
        self._on_lost = on_lost
        self._on_late = on_late
        self._clock = clock or Clock()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        """Notified when a replica has something to do."""
        self._changed = threading.Condition(self._lock)
        """Notified when there is a result, room or a loss."""
        self.num_sent = 0
        """Items sent, repetitions included."""
        self._is_complete = self._is_closed = False
        self._next_ping_s = 0.0
        self._calls: set[Call[Item, Answer]] = set()
        self._threads: list[threading.Thread] = []
        self._ledger: Ledger[Item, Answer, R] = Ledger(replicas, options, self._clock, self._wake)
        with self._lock:
            for member in self._ledger.members:
                self._wake(member)

    @property
    def last_error(self) -> StillhouseError | None:
        """The error of the last loss."""
        return self._ledger.last_error

    @property
    def is_done(self) -> bool:
        """True once nothing more will be put, every result was got and every call has ended."""
        with self._lock:
            return self._is_complete and self._ledger.is_empty and not self._calls

    def has_room(self, cost: int) -> bool:
        """Returns whether a replica in use could be given this much more."""
        with self._lock:
            return self._ledger.has_room(cost)

    def put(self, items: Mapping[int, Item]) -> None:
        """Adds items to be answered."""
        with self._lock:
            self._ledger.put(items)

    def put_when_room(self, item_id: int, item: Item) -> bool:
        """Adds an item once there is room for it; False if the pool was closed meanwhile."""
        with self._lock:
            while not (self._is_closed or self._ledger.has_room(self._options.cost_of(item))):
                self._clock.wait(self._changed, None)
            if not self._is_closed:
                self._ledger.put({item_id: item})
            return not self._is_closed

    def complete(self) -> None:
        """Declares that nothing more will be put, so that streaming calls end."""
        with self._lock:
            self._is_complete = True
            self._notify_all()

    def poll(
        self, wait: BoundedWait, item_id: int | None = None
    ) -> tuple[int, Answer | StillhouseError] | None:
        """Waits a moment for the result of `item_id`, or for any; None if there is none yet.

        Raises what `wait` raises; why no replica can be used; and what `serve` raised unexpectedly.
        """
        ledger = self._ledger
        with self._lock:
            result = ledger.get(item_id)
            if result is None and ledger.failure is None:
                self._clock.wait(self._changed, POLL_S)
                result = ledger.get(item_id)
            failure, silent_since_s, error = ledger.failure, ledger.silent_since(), ledger.last_error
            late = [] if result is not None else self._move_late()
            losses = [ledger.losses.popleft() for _ in range(len(ledger.losses))]
        for loss in losses:
            self._on_lost(loss)
        for target, number in late:
            self._on_late(target, number)
        if result is not None:
            wait.answered()
            return result
        if failure is not None:
            raise failure
        self._ping_silent()
        wait.check(silent_since_s, error)
        return None

    def get_result(self, item_id: int, wait: BoundedWait) -> Answer:
        """Waits for the answer to an item. Raises its error, and what `poll` raises."""
        while (result := self.poll(wait, item_id)) is None:
            pass
        if isinstance(result[1], StillhouseError):
            raise result[1]
        return result[1]

    def close(self) -> None:
        """Cancels the calls and ends the threads; what is unanswered is dropped."""
        with self._lock:
            self._is_closed = True
            self._ledger.clear()
            calls = list(self._calls)
            for call in calls:
                call._unanswered.clear()
            self._notify_all()
        for call in calls:
            call._cancel()
        until_s = self._clock.now_s() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, until_s - self._clock.now_s()))

    def _wake(self, member: Member[R] | None) -> None:
        """Notifies the caller, or the threads of a replica; starts one more if all of them are busy."""
        if member is None:
            self._changed.notify_all()
            return
        self._work.notify_all()
        if member.num_busy == member.num_threads < self._options.max_calls:
            member.num_threads += 1
            self._start(self._run, member)

    def _start(self, target: Callable[[Member[R]], None], member: Member[R]) -> None:
        if not self._is_closed:
            self._threads = [each for each in self._threads if each.is_alive()]
            name = f"{self._options.name}-{len(self._threads)}"
            self._threads.append(threading.Thread(target=target, args=(member,), name=name, daemon=True))
            self._threads[-1].start()

    def _notify_all(self) -> None:
        self._work.notify_all()
        self._changed.notify_all()

    def _break(self, call: Call[Item, Answer], error: StillhouseError, left: Sequence[int]) -> None:
        """Leaves a call's replica alone, unless another call broke before, and requeues `left`."""
        if call._member.is_open or call._is_probe:
            self._ledger.lose(call._member, error, num_left=len(left))
        is_counted = self._options.counts(error) and error is not call._counted
        self._ledger.requeue(left, error if is_counted else None)
        self._ledger.assign()

    # The pool's threads run what follows.

    def _run(self, member: Member[R]) -> None:
        try:
            while (call := self._begin(member)) is not None:
                error = None
                try:
                    member.replica.probe()
                    if self._open(member, call):
                        self._serve(member.replica, call)
                except StillhouseError as caught:
                    error = caught
                self._end(member, call, error)
        except BaseException as error:  # raised where results are got
            with self._lock:
                self._ledger.failure = self._ledger.failure or error
                self._changed.notify_all()

    def _begin(self, member: Member[R]) -> Call[Item, Answer] | None:
        """Waits until the replica has work or is due for a probe; None once the pool is closed."""
        with self._lock:
            while not self._is_closed:
                left_s = None
                if not (member.is_open or member.is_probed):
                    left_s = member.not_before_s - self._clock.now_s()
                if (member.is_open and member.queue) or (left_s is not None and left_s <= 0):
                    member.is_probed = not member.is_open
                    member.num_busy += 1
                    return Call(self, member)
                self._clock.wait(self._work, left_s)
            return None

    def _open(self, member: Member[R], call: Call[Item, Answer]) -> bool:
        """Uses a replica whose probe succeeded; False if it has nothing to do."""
        with self._lock:
            if call._is_probe:
                call._is_probe = member.is_probed = False
                member.hang = None
                self._ledger.open(member)
            is_used = member.is_open and bool(member.queue) and not self._is_closed
            if is_used:
                self._calls.add(call)
            return is_used

    def _end(self, member: Member[R], call: Call[Item, Answer], error: StillhouseError | None) -> None:
        """Requeues what a call left unanswered; `error` says why it broke."""
        with self._lock:
            call._is_over = True
            self._calls.discard(call)
            member.num_busy -= 1
            self._notify_all()
            if call._unanswered and error is None:
                error = StillhouseError(
                    Reason.TEACHER_UNREACHABLE,
                    f"The service at {member.replica.target} ended a call before everything was answered; it may be "
                    "restarting.",
                )
            if error is not None and not self._is_closed:
                self._break(call, member.hang or error, list(call._unanswered))
            member.is_probed &= not call._is_probe

    def _move_late(self) -> list[tuple[str, int]]:
        """Gives free replicas what takes others too long, and asks these whether they are alive; their targets and numbers of items."""
        if math.isinf(self._options.late):
            return []
        moved = self._ledger.take_late()
        for member, item_ids in moved.items():
            for call in self._calls:
                if call._member is member:
                    for item_id in item_ids:
                        call._unanswered.pop(item_id, None)
            if member.is_open and not member.is_pinged:
                member.is_pinged = True
                self._start(self._ping, member)
        return [(member.replica.target, len(item_ids)) for member, item_ids in moved.items()]

    def _ping_silent(self) -> None:
        """Asks replicas that have items and do not answer whether they are alive. Never blocks."""
        with self._lock:
            now_s = self._clock.now_s()
            if now_s < self._next_ping_s:
                return
            self._next_ping_s = now_s + PING_EVERY_S
            for member in self._ledger.members:
                is_silent = member.is_open and member.num_owed and now_s - member.last_answer_s > PING_AFTER_S
                if is_silent and not member.is_pinged:
                    member.is_pinged = True
                    self._start(self._ping, member)

    def _ping(self, member: Member[R]) -> None:
        """Ends the calls of a replica that does not react; one that is merely busy says so."""
        error: Exception | None = None
        try:
            member.replica.ping()
        except Exception as caught:  # whatever it is, the calls end with it
            error = caught
        with self._lock:
            member.is_pinged = False
            member.last_answer_s = self._clock.now_s()
            if error is None or not member.is_open:
                return
            member.hang = StillhouseError(
                Reason.CALL_TIMEOUT,
                f"The service at {member.replica.target} has answered nothing for {PING_AFTER_S:g} s, and does not say that "
                f"it is there: {error} It may hang: see its log.",
            )
            calls = [call for call in self._calls if call._member is member]
        for call in calls:
            call._cancel()
