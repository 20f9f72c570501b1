"""Trial of the largest pass: it finds what fits, refuses what cannot, and leaves no trace in the run."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from google.protobuf import json_format

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.config.proto import from_proto
from stillhouse.student_trainer.config.settled.micro_batch import AUTO_TOKENS, HALVE_VARIABLE
from stillhouse.student_trainer.run_dir import EXIT_FAILED, RunDir
from stillhouse.student_trainer.train import step
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.checkpointing.checkpoint import Progress, facts_of
from stillhouse.student_trainer.train.contexts.source import StepData
from stillhouse.student_trainer.train.data.alignment import AlignedText, Chunks
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.setup import pass_trial
from stillhouse.student_trainer.train.setup.pass_trial import (
    SHORT_LENGTHS,
    LargestPass,
    PassTrial,
    free_bytes,
)
from stillhouse.student_trainer.train.setup.stretched_rows import stretched
from stillhouse.student_trainer.train.step import Stepper
from tests.conftest import Models
from tests.student_trainer.train.runs import events, failure, finish_here, make_run, metric
from tests.student_trainer.train.students import CPU, load_student, make_stepper


def row(length: int) -> ScoredExample:
    ids = np.arange(4, 4 + length, dtype=np.int32) % 90
    example = Example(token_ids=ids, mask=np.arange(length) > length // 2, place=f"row {length}")
    return ScoredExample(example=example, answer=None)


@pytest.fixture
def stepper(models: Models, tmp_path: Path) -> Stepper:
    """Steps of a tiny student on text alone."""
    spec = {
        "student": {"model": str(models.student)},
        "data": {"train": [{"path": "unused.jsonl"}]},
        "loss": {"terms": [{"weight": 0}], "hard_weight": 1},
        "optimizer": {"learning_rate": 1e-3},
    }
    config = from_proto(json_format.ParseDict(spec, RunSpec()))
    return make_stepper(config, load_student(config.student, tmp_path), total_steps=4)


def trial(stepper: Stepper, free: int, *, is_auto: bool = True) -> PassTrial:
    return PassTrial(stepper=stepper, is_auto=is_auto, state_bytes=8, free_bytes=lambda device: free)


def test_the_limit_falls_to_what_fits_and_no_further(stepper: Stepper) -> None:
    largest = LargestPass(sample=row(30), longest=200, rows=8)
    weights = sum(each.numel() for each in stepper.parameters)
    per_token = trial(stepper, 0)._bytes_per_token(largest.sample)
    assert per_token > 1000

    def fitted(rows: float) -> int:
        free = int((weights * 12 + per_token * 200 * rows) / 0.9) + 1
        return trial(stepper, free).fit(largest, 4096)

    assert fitted(20) == 4096
    assert fitted(4.5) == 800
    assert fitted(1) == 200
    with pytest.raises(
        StillhouseError, match=r"has 1 row of 200 tokens, 200 tokens in all, .* MiB .* are free\. Lower"
    ) as caught:
        fitted(0.5)
    assert caught.value.reason is Reason.OUT_OF_MEMORY


def test_a_limit_of_the_file_is_refused_and_not_lowered(stepper: Stepper) -> None:
    largest = LargestPass(sample=row(30), longest=200, rows=8)
    with pytest.raises(
        StillhouseError,
        match=r"has 8 rows of 200 tokens, 1600 tokens in all, .* Lower optimizer\.micro_batch_tokens",
    ):
        trial(stepper, 2**20, is_auto=False).fit(largest, 4096)


def test_a_trial_leaves_no_trace(stepper: Stepper) -> None:
    data = StepData(step=0, scored=[row(12), row(20)], teacher_wait_s=0.0)
    before = torch.random.get_rng_state()
    weights = [each.detach().clone() for each in stepper.parameters]
    trial(stepper, 2**31).fit(LargestPass(sample=row(12), longest=64, rows=2), 4096)
    torch.testing.assert_close(torch.random.get_rng_state(), before)
    assert all(each.grad is None for each in stepper.parameters)
    for each, then in zip(stepper.parameters, weights, strict=True):
        torch.testing.assert_close(each, then, rtol=0, atol=0)
    assert np.isfinite(stepper.take_step(data, Progress())["train/loss"])


def test_a_pass_that_fits_in_any_case_is_not_tried(stepper: Stepper, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    rehearse = stepper.rehearse

    def record(group: list[ScoredExample]) -> None:
        tried.append(len(group))
        rehearse(group)

    monkeypatch.setattr(stepper, "rehearse", record)
    largest = LargestPass(sample=row(30), longest=200, rows=8)
    assert trial(stepper, 2**40).fit(largest, 4096) == 4096
    assert tried == [1, 1]
    tried.clear()
    assert trial(stepper, 2**31).fit(largest, 4096) == 4096
    assert tried == [1, 1, 8]


def test_the_bound_of_a_pass_that_is_not_tried_holds(stepper: Stepper) -> None:
    tried, length = trial(stepper, 2**40), 400
    fixed = tried._kept_bytes(stretched(row(30), SHORT_LENGTHS[0]))
    per_token = tried._bytes_per_token(row(30))
    kept = tried._kept_bytes(stretched(row(30), length))
    assert per_token * length * 0.5 < kept <= fixed + per_token * length * length / sum(SHORT_LENGTHS)


def test_a_process_may_take_what_its_own_limit_leaves() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, before[1]))
    try:
        assert free_bytes(CPU) <= 2**28
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("length", [3, 6, 40])
def test_a_stretched_row_keeps_its_shape(length: int) -> None:
    found = stretched(row(6), length).example
    assert (len(found.token_ids), len(found.mask)) == (length, length)
    assert not found.mask[0]
    assert found.mask.any()


def spec_with_a_long_row(models: Models, directory: Path, **optimizer: Any) -> dict[str, Any]:
    rows = [*models.texts[:11], " ".join(models.texts[:18])]
    data = directory / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return {
        "student": {"model": str(models.student)},
        "data": {"train": [{"path": str(data)}], "eval_fraction": 0},
        "loss": {"terms": [{"weight": 0}], "hard_weight": 1},
        "optimizer": {"learning_rate": 1e-3, "max_steps": 4, "batch_size": 6, **optimizer},
    }


def test_a_run_keeps_its_limit_and_resumes_to_the_same_bits(
    models: Models, tmp_path: Path, run: Callable[..., RunDir]
) -> None:
    spec = spec_with_a_long_row(models, tmp_path)
    whole = run(spec)
    assert facts_of(whole, 4)["micro_batch_tokens"] == str(AUTO_TOKENS["cpu"])
    assert max(metric(whole, "train/padding").values()) < 1.3
    stopped = make_run(tmp_path, "stopped", spec)
    assert finish_here(stopped, stopped=lambda: len(metric(stopped, "train/loss")) > 1) == 0
    assert events(stopped)[-1]["kind"] == "stopped"
    assert finish_here(stopped, attempt=2) == 0
    assert metric(stopped, "train/loss") == metric(whole, "train/loss")


def test_a_resume_in_half_the_tokens_takes_the_same_steps(
    models: Models, tmp_path: Path, run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AUTO_TOKENS, "cpu", 1000)
    spec = spec_with_a_long_row(models, tmp_path)
    whole = run(spec)
    halved = make_run(tmp_path, "halved", spec)
    assert finish_here(halved, stopped=lambda: len(metric(halved, "train/loss")) > 1) == 0
    monkeypatch.setenv(HALVE_VARIABLE, "1")
    assert finish_here(halved, attempt=2) == 0
    kept = [
        facts_of(each, step)["micro_batch_tokens"] for each, step in ((whole, 4), (halved, 2), (halved, 4))
    ]
    assert kept == ["1000", "1000", "500"]
    assert metric(halved, "train/loss") == pytest.approx(metric(whole, "train/loss"), rel=1e-5)
    assert metric(halved, "train/learning_rate") == metric(whole, "train/learning_rate")


def test_a_run_without_room_for_its_longest_row_fails_before_its_first_step(
    models: Models, tmp_path: Path, run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pass_trial, "SHARE", 0.0)
    failed = run(spec_with_a_long_row(models, tmp_path), code=EXIT_FAILED)
    told = r"The run's largest forward and backward pass has 1 row of \d+ tokens, .* about \d+ MiB of memory; .* GiB are free\."
    assert re.match(told, failure(failed))
    assert not metric(failed, "train/loss")


def test_passes_of_rows_are_not_tried(
    models: Models, tmp_path: Path, run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pass_trial, "SHARE", 0.0)
    spec = spec_with_a_long_row(models, tmp_path)
    spec["optimizer"] = {"max_steps": 1, "micro_batch_size": 2}
    assert metric(run(spec), "train/loss").keys() == {1}


def bridged_row() -> ScoredExample:
    """A row of eight tokens, three chunks of whose five last ones a teacher with another tokenizer has scored."""
    student, teacher = [-1, -1, -1, 0, 0, 1, 2, 2], [-1, 0, 1, 1, 2, -1]
    aligned = AlignedText(
        token_ids=np.arange(6, dtype=np.int32),
        chunks=Chunks(np.array(student, np.int32), np.array(teacher, np.int32), 3),
    )
    example = Example(
        token_ids=np.arange(4, 12, dtype=np.int32), mask=np.arange(8) > 2, place="row", aligned=aligned
    )
    targets = -np.arange(1, 6, dtype=np.float32)
    answer = Distributions(
        start=1,
        token_ids=np.zeros((5, 0), np.int32),
        logprobs=np.zeros((5, 0), np.float32),
        target_logprobs=targets,
        log_tail=np.zeros(5, np.float32),
    )
    return ScoredExample(example=example, answer=answer)


@pytest.mark.parametrize(("length", "times"), [(8, 1), (5, 1), (13, 2), (40, 8)])
def test_a_stretched_row_keeps_the_chunks_of_another_tokenizer(length: int, times: int) -> None:
    found = stretched(bridged_row(), length)
    aligned, answer = found.example.aligned, found.answer
    assert aligned is not None
    assert answer is not None
    expected = [-1, -1, -1, *(3 * each + at for each in range(times) for at in (0, 0, 1, 2, 2))]
    assert aligned.chunks.student.tolist() == expected[:length]
    assert aligned.start == 1
    assert aligned.logprobs(answer.target_logprobs).tolist() == [-1, -5, -4] * times


def test_a_bridged_run_is_tried_with_its_own_loss(stepper: Stepper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_TEXT_ALONE", None)  # what would be computed in its place
    stepper.rehearse([stretched(bridged_row(), 40), stretched(bridged_row(), 5)])
    with pytest.raises(AttributeError, match="NoneType"):
        stepper.rehearse([row(8)])
