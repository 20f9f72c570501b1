"""`sparse_target: auto`: settled once by what the teacher gives or the cache holds, kept with the run, and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from stillhouse.protos.cache.reader import CacheReader
from stillhouse.protos.errors import Reason
from stillhouse.protos.stillhouse.v1.run_pb2 import LossSpec
from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    CAPABILITY_STRATIFIED_SAMPLES,
    CAPABILITY_TAIL_SAMPLES,
)
from stillhouse.student_trainer.run_dir import EXIT_FAILED, RunDir
from tests.conftest import Models
from tests.student_trainer.train.runs import events, finish_here, make_run, metric, spec_of
from tests.support.programs import Program
from tests.support.teacher_without_draws import TeacherWithoutDraws

DRAWN = "stratified_tail", 16, 192
"""The target that `auto` takes of the test's teacher."""
FORMERLY_DRAWN = "stratified_tail", 16, 392
"""The target that it took of it before, as many as fit into 272 bytes, at any temperature of forward KL."""


def spec(models: Models, rows: Path, target: str | None, /, *, steps: int = 2, **loss: Any) -> dict[str, Any]:
    made = spec_of(models.student, rows, target, optimizer={"max_steps": steps})
    return {**made, "loss": loss, "data": {**made["data"], "eval_fraction": 0}}


def settled(run_dir: RunDir) -> LossSpec:
    return run_dir.effective_spec().loss


def taken(loss: LossSpec) -> tuple[str, int, int]:
    return loss.sparse_target, loss.top_k, loss.num_samples


def test_auto_takes_draws_once_and_a_resume_decides_the_same(
    models: Models,
    dataset_file: Path,
    hf_teacher: Program,
    tmp_path: Path,
) -> None:
    run_dir = make_run(tmp_path, "run", spec(models, dataset_file, hf_teacher.target))
    assert settled(run_dir).sparse_target == "auto"
    with capture_logs() as logs:
        assert finish_here(run_dir) == 0, events(run_dir)
    assert taken(settled(run_dir)) == DRAWN
    assert "the teacher draws from its tail, and forward_kl" in settled(run_dir).sparse_target_reason
    (event,) = events(run_dir, "settled")
    assert event["targets"]["loss"]["sparse_target"] == "stratified_tail"
    (said,) = (each for each in logs if "sparse_target" in each)
    assert said["sparse_target"] == "stratified_tail"
    assert "the teacher draws" in said["why"]
    assert logs.index(said) < next(number for number, each in enumerate(logs) if each["event"] == "training")

    with TeacherWithoutDraws(hf_teacher.target) as other:
        later = make_run(tmp_path, "later", spec(models, dataset_file, other.target))
        later.write_effective_spec(settled_for(run_dir, other.target))
        assert finish_here(later) == EXIT_FAILED
    assert events(later, "failed")[-1]["error"]["details"][0]["reason"] == Reason.CAPABILITY.name
    assert events(later, "settled") == []


def settled_for(run_dir: RunDir, target: str) -> Any:
    """The effective spec of a run, with another service in the teacher's place."""
    made = run_dir.effective_spec()
    made.teachers[0].targets[:] = [target]
    return made


def test_auto_takes_what_a_lesser_teacher_gives(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    with (
        TeacherWithoutDraws(hf_teacher.target) as silent,
        TeacherWithoutDraws(hf_teacher.target, CAPABILITY_TAIL_SAMPLES) as older,
        TeacherWithoutDraws(hf_teacher.target, CAPABILITY_STRATIFIED_SAMPLES) as former,
    ):
        lesser = spec(models, dataset_file, silent.target, top_k=20)
        lesser["teachers"][0]["logprob_dtype"] = "compact"
        none = make_run(tmp_path, "none", lesser)
        plain = make_run(tmp_path, "plain", spec(models, dataset_file, older.target))
        tempered = make_run(tmp_path, "tempered", spec(models, dataset_file, older.target, temperature=2))
        independent = make_run(
            tmp_path, "independent", spec(models, dataset_file, former.target, temperature=2)
        )
        for run_dir in (none, plain, tempered, independent):
            assert finish_here(run_dir) == 0, events(run_dir)
    assert taken(settled(independent)) == ("sampled_tail", 16, 48)
    assert taken(settled(none))[:2] == ("tail_bucket", 20)
    assert "does not draw" in settled(none).sparse_target_reason
    assert taken(settled(plain)) == ("top_k_and_sampled", 16, 90)
    assert taken(settled(tempered))[:2] == ("tail_bucket", 64)


def test_a_student_that_is_its_teacher_has_loss_zero_from_draws_too(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    terms = [{"divergence": name} for name in ("forward_kl", "jsd", "tvd", "skew_kl", "alpha_beta")]
    made = spec(models, dataset_file, hf_teacher.target, terms=terms, temperature=1.5)
    made["student"] = {"model": str(models.teacher)}
    made["optimizer"]["learning_rate"] = 1e-12
    run_dir = make_run(tmp_path, "run", made)
    assert finish_here(run_dir) == 0, events(run_dir)
    assert settled(run_dir).sparse_target == "stratified_tail"
    assert max(map(abs, metric(run_dir, "train/loss").values())) < 1e-4


BUILT: dict[str, tuple[dict[str, Any], tuple[str, int, int]]] = {
    "by default": ({}, DRAWN),
    "of the tail": ({"sparse_target": "sampled_tail", "top_k": 8}, ("sampled_tail", 8, 50)),
    "of all tokens": (
        {"top_k": 8, "num_samples": 5, "sparse_target": "top_k_and_sampled"},
        ("top_k_and_sampled", 8, 5),
    ),
    "without": ({"top_k": 12, "sparse_target": "tail_bucket"}, ("tail_bucket", 12, 50)),
}


@pytest.mark.parametrize("kind", BUILT)
def test_auto_takes_what_a_cache_holds(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path, kind: str
) -> None:
    built, expected = BUILT[kind]
    cache = {"path": "caches/set", "mode": "write_through"}
    build = {
        **spec(models, dataset_file, hf_teacher.target, **built),
        "task": "cache",
        "cache": cache,
    }
    built_dir = make_run(tmp_path, "build", build)
    assert finish_here(built_dir) == 0, events(built_dir)
    assert settled(built_dir).sparse_target == expected[0]
    size = len(CacheReader(tmp_path / "caches" / "set"))

    alone = make_run(
        tmp_path, "only", {**spec(models, dataset_file, None), "cache": {**cache, "mode": "only"}}
    )
    live = make_run(tmp_path, "live", {**spec(models, dataset_file, hf_teacher.target), "cache": cache})
    for run_dir in (alone, live):
        assert finish_here(run_dir) == 0, events(run_dir)
        assert taken(settled(run_dir)) == expected
        assert "caches/set holds" in settled(run_dir).sparse_target_reason
    assert len(CacheReader(tmp_path / "caches" / "set")) == size


def test_a_cache_that_fits_nothing_settles_nothing(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    """Once the cache is built, the same run resumes with what it holds."""
    cache = {"path": "caches/set", "mode": "write_through"}
    (tmp_path / "caches" / "set").mkdir(parents=True)
    alone = make_run(
        tmp_path, "only", {**spec(models, dataset_file, None), "cache": {**cache, "mode": "only"}}
    )
    assert finish_here(alone) == EXIT_FAILED
    assert settled(alone).sparse_target == "auto"
    build = {**spec(models, dataset_file, hf_teacher.target), "task": "cache", "cache": cache}
    assert finish_here(make_run(tmp_path, "build", build)) == 0
    assert finish_here(alone, attempt=2) == 0, events(alone)
    assert taken(settled(alone)) == DRAWN


def test_draws_of_a_cache_without_log_probabilities_fit_where_todays_have_them(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    """Forward KL from temperature 2 on: settled by the cache, and named."""
    cache = {"path": "caches/set", "mode": "write_through"}
    former = spec(models, dataset_file, hf_teacher.target, temperature=2, draw_logprobs=False)
    built = make_run(tmp_path, "build", {**former, "task": "cache", "cache": cache})
    assert finish_here(built) == 0, events(built)
    assert taken(settled(built)) == DRAWN
    named = {"sparse_target": "stratified_tail", "top_k": 16, "num_samples": DRAWN[2]}
    for name, given in (("auto", {"temperature": 2}), ("named", {"temperature": 2, **named})):
        made: dict[str, Any] = {**spec(models, dataset_file, None), "loss": given}
        run_dir = make_run(tmp_path, name, {**made, "cache": {**cache, "mode": "only"}})
        assert finish_here(run_dir) == 0, events(run_dir)
        assert taken(settled(run_dir)) == DRAWN
        assert settled(run_dir).draw_logprobs is False
        assert settled(run_dir).HasField("draw_logprobs")


def test_a_run_that_was_settled_without_a_word_on_log_probabilities_goes_on_with_its_draws(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    """Told by their number, of which there are more than fit with log-probabilities."""
    former = make_run(
        tmp_path,
        "former",
        spec(
            models,
            dataset_file,
            hf_teacher.target,
            temperature=2,
            draw_logprobs=False,
            num_samples=FORMERLY_DRAWN[2],
        ),
    )
    assert finish_here(former) == 0, events(former)
    effective = former.effective_spec()
    effective.loss.ClearField("draw_logprobs")
    later = make_run(tmp_path, "later", spec(models, dataset_file, hf_teacher.target, temperature=2))
    later.write_effective_spec(effective)
    assert finish_here(later) == 0, events(later)
    assert (taken(settled(later)), settled(later).draw_logprobs) == (FORMERLY_DRAWN, False)
    assert metric(later, "train/loss") == metric(former, "train/loss")

    todays = make_run(tmp_path, "todays", spec(models, dataset_file, hf_teacher.target, temperature=2))
    assert finish_here(todays) == 0, events(todays)
    assert settled(todays).draw_logprobs is True
