"""The checker of histories accepts what can have happened, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest

from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from tests.faults.history import STEP_METRIC, Operations, check_history

STEPS = 5
Events = list[pb.WatchRunResponse]


def legal() -> tuple[Events, Operations]:
    """A run that was killed behind step 3, with a checkpoint at step 2, and resumed."""
    events: Events = []
    run = Run(name="runs/aaaaaaaaaaaa")

    def tell(state: Run.State.ValueType) -> None:
        run.state = state
        events.append(pb.WatchRunResponse(sequence=len(events) + 2, run=run))

    def attempt(first: int, last: int) -> None:
        number = len(run.attempts) + 1
        run.attempts.add(number=number)
        tell(Run.STATE_STARTING)
        tell(Run.STATE_RUNNING)
        for step in range(first, last + 1):
            point = pb.MetricPoint(attempt=number, step=step, values={STEP_METRIC: 1 / step})
            events.append(pb.WatchRunResponse(sequence=len(events) + 2, metrics=point))
        run.attempts[-1].first_step, run.attempts[-1].last_step = first, last
        run.attempts[-1].end_time.FromSeconds(1000 + number)

    attempt(1, 3)
    tell(Run.STATE_FAILED)
    tell(Run.STATE_PENDING)
    attempt(3, STEPS)
    tell(Run.STATE_COMPLETED)
    operations = Operations()
    operations.answered["resume"] = 1
    return events, operations


def test_a_resumed_run_is_legal_also_if_the_reply_was_lost() -> None:
    events, operations = legal()
    check_history(events, operations, total_steps=STEPS)
    lost = Operations()
    lost.lost["resume"] = 2
    check_history(events, lost, total_steps=STEPS)


def find(events: Events, wanted: Callable[[pb.WatchRunResponse], bool]) -> pb.WatchRunResponse:
    return next(event for event in events if wanted(event))


def step(number: int, attempt: int) -> Callable[[pb.WatchRunResponse], bool]:
    return lambda event: (event.metrics.step, event.metrics.attempt) == (number, attempt)


def state(value: Run.State.ValueType) -> Callable[[pb.WatchRunResponse], bool]:
    return lambda event: event.run.state == value


def lose(event: pb.WatchRunResponse) -> Callable[[Events], Events]:
    """The history without an event, and without a gap where it was."""

    def without(events: Events) -> Events:
        left = [each for each in events if each.sequence != event.sequence]
        for number, each in enumerate(left):
            each.sequence = number + 2
        return left

    return without


def double(event: pb.WatchRunResponse) -> Callable[[Events], Events]:
    def twice(events: Events) -> Events:
        found = [
            each
            for known in events
            for each in ([known, copy.deepcopy(known)] if known == event else [known])
        ]
        for number, each in enumerate(found):
            each.sequence = number + 2
        return found

    return twice


def spoiled() -> Sequence[tuple[str, Events]]:
    """Histories that cannot be, by what is wrong with them."""

    def change(name: str, make: Callable[[Events], Events | None]) -> tuple[str, Events]:
        events = legal()[0]
        return name, make(events) or events

    def losses_differ(events: Events) -> None:
        find(events, step(3, 2)).metrics.values[STEP_METRIC] = 9.0

    def ends_again(events: Events) -> None:
        events[-1].run.attempts[0].end_time.FromSeconds(5)

    def never_ended(events: Events) -> None:
        for event in events:
            if event.run.attempts:
                event.run.attempts[0].ClearField("end_time")

    def is_taken_back(events: Events) -> None:
        del events[-1].run.attempts[1]

    events = legal()[0]
    return [
        change("a gap", lambda events: [each for each in events if each.sequence != 5]),
        change("a step is lost", lose(find(events, step(2, 1)))),
        change("a step is lost between attempts", lose(find(events, step(3, 2)))),
        change("a step is told twice", double(find(events, step(4, 2)))),
        change("another loss at the same step", losses_differ),
        change("no arrow", lose(find(events, state(Run.STATE_PENDING)))),
        change("it never completes", lose(events[-1])),
        change("an attempt ends twice", ends_again),
        change("an attempt never ends", never_ended),
        change("an attempt is taken back", is_taken_back),
    ]


@pytest.mark.parametrize(("what", "events"), spoiled(), ids=[name for name, _ in spoiled()])
def test_what_cannot_have_happened_is_refused(what: str, events: Events) -> None:
    with pytest.raises(AssertionError):
        check_history(events, legal()[1], total_steps=STEPS)


def test_a_resume_that_nobody_asked_for_or_that_was_answered_and_lost_is_refused() -> None:
    events, operations = legal()
    with pytest.raises(AssertionError):
        check_history(events, Operations(), total_steps=STEPS)
    operations.answered["resume"] = 2
    with pytest.raises(AssertionError):
        check_history(events, operations, total_steps=STEPS)
