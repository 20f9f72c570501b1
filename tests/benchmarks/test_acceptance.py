"""Parts of the acceptance experiment: its languages match their logs, and its claims can fail."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.acceptance import arms
from benchmarks.acceptance.arms import ARMS, ArmMetrics, Group
from benchmarks.acceptance.curves import CURVES, curve_here
from benchmarks.acceptance.k1_control import k1_as_loss
from benchmarks.acceptance.languages import (
    NUM_LOGITS,
    VOCABULARY,
    Language,
    kl_from_truth,
    load,
    on_policy_kl,
    tokenizer,
    write_rows,
    write_student,
)
from benchmarks.distillation.sparse_forms import CROSS_ENTROPY, FULL, Form
from benchmarks.distillation.sparse_targets import _form, _shares
from stillhouse.student_trainer.config.schema import OptimizerConfig
from stillhouse.student_trainer.train.data.schedule import Schedule
from stillhouse.student_trainer.train.loss.policy_gradient import SampledTokens


@pytest.mark.parametrize("make", [Language.dense, Language.sparse])
def test_text_follows_the_language_and_reaches_a_model_token_by_token(
    make: Callable[[], Language], tmp_path: Path
) -> None:
    language = make()
    rows = language.sample(400, 48, seed=1)
    assert torch.equal(rows, language.sample(400, 48, seed=1))
    surprise = -language.distributions(rows).gather(-1, rows[:, 2:, None]).mean()
    entropy = -(language.distributions(rows).exp() * language.distributions(rows)).sum(-1).mean()
    assert float(surprise) == pytest.approx(float(entropy), abs=0.05)
    texts = [
        json.loads(line)["text"] for line in write_rows(rows, tmp_path / "rows").read_text().splitlines()
    ]
    assert tokenizer()(texts)["input_ids"] == rows.tolist()


def test_divergences_are_zero_for_the_same_model_and_positive_for_another(tmp_path: Path) -> None:
    one, other = (load(write_student(tmp_path / str(seed), seed=seed, length=48)) for seed in (0, 1))
    assert on_policy_kl(one, one, count=8, length=6, seed=0) == pytest.approx((0, 0), abs=1e-6)
    assert min(on_policy_kl(one, other, count=8, length=6, seed=0)) > 1e-4
    language = Language.dense()
    rows = language.sample(8, 48, seed=2)
    even = torch.full((VOCABULARY,), -math.log(NUM_LOGITS))
    truth = language.distributions(rows)
    assert kl_from_truth(language, one, rows) == pytest.approx(
        float((truth.exp() * (truth - even)).sum(-1).mean()), abs=0.1
    )


def test_every_claim_holds_for_expected_results_and_fails_for_the_reverse() -> None:
    hoped = {
        "cross-entropy": 1.0, "full vocabulary": 0.8, "top-8 + tail": 0.85, "random sampling, 8 draws": 0.83,
        "top-8 renormalised": 1.2, "control: rows shuffled": 1.1,
        "reverse KL on the student's top-8": 0.7, "policy gradient": 0.85, "control: k1 taken as a loss": 1.05,
    }  # fmt: skip

    def found(value: Callable[[float], float], difference: float) -> ArmMetrics:
        groups: tuple[Group, ...] = ("dense", "sparse", "on-policy")
        return ArmMetrics(
            values={
                group: {
                    arm.name: [value(hoped[arm.name]) + 0.001 * at for at in (0, 1, 2)] for arm in ARMS[group]
                }
                for group in groups
            },
            curves={way: [0.0, difference] for way in CURVES},
        )

    hold = arms.claims(found(lambda value: value, 9e-6))
    assert [str(each) for each in hold if not each.holds] == []
    fail = arms.claims(found(lambda value: 1.9 - value, 2e-5))
    assert [str(each) for each in fail if each.holds] == []
    assert len(hold) == len(fail) == 16
    assert str(hold[0]) == ("pass: dense, nats gained by full vocabulary: [+0.2, +0.2], must be above 0.05")


def test_the_k1_estimate_has_the_value_of_reverse_kl_and_no_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 1, 12, generator=generator, dtype=torch.float64).requires_grad_()
    student = logits.log_softmax(-1)[0]
    teacher = torch.randn(1, 12, generator=generator, dtype=torch.float64).log_softmax(-1)
    # Every token once, weighted by its probability under the student: the exact expectation.
    sampled = SampledTokens(teacher_logprobs=teacher, behaviour_logprobs=student, max_importance_weight=2.0)
    drawn = student.detach()
    expected = (drawn.exp() * k1_as_loss(student, sampled)).sum()
    (gradient,) = torch.autograd.grad(expected, logits)
    assert expected.item() == pytest.approx((drawn.exp() * (drawn - teacher)).sum().item())
    assert expected.item() > 0.1
    assert gradient.abs().max() < 1e-12


@pytest.mark.model
def test_a_step_in_this_process_is_that_of_plain_torch_on_the_schedules_rows(tmp_path: Path) -> None:
    student, teacher = (write_student(tmp_path / str(seed), seed=seed, length=16) for seed in (0, 1))
    rows = Language.dense().sample(12, 16, seed=1)
    curve = curve_here(teacher, student, rows, steps=3, rate=3e-3, batch=4, seed=5)
    schedule = Schedule.from_config(12, OptimizerConfig(max_steps=3, micro_batch_size=4), 5)
    first = rows[schedule.rows(0)]
    with torch.no_grad():
        p, q = (
            load(each).double()(input_ids=first).logits[:, :-1].log_softmax(-1) for each in (teacher, student)
        )
    assert curve.shape == (3,)
    assert curve[0] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert len(set(curve.tolist())) == 3


def test_shares_are_of_the_full_gain_and_bytes_are_those_of_packed_ids() -> None:
    form = _form("top_k_and_sampled:32:60")
    assert form == Form(kind="top_k_and_sampled", top_k=32, num_samples=60)
    assert form.num_bytes == 32 * 4.25 + 60 * 2.25
    found = {CROSS_ENTROPY: [2.0, 2.2], FULL: [1.0, 1.2], form: [1.1, 1.3]}
    mean, half = _shares(found, form)
    assert mean == pytest.approx(0.9)
    assert half == pytest.approx(0, abs=1e-9)
