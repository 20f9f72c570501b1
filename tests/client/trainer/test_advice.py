"""Next steps of a run in each state: what it waits for, where its model is, and the command."""

from __future__ import annotations

import pytest

from stillhouse.client.terminal.run_progress import state_line
from stillhouse.client.trainer.advice import next_step, waits_for
from stillhouse.protos.errors import Reason, StillhouseError, to_status
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.student_trainer.train.teacher.teacher import FIRST_CONTACT_S

NAME = "runs/abcabcabcabc"


def run(state: Run.State.ValueType, **fields: object) -> Run:
    made = Run(name=NAME, state=state)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("gpus", "count", "ahead", "text"),
    [
        ((), 0, 0, "a free CPU slot"),
        ((), 0, 2, "a free CPU slot, behind 2 runs"),
        ((), 1, 1, "a free GPU, behind 1 run"),
        ((), 4, 0, "4 free GPUs"),
        ((1, 3), 0, 0, "device 1, 3 of the trainer"),
    ],
)
def test_a_pending_run_names_what_it_waits_for(
    gpus: tuple[int, ...], count: int, ahead: int, text: str
) -> None:
    pending = run(Run.STATE_PENDING, queue_position=ahead)
    pending.effective_spec.resources.gpus.extend(gpus)
    pending.effective_spec.resources.gpu_count = count
    assert state_line(pending) == f"run abcabcabcabc: PENDING, waiting for {text}"


def test_a_run_without_a_teacher_names_its_address_and_the_limit() -> None:
    waiting = run(Run.STATE_RUNNING, condition=Run.CONDITION_WAITING_FOR_TEACHER)
    waiting.effective_spec.teachers.add(targets=["a:1", "b:2"])
    waiting.effective_spec.retry.teacher_wait_s = 600
    assert waits_for(waiting) == "a teacher at a:1 or b:2"
    assert "600 s (retry.teacher_wait_s)" in next_step(waiting)
    assert f"never reached it {FIRST_CONTACT_S:g} s" in next_step(waiting)


def test_an_ended_run_names_its_model_or_how_it_continues() -> None:
    assert next_step(run(Run.STATE_COMPLETED)) == (
        "the model is runs/abcabcabcabc/final on the trainer's host; `stillhouse run pull abcabcabcabc` copies it here"
    )
    stopped = run(Run.STATE_STOPPED, latest_checkpoint=f"{NAME}/checkpoints/40")
    assert next_step(stopped) == "`stillhouse run resume abcabcabcabc` continues from checkpoints/40"
    assert next_step(run(Run.STATE_STOPPED)) == (
        "it has no checkpoint yet, so `stillhouse run resume abcabcabcabc` starts it again from the first step"
    )
    build = run(Run.STATE_COMPLETED)
    build.effective_spec.task = "cache"
    build.spec.cache.path = "caches/set"
    assert next_step(build).startswith("the cache is caches/set")


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        (Reason.PROCESS_DIED, "continues from checkpoints/40"),
        (Reason.INVALID_SPEC, "`stillhouse run create` begins another run"),
        (
            Reason.MODEL_NOT_FOUND,
            "correct the files where they are, then `stillhouse run resume abcabcabcabc`",
        ),
        (Reason.DATASET_INVALID, "other paths need a new run"),
    ],
)
def test_a_failed_run_is_resumed_only_where_that_helps(reason: Reason, advice: str) -> None:
    failed = run(Run.STATE_FAILED, latest_checkpoint=f"{NAME}/checkpoints/40")
    failed.error.CopyFrom(to_status(StillhouseError(reason, "It failed.")))
    assert next_step(failed).startswith("`stillhouse run logs abcabcabcabc` shows its log; ")
    assert advice in next_step(failed)
    failed.effective_spec.task = "cache"
    if reason is Reason.PROCESS_DIED:
        assert next_step(failed).endswith("what the cache holds is kept")


def test_a_duration_leaves_out_the_time_in_which_the_run_was_stopped() -> None:
    made = run(Run.STATE_COMPLETED)
    made.start_time.FromSeconds(1000)
    made.end_time.FromSeconds(90_000)
    for start, end in ((1000, 1065), (89_990, 90_000)):
        attempt = made.attempts.add()
        attempt.start_time.FromSeconds(start)
        attempt.end_time.FromSeconds(end)
    assert state_line(made) == "run abcabcabcabc: COMPLETED, attempt 2 after 1 min 15 s"


def test_a_run_that_prepares_its_data_says_so() -> None:
    preparing = run(Run.STATE_STARTING, condition=Run.CONDITION_PREPARING_DATA)
    assert state_line(preparing).startswith("run abcabcabcabc: STARTING, preparing data")
    assert "encoded once and kept for later runs" in next_step(preparing)
