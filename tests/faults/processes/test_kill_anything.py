"""Kill anything at any moment: either service of the teacher, run service, training process; the run ends as if nothing had happened.

LONG=1 kills 50 times, KILLS=N so many times, STILLHOUSE_TEST_KILL_SEED=N at other moments.
"""

from __future__ import annotations

import collections
import os
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import json_format

from stillhouse.protos.rpc.channel import connect
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.protos.stillhouse.v1.run_pb2_grpc import RunServiceStub
from stillhouse.student_trainer.runs.store.run_state import ENDED, LIVE, state_name
from tests.conftest import Models
from tests.faults.history import Operations, Watcher, check_history, check_sequences, history
from tests.faults.world import LOST, World, get_run, world
from tests.student_trainer.train.runs import final_weights, metric
from tests.support.processes import kill
from tests.support.runs import small_spec, wait_until

LONG = bool(os.environ.get("LONG"))
KILLS = int(os.environ.get("KILLS") or (50 if LONG else 4))
SEED = int(os.environ.get("STILLHOUSE_TEST_KILL_SEED") or 20261122)
STEPS = 300
AFTER_A_CHECKPOINT_SHARE, TWO_AT_ONCE_SHARE, STOP_SHARE = 0.6, 0.2, 0.15
COMPONENTS = ("teacher", "second teacher", "service", "training")
ASK_S = 10.0


@dataclass(kw_only=True)
class Disturbed:
    """A run, what was asked of it and what was killed under it."""

    name: str
    operations: Operations
    watcher: Watcher
    kills: list[str] = field(default_factory=list)


@pytest.mark.faults(row=23)
@pytest.mark.slow
@pytest.mark.timeout(60 * (10 + KILLS))
def test_whatever_is_killed_whenever_a_run_ends_as_if_nothing_had_happened(
    models: Models, dataset_file: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    began = time.monotonic()
    with world(tmp_path, models.teacher) as here:
        here.start_teacher()
        here.start_second_teacher()
        here.start_service()
        spec = small_spec(
            student=models.student,
            train=dataset_file,
            teacher=here.teacher_target,
            steps=STEPS,
            changes={"checkpoint": {"every_steps": 3, "keep": 2}, "retry": {"teacher_wait_s": 120}},
        )
        spec["teachers"][0]["targets"].append(here.second_teacher_target)
        disturbed = disturb(here, spec, random.Random(SEED), KILLS)
        calm = create(here, spec, Operations())
        assert wait_ended(here, calm).state == Run.STATE_COMPLETED
        expected, curve = final_weights(here.run_dir(calm)), metric(here.run_dir(calm), "train/loss")
        assert sorted(curve) == list(range(1, STEPS + 1))
        for each in disturbed:
            with connect(here.service_target) as channel:
                told = history(RunServiceStub(channel), each.name)
            check_history(told, each.operations, total_steps=STEPS)
            check_sequences(each.watcher.seen)
            assert each.watcher.seen[-1].run == told[-1].run, "a watcher saw another end"
            assert metric(here.run_dir(each.name), "train/loss") == curve
            weights = final_weights(here.run_dir(each.name))
            assert weights.keys() == expected.keys()
            for name, weight in weights.items():
                np.testing.assert_array_equal(weight, expected[name], err_msg=name)
        ids = {run.name for run in pages(here)}
        assert ids == {calm, *(each.name for each in disturbed)}, "a creation counted twice, or not at all"
    kills = collections.Counter(name for each in disturbed for name in each.kills)
    figures = (
        f"seed {SEED}: {sum(kills.values())} kills {dict(kills)} in {len(disturbed)} runs of {STEPS} steps, "
        f"{sum(each.watcher.num_breaks for each in disturbed)} breaks of a watch, {time.monotonic() - began:.0f} s"
    )
    record_property("figure", figures)


def disturb(here: World, spec: dict[str, Any], generator: random.Random, kills: int) -> list[Disturbed]:
    """Runs of `spec` under which `kills` processes were killed; all have completed."""
    runs = [begin(here, spec)]
    done = 0
    while done < kills:
        run = runs[-1]
        if get_run(here.service_target, run.name).state == Run.STATE_COMPLETED:
            run.watcher.stop()
            runs.append(begin(here, spec))
            continue
        if generator.random() < STOP_SHARE:
            ask(here, run.operations, "stop", run.name)
        wait_for_a_moment(here, run, generator)
        victims = generator.sample(COMPONENTS, 2 if generator.random() < TWO_AT_ONCE_SHARE else 1)
        for victim in victims[: kills - done]:
            done += kill_one(here, run, victim)
        restart(here)
        heal(here, run)
    while heal(here, runs[-1]).state != Run.STATE_COMPLETED:
        time.sleep(0.2)
    runs[-1].watcher.stop()
    return runs


def begin(here: World, spec: dict[str, Any]) -> Disturbed:
    """A further run, which is watched."""
    operations = Operations()
    name = create(here, spec, operations)
    watcher = Watcher(here.service_target, name)
    watcher.start()
    return Disturbed(name=name, operations=operations, watcher=watcher)


def wait_for_a_moment(here: World, run: Disturbed, generator: random.Random) -> None:
    """Any moment, mostly one after a further checkpoint, so that the run gets on."""
    run_dir = here.run_dir(run.name)
    last = max(run_dir.checkpoints(), default=0)
    delay_s = generator.random()
    if generator.random() < AFTER_A_CHECKPOINT_SHARE:
        wait_until(
            lambda: (
                max(run_dir.checkpoints(), default=0) > last
                or get_run(here.service_target, run.name).state not in (Run.STATE_PENDING, *LIVE)
            ),
            f"a checkpoint after {last}",
        )
        time.sleep(delay_s * 0.4)
    else:
        time.sleep(delay_s * 3)


def kill_one(here: World, run: Disturbed, victim: str) -> int:
    """1 if it lived and was killed, else 0."""
    if victim == "training":
        pid = here.training_pid(run.name)
        if pid is None:
            return 0
        kill(pid)
    elif victim == "teacher":
        here.kill_teacher()
    elif victim == "second teacher":
        assert here.second_teacher is not None
        here.second_teacher.kill()
    else:
        here.kill_service()
    run.kills.append(victim)
    return 1


def restart(here: World) -> None:
    """Starts again what was killed, as whoever looks after services does."""
    if here.teacher is not None and here.teacher.process.poll() is not None:
        here.start_teacher()
    if here.second_teacher is not None and here.second_teacher.process.poll() is not None:
        here.start_second_teacher()
    if here.service is not None and here.service.process.poll() is not None:
        here.start_service()


def heal(here: World, run: Disturbed) -> Run:
    """The run, resumed if it has failed or stopped, as a person would."""
    # The kill of the training process reaches the service within a few looks.
    wait_until(lambda: here.training_pid(run.name) is not None or not live(here, run), "news of the kill")
    found = get_run(here.service_target, run.name)
    if found.state in (Run.STATE_FAILED, Run.STATE_STOPPED):
        assert (
            found.state == Run.STATE_STOPPED
            or "kill" in found.error.message
            or "ended" in found.error.message
        ), found.error.message
        ask(here, run.operations, "resume", run.name)
    return found


def live(here: World, run: Disturbed) -> bool:
    return get_run(here.service_target, run.name).state in LIVE


def create(here: World, spec: dict[str, Any], operations: Operations) -> str:
    """Name of the run that is made once, however often the call is repeated."""
    message = pb.CreateRunRequest(
        spec=json_format.ParseDict(spec, pb.RunSpec()), request_id=str(uuid.UUID(int=random.getrandbits(128)))
    )
    while True:
        with connect(here.service_target) as channel:
            try:
                name = str(RunServiceStub(channel).CreateRun(message, timeout=ASK_S).name)
            except grpc.RpcError as error:
                if error.code() not in LOST:
                    raise
                operations.lost["create"] += 1
                continue
        operations.answered["create"] += 1
        return name


def ask(here: World, operations: Operations, verb: str, name: str) -> None:
    """Stop or resume a run; a state that does not allow it is an answer too, and changes nothing."""
    while True:
        with connect(here.service_target) as channel:
            stub = RunServiceStub(channel)
            try:
                if verb == "stop":
                    stub.StopRun(pb.StopRunRequest(name=name), timeout=ASK_S)
                else:
                    stub.ResumeRun(pb.ResumeRunRequest(name=name), timeout=ASK_S)
            except grpc.RpcError as error:
                code = error.code()
                if code in LOST:
                    operations.lost[verb] += 1
                    time.sleep(0.1)
                    continue
                assert code == grpc.StatusCode.FAILED_PRECONDITION
                return
        operations.answered[verb] += 1
        return


def wait_ended(here: World, name: str) -> Run:
    """The run once it has ended."""
    wait_until(
        lambda: get_run(here.service_target, name).state in ENDED, f"the end of {name}", patience_s=300
    )
    run = get_run(here.service_target, name)
    assert run.state in ENDED, state_name(run.state)
    return run


def pages(here: World) -> list[Run]:
    with connect(here.service_target) as channel:
        return list(RunServiceStub(channel).ListRuns(pb.ListRunsRequest(page_size=200), timeout=ASK_S).runs)
