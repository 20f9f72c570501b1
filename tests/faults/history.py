"""Checks the history of a run, as its service told it, against what can have happened: a model that every history must obey."""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from stillhouse.protos.rpc.channel import connect
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.protos.stillhouse.v1.run_pb2_grpc import RunServiceStub
from stillhouse.student_trainer.runs.store.run_state import (
    ENDED,
    LIVE,
    PENDING,
    STARTING,
    may_become,
    state_name,
)

STEP_METRIC = "train/loss"


@dataclass(kw_only=True)
class Operations:
    """Requests for one run: answered calls, and those whose reply was lost, which may have counted or not."""

    answered: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    lost: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def most(self, verb: str) -> int:
        """Least and most times that it can have taken effect."""
        return self.answered[verb] + self.lost[verb]


class Watcher(threading.Thread):
    """Watches a run as a client does: through every break it goes on after the last sequence that it saw."""

    def __init__(self, target: str, name: str) -> None:
        super().__init__(name=f"watch {name}", daemon=True)
        self._target = target
        self._name = name
        self._ended = threading.Event()
        self.seen: list[pb.WatchRunResponse] = []
        self.num_breaks = 0
        """Watches that broke after at least one message."""

    def run(self) -> None:
        """Until `stop`, and the end of the run after it: the service ends a watch with the run, which a resume makes untrue."""
        while not (self._ended.is_set() and self.seen and self.seen[-1].run.state in ENDED):
            after = self.seen[-1].sequence if self.seen else 0
            with connect(self._target) as channel:
                call = RunServiceStub(channel).WatchRun(
                    pb.WatchRunRequest(name=self._name, after_sequence=after), timeout=600
                )
                heard = False
                try:
                    for event in call:
                        heard = True
                        # The first message of a watch without a cursor is the run as it is, at a sequence told before.
                        if event.sequence > after or not self.seen:
                            self.seen.append(event)
                            after = event.sequence
                except grpc.RpcError:
                    self.num_breaks += heard
            time.sleep(0.05)

    def stop(self) -> None:
        """Called once the run has ended for good; returns when the watch has told so, however far behind it was."""
        self._ended.set()
        self.join(120)
        assert not self.is_alive(), "a watch does not reach the end of its run"


def history(stub: RunServiceStub, name: str) -> list[pb.WatchRunResponse]:
    """Everything that the service remembers of a run that has ended, from its first event."""
    return list(stub.WatchRun(pb.WatchRunRequest(name=name, after_sequence=1), timeout=60))


def check_history(events: Sequence[pb.WatchRunResponse], operations: Operations, *, total_steps: int) -> None:
    """Return if a COMPLETED run can have come to its end like this."""
    check_sequences(events)
    runs = [event.run for event in events if event.HasField("run")]
    check_states(runs, operations)
    check_attempts(runs)
    check_steps([event.metrics for event in events if event.HasField("metrics")], runs[-1], total_steps)


def check_sequences(events: Sequence[pb.WatchRunResponse]) -> None:
    """Every event once, none left out."""
    sequences = [event.sequence for event in events]
    assert sequences == list(range(sequences[0], sequences[0] + len(sequences)))


def check_states(runs: Sequence[Run], operations: Operations) -> None:
    """Each change of state is an arrow; people's arrows were asked for, and what was answered happened."""
    states = [state for state, _ in itertools.groupby(run.state for run in runs)]
    resumed = 0
    for before, after in itertools.pairwise(states):
        assert may_become(before, after), f"{state_name(before)} -> {state_name(after)}"
        resumed += before in ENDED and after == PENDING
    assert operations.answered["resume"] <= resumed <= operations.most("resume")
    stops = sum(state == Run.STATE_STOPPING for state in states)
    assert stops <= operations.most("stop")
    assert states[-1] == Run.STATE_COMPLETED
    assert states.count(Run.STATE_COMPLETED) == 1


def check_attempts(runs: Sequence[Run]) -> None:
    """Attempts begin one after the other, each ends once, and none is taken back."""
    earlier: Run | None = None
    for run in runs:
        assert [attempt.number for attempt in run.attempts] == list(range(1, len(run.attempts) + 1))
        for attempt in run.attempts[:-1]:
            assert attempt.HasField("end_time")
        if run.attempts:
            assert run.attempts[-1].HasField("end_time") == (run.state not in LIVE)
        if earlier is not None:
            begun = len(run.attempts) - len(earlier.attempts)
            assert begun in (0, 1)
            assert not begun or run.state == STARTING
            for before, after in zip(earlier.attempts, run.attempts, strict=False):
                assert not before.HasField("end_time") or before.end_time == after.end_time
        earlier = run


def check_steps(points: Sequence[pb.MetricPoint], run: Run, total_steps: int) -> None:
    """An attempt takes its steps one after the other; together they take all; a step that is taken again gives the same."""
    by_attempt: dict[int, list[int]] = defaultdict(list)
    losses: dict[int, float] = {}
    for point in points:
        if STEP_METRIC in point.values:
            by_attempt[point.attempt].append(point.step)
            known = losses.setdefault(point.step, point.values[STEP_METRIC])
            assert known == point.values[STEP_METRIC], f"step {point.step} of attempt {point.attempt}"
    reached = 0
    for number in sorted(by_attempt):
        steps = by_attempt[number]
        assert steps == list(range(steps[0], steps[0] + len(steps))), (number, steps)
        assert steps[0] <= reached + 1, f"attempt {number} left out steps after {reached}"
        attempt = run.attempts[number - 1]
        assert (attempt.first_step, attempt.last_step) == (steps[0], steps[-1])
        reached = max(reached, steps[-1])
    assert sorted(losses) == list(range(1, total_steps + 1))
