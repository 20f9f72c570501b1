"""Texts that are written during a run: by the teacher or the student, mixed with the dataset, exact over kills, and never counted wrong."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.student_trainer.config.schema import OptimizerConfig, RolloutConfig
from stillhouse.student_trainer.run_dir import EXIT_FAILED, RunDir
from stillhouse.student_trainer.train.contexts.source import FeedSettings
from stillhouse.student_trainer.train.contexts.teacher_feed import TeacherFeed
from stillhouse.student_trainer.train.data.context_mix import ContextMix, Slot
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.data.schedule import Schedule
from tests.conftest import Models
from tests.student_trainer.train.runs import (
    events,
    failure,
    final_weights,
    finish_here,
    make_run,
    metric,
    spec_of,
)
from tests.support.programs import Program, start_teacher

REVERSE_KL = {"terms": [{"divergence": "reverse_kl"}], "top_k": 16}
POLICY_GRADIENT = {"terms": [{"divergence": "reverse_kl", "estimator": "policy_gradient"}], "top_k": 16}
SHORT = {"max_new_tokens": 8, "samples_per_prompt": 2}
STEPS = 4

Run = Callable[..., RunDir]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Trains a spec in this process and returns its directory; `code` is the exit code to expect."""
    count = 0

    def train(spec: dict[str, Any], *, code: int = 0) -> RunDir:
        nonlocal count
        count += 1
        run_dir = make_run(tmp_path, f"run-{count}", spec)
        assert finish_here(run_dir) == code, events(run_dir)
        return run_dir

    return train


@pytest.fixture
def spec(models: Models, dataset_file: Path, hf_teacher: Program) -> Callable[..., dict[str, Any]]:
    """A run of STEPS steps of 4 rows with these contexts."""

    def make(*contexts: dict[str, Any], **further: Any) -> dict[str, Any]:
        sections: dict[str, Any] = {
            "optimizer": {"max_steps": STEPS, "batch_size": 4, "learning_rate": 1e-3},
            "data": {"eval_fraction": 0.05},
            "checkpoint": {"every_steps": 1, "keep": 10},
        } | further
        return spec_of(models.student, dataset_file, hf_teacher.target, contexts=list(contexts), **sections)

    return make


def student_context(loss: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """The student's texts, also where the teacher finds them senseless."""
    source = {"generation": SHORT, "min_teacher_logprob": -1000} | settings
    return {"student": source, "loss": loss or REVERSE_KL}


def test_each_context_takes_its_share_of_every_step() -> None:
    schedule = Schedule.from_config(100, OptimizerConfig(micro_batch_size=7, max_steps=200), seed=0)
    mix = ContextMix(weights=[2.0, 1.0, 1.0], schedule=schedule, seed=3)
    counts: Counter[int] = Counter()
    for step in range(200):
        slots = mix.slots(step)
        assert slots == mix.slots(step)
        places = sorted(slot.position for each in slots for slot in each)
        assert places == list(range(7 * step, 7 * step + 7))
        for context, share in enumerate((3.5, 1.75, 1.75)):
            assert abs(len(slots[context]) - share) < 1
            counts[context] += len(slots[context])
    assert counts[0] / 1400 == pytest.approx(0.5, abs=0.01)
    assert counts[1] / 1400 == pytest.approx(0.25, abs=0.02)


def test_datasets_are_mixed_by_weight_and_each_row_waits_its_turn() -> None:
    schedule = Schedule.from_config(
        30, OptimizerConfig(micro_batch_size=1, epochs=4), seed=1, dataset_sizes=[20, 10], weights=[1.0, 3.0]
    )
    rows = [row for step in range(schedule.total_steps) for row in schedule.rows(step)]
    small = [row for row in rows if row >= 20]
    assert len(rows) == 120
    assert len(small) == 4 * 22
    for begin in range(0, 80, 10):
        assert sorted(small[begin : begin + 10]) == list(range(20, 30))
    assert max(Counter(row for row in rows if row < 20).values()) <= 2


def test_the_teachers_texts_are_learnt_word_by_word(run: Run, spec: Any) -> None:
    run_dir = run(spec({"teacher": {"generation": SHORT}}))
    assert len(metric(run_dir, "train/loss")) == STEPS
    assert metric(run_dir, "teacher/sequences_asked")[STEPS] == 4 * 2 * STEPS
    # A teacher's own texts are likelier under it than the dataset's: mass and loss are those of its distributions.
    assert all(1 <= length <= 8 for length in metric(run_dir, "train/teacher_text_tokens").values())
    tokens = metric(run_dir, "train/trained_tokens")
    lengths = metric(run_dir, "train/teacher_text_tokens")
    assert tokens[1] == pytest.approx(lengths[1] * 8)


def test_a_students_first_rollouts_have_importance_weight_one(run: Run, spec: Any) -> None:
    run_dir = run(spec(student_context(POLICY_GRADIENT, max_staleness=0)))
    assert metric(run_dir, "train/importance_weight")[1] == pytest.approx(1, abs=1e-5)
    assert metric(run_dir, "train/mismatch_kl")[1] == pytest.approx(0, abs=1e-9)
    assert set(metric(run_dir, "train/rollout_staleness").values()) == {0}


def test_rollouts_are_as_old_as_they_may_be_and_not_older(run: Run, spec: Any) -> None:
    run_dir = run(spec(student_context(max_staleness=1)))
    ages = metric(run_dir, "train/rollout_staleness")
    assert [ages[step] for step in range(1, STEPS + 1)] == [0, 1, 1, 1]
    assert set(metric(run_dir, "train/rollouts_dropped").values()) == {0}
    assert metric(run_dir, "train/trained_tokens")[1] == pytest.approx(
        8 * metric(run_dir, "train/rollout_tokens")[1]
    )


@pytest.fixture
def taught_itself(run: Run, spec: Any, models: Models) -> Callable[[dict[str, Any]], RunDir]:
    """A student that is its teacher, after two steps on its own texts."""

    def train(loss: dict[str, Any]) -> RunDir:
        return run(
            spec(
                student_context(loss, generation=SHORT, min_teacher_logprob=-1000),
                student={"model": str(models.teacher)},
                teachers=[{**spec({})["teachers"][0], "logprob_dtype": "float32"}],
                optimizer={"max_steps": 2, "grad_accum_steps": 1, "name": "sgd", "learning_rate": 1e-3},
            )
        )

    return train


@pytest.mark.parametrize("loss", [REVERSE_KL, POLICY_GRADIENT], ids=["full", "policy_gradient"])
def test_a_student_that_is_its_teacher_learns_nothing_from_its_own_texts(
    taught_itself: Callable[[dict[str, Any]], RunDir], loss: dict[str, Any]
) -> None:
    run_dir = taught_itself(loss)
    assert max(map(abs, metric(run_dir, "train/loss").values())) < 1e-5
    assert max(metric(run_dir, "train/grad_norm").values()) < 1e-3


def test_divergences_of_both_sides_take_the_teachers_draws_on_the_students_texts(
    taught_itself: Callable[[dict[str, Any]], RunDir],
) -> None:
    terms = [{"divergence": "jsd"}, {"divergence": "skew_kl"}]
    run_dir = taught_itself({"terms": terms, "top_k": 16})
    assert run_dir.effective_spec().contexts[0].loss.sparse_target == "stratified_tail"
    losses = metric(run_dir, "train/loss")
    assert losses[1] == pytest.approx(0, abs=1e-5), losses


def test_more_draws_than_a_teacher_may_be_queried_for_are_refused_before_the_first_step(
    run: Run, spec: Any
) -> None:
    run_dir = run(
        spec(student_context({**REVERSE_KL, "sparse_target": "student_tail", "num_samples": 1020})),
        code=EXIT_FAILED,
    )
    assert "contexts[0].loss.num_samples is 1020: with 16 likeliest tokens" in failure(run_dir)
    assert "Set it to at most 1008" in failure(run_dir)
    assert not metric(run_dir, "train/loss")


def test_defaults_draw_as_much_as_a_teacher_takes_and_say_so_and_a_number_of_ones_own_is_refused_at_once(
    run: Run, spec: Any, models: Models, tmp_path: Path
) -> None:
    teacher = start_teacher(
        models.teacher, engine="hf", directory=tmp_path / "teacher", options=["--max-query-tokens", "200"]
    )
    try:
        usual, named = (
            spec(student_context({"terms": REVERSE_KL["terms"], **more}))
            for more in ({}, {"num_samples": 512})
        )
        for each in (usual, named):
            each["teachers"] = [{"targets": [teacher.target]}]
        settled = run(usual).effective_spec().contexts[0].loss
        refused = run(named, code=EXIT_FAILED)
    finally:
        teacher.stop()
    assert (settled.sparse_target, settled.top_k, settled.num_samples) == ("student_tail", 16, 184)
    assert (
        "184 draws in the place of 512, as the teacher takes 200 queried ids" in settled.sparse_target_reason
    )
    assert "contexts[0].loss.num_samples is 512: with 16 likeliest tokens" in failure(refused)
    assert "Set it to at most 184" in failure(refused)
    assert not metric(refused, "train/loss")


MIXED = (
    {"weight": 1, "dataset": {}},
    {"weight": 1, "teacher": {"generation": SHORT}},
    {"weight": 2, **student_context(max_staleness=1)},
)


@pytest.mark.faults(row=7)
def test_a_mix_resumes_bit_for_bit_with_rollouts_in_flight(run: Run, spec: Any, tmp_path: Path) -> None:
    whole = run(spec(*MIXED))
    again = run(spec(*MIXED))
    assert metric(whole, "train/loss") == metric(again, "train/loss")

    # The checkpoint of step 2 holds texts that the weights of step 1 wrote for step 3.
    resumed = make_run(tmp_path, "resumed", spec(*MIXED))
    (resumed.checkpoints_path).mkdir(parents=True, exist_ok=True)
    source = whole.checkpoint_path(2)
    source.rename(resumed.checkpoint_path(2))
    assert finish_here(resumed) == 0
    assert events(resumed, "started")[0]["step"] == 2
    for name, weight in final_weights(whole).items():
        np.testing.assert_array_equal(weight, final_weights(resumed)[name], err_msg=name)
    later = {step: value for step, value in metric(whole, "train/loss").items() if step > 2}
    assert metric(resumed, "train/loss") == later
    assert metric(resumed, "train/rollout_staleness")[3] == 1


def test_a_cold_student_is_refused_before_it_learns(run: Run, spec: Any) -> None:
    context = student_context(min_teacher_logprob=-0.5)
    run_dir = run(spec(context), code=EXIT_FAILED)
    assert "min_teacher_logprob" in failure(run_dir)
    assert not metric(run_dir, "train/loss")
    assert len(metric(run(spec({"dataset": {}}, context)), "train/loss")) == STEPS


def test_rows_ask_the_teacher_that_they_name(
    run: Run, spec: Any, hf_teacher: Program, dataset_file: Path, tmp_path: Path
) -> None:
    lines = dataset_file.read_text().splitlines()
    data = tmp_path / "routed.jsonl"
    data.write_text(
        "\n".join(line[:-1] + f', "kind": "{"ab"[i % 2]}"}}' for i, line in enumerate(lines)) + "\n"
    )
    teachers = [{"targets": [hf_teacher.target], "name": name} for name in "ab"]
    changes = {"teachers": teachers, "data": {"train": [{"path": str(data)}], "teacher_field": "kind"}}
    run_dir = run(spec({"dataset": {}}, **changes))
    assert metric(run_dir, "teacher/sequences_asked")[STEPS] == 4 * STEPS

    teachers[1]["name"] = "c"
    run_dir = run(spec({"dataset": {}}, **changes), code=EXIT_FAILED)
    assert 'field kind: is "b", which no teacher is called; there are a, c' in failure(run_dir)


def test_a_mixture_of_one_teacher_with_itself_is_that_teacher(
    run: Run, spec: Any, hf_teacher: Program
) -> None:
    teachers = [
        {"targets": [hf_teacher.target], "name": name, "weight": weight, "logprob_dtype": "float32"}
        for name, weight in (("a", 1), ("b", 3))
    ]
    mixed = run(spec({"dataset": {}}, teachers=teachers))
    alone = run(spec({"dataset": {}}, loss={"sparse_target": "tail_bucket"}))
    assert metric(mixed, "teacher/sequences_asked")[STEPS] == 2 * 4 * STEPS
    assert list(metric(mixed, "train/loss").values()) == pytest.approx(
        list(metric(alone, "train/loss").values()), rel=1e-5
    )
    assert metric(mixed, "eval/kl")[STEPS] == pytest.approx(metric(alone, "eval/kl")[STEPS], rel=1e-4)


@pytest.mark.faults(row=16)
def test_a_longer_vocabulary_of_one_family_compares_exactly(
    run: Run, spec: Any, models: Models, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    extended = tmp_path / "extended"
    shutil.copytree(models.teacher, extended)
    tokenizer = AutoTokenizer.from_pretrained(extended)
    assert tokenizer.add_tokens(["<|further|>", "<|another|>"]) == 2
    tokenizer.save_pretrained(extended)
    teachers = [{**spec({})["teachers"][0], "logprob_dtype": "float32"}]
    contexts = [{"dataset": {}}, student_context()]
    optimizer = {"max_steps": 2, "grad_accum_steps": 1, "learning_rate": 1e-12}
    loss = {"sparse_target": "tail_bucket"}
    run_dir = run(
        spec(*contexts, student={"model": str(extended)}, teachers=teachers, optimizer=optimizer, loss=loss)
    )
    assert max(map(abs, metric(run_dir, "train/loss").values())) < 1e-5
    assert metric(run_dir, "eval/agreement")[0] == 1


def test_prompts_to_continue_are_dealt_to_processes_by_tokens() -> None:
    lengths = [30, 2, 3, 28, 4, 3]
    examples = [
        Example(token_ids=np.zeros(each + 1, np.int32), mask=np.arange(each + 1) == each, place="row")
        for each in lengths
    ]
    patience: Any = None  # nothing is asked for
    settings = FeedSettings(
        context=0, examples=examples, seed=0, ahead=1, max_sequence_tokens=64, patience=patience
    )
    feed = TeacherFeed(settings, {}, RolloutConfig(max_new_tokens=8), vocab_size=99)
    slots = [Slot(position=number, row=number) for number in range(len(lengths))]
    hands = [feed.own(slots, rank, 2) for rank in range(2)]
    assert sorted(slot.row for hand in hands for slot in hand) == list(range(len(lengths)))
    loads = [sum(lengths[slot.row] + 8 for slot in hand) for hand in hands]
    assert abs(loads[0] - loads[1]) <= 8
