"""Baselines of the policy gradient: from other rollouts alone, with the same expectation and less noise, for rollouts of any length."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.train.batching.baselines import advantages, batch_sums, with_baselines
from stillhouse.student_trainer.train.batching.collate import ScoredExample, collate
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.loss.policy_gradient import SampledTokens, policy_gradient
from stillhouse.student_trainer.train.loss.reduction import reduce

PROMPT = 3


def written(teacher: list[float], student: list[float], *, group: int = 0) -> ScoredExample:
    """A text of the student behind a prompt, with the log-probabilities that both give to its tokens."""
    length = PROMPT + len(teacher)
    target_logprobs = np.asarray(teacher, np.float32)
    answer = Distributions(
        start=PROMPT,
        token_ids=np.zeros((len(teacher), 1), np.int32),
        logprobs=target_logprobs[:, None],
        target_logprobs=target_logprobs,
        log_tail=np.full(len(teacher), -1.0, np.float32),
    )
    example = Example(
        token_ids=np.arange(length, dtype=np.int32), mask=np.arange(length) >= PROMPT, place="a test"
    )
    return ScoredExample(
        example=example, answer=answer, behaviour_logprobs=np.asarray(student, np.float32), group=group
    )


def test_a_baseline_is_the_mean_of_other_texts() -> None:
    texts = [
        written([-1.0, -2.0], [-2.0, -1.0]),  # advantages 1, -1
        written([-1.0], [-4.0]),  # 3
        written([-1.0, -1.0, -1.0], [-1.0, -2.0, -6.0], group=1),  # 0, 1, 5
    ]
    assert [list(advantages(each)) for each in texts] == [[1, -1], [3], [0, 1, 5]]
    sums = batch_sums(texts, 0)
    assert sums == (9, 6)

    def found(kind: str) -> list[list[float]]:
        result = with_baselines(texts, {0: kind}, {0: sums})  # type: ignore[dict-item]
        return [[] if each.baseline is None else each.baseline.tolist() for each in result]

    assert found("batch") == [[9 / 4] * 2, [pytest.approx(6 / 5)], [1.0] * 3]
    assert found("group") == [[3, 3], [0], [0, 0, 0]]
    assert found("position") == [[3, 3], [1], [0, 0, 0]]


@pytest.mark.parametrize("kind", ["batch", "group", "position"])
def test_no_text_sees_itself_in_its_baseline(kind: str) -> None:
    def baseline(own: float) -> list[float]:
        texts = [written([own, own], [-1.0, -1.0]), written([-0.5, -3.0, -1.0], [-1.0, -1.0, -2.0])]
        result = with_baselines(texts, {0: kind}, {0: batch_sums(texts, 0)})  # type: ignore[dict-item]
        assert result[0].baseline is not None
        return list(result[0].baseline)

    assert baseline(-1.0) == pytest.approx(baseline(-7.0))
    assert any(baseline(-1.0))


def test_a_baseline_leaves_the_expectation_and_lowers_the_noise() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(12, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = (torch.randn(12, generator=generator, dtype=torch.float64) - 1).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp().detach()
    mean_advantage = float((probs * (teacher - logprobs.detach())).sum())

    def moments(baseline: float) -> tuple[torch.Tensor, float]:
        gradients = []
        for token in range(12):
            sampled = SampledTokens(
                teacher_logprobs=teacher[token].reshape(1, 1),
                behaviour_logprobs=logprobs[token].detach().reshape(1, 1),
                max_importance_weight=2.0,
                baseline=torch.full((1, 1), baseline, dtype=torch.float64),
            )
            loss = policy_gradient(logprobs[token].reshape(1, 1), sampled).sum()
            gradients.append(torch.autograd.grad(loss, logits, retain_graph=True)[0])
        stacked = torch.stack(gradients)
        mean = (probs[:, None] * stacked).sum(0)
        return mean, float((probs * ((stacked - mean) ** 2).sum(1)).sum())

    plain, noise = moments(0.0)
    compared, less_noise = moments(mean_advantage)
    torch.testing.assert_close(plain, compared, rtol=0, atol=1e-12)
    assert less_noise < 0.9 * noise


def test_a_baseline_reaches_the_loss_and_prompts_do_not() -> None:
    texts = [written([-1.0, -2.0], [-2.0, -1.0]), written([-1.0], [-4.0])]
    with_them = with_baselines(texts, {0: "group"}, {0: batch_sums(texts, 0)})
    batch = collate(with_them, reduction="token_mean", device=torch.device("cpu"))
    assert batch.positions.target_ids.tolist() == [[PROMPT, PROMPT + 1, PROMPT]]
    assert batch.positions.sampled is not None
    assert batch.positions.sampled.baseline is not None
    assert batch.positions.sampled.baseline.tolist() == [[3, 3, 0]]
    assert batch.positions.sampled.rows(slice(1, 3)).baseline.tolist() == [[3, 0]]  # type: ignore[union-attr]


def test_ending_early_is_no_way_to_a_smaller_loss() -> None:
    """A policy that draws "go on" or "end" afresh at each position, over all texts of up to four tokens.

    The expected gradient of a batch, divided by its expected number of tokens, is that of KL(q || p) at one position: no
    token pays for what comes after it, so nothing is gained by ending. A sum over each text would pay per token.
    """
    logits = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([0.2, 0.8], dtype=torch.float64).log()
    logprobs = logits.log_softmax(-1)
    total, tokens, rewards = torch.zeros((), dtype=torch.float64), 0.0, torch.zeros((), dtype=torch.float64)
    texts = [(0,) * length + (1,) for length in range(4)] + [(0,) * 4]
    for text in texts:
        drawn = torch.tensor(text)
        own = logprobs[drawn].unsqueeze(0)
        share = float(own.detach().sum().exp())
        sampled = SampledTokens(
            teacher_logprobs=teacher[drawn].unsqueeze(0),
            behaviour_logprobs=own.detach(),
            max_importance_weight=2.0,
        )
        summed = reduce(policy_gradient(own, sampled), torch.ones_like(own))
        total = total + share * summed.loss_sum
        tokens += share * float(summed.denominator)
        later = (teacher[drawn] - own.detach()[0]).flip(0).cumsum(0).flip(0)
        rewards = rewards - share * (later * own[0]).sum()
    (found,) = torch.autograd.grad(total / tokens, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(
        (logprobs.exp() * (logprobs - teacher)).sum(), logits, retain_graph=True
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    (with_length,) = torch.autograd.grad(rewards / tokens, logits)
    assert (with_length - expected).abs().max() > 0.01


def test_texts_of_all_lengths_with_equal_tokens_have_one_loss() -> None:
    losses = []
    for lengths in itertools.product((1, 5), repeat=2):
        batch = collate(
            [written([-2.0] * length, [-1.0] * length) for length in lengths],
            reduction="token_mean",
            device=torch.device("cpu"),
        )
        assert batch.positions.sampled is not None
        loss = policy_gradient(batch.positions.sampled.behaviour_logprobs, batch.positions.sampled)
        summed = reduce(loss, batch.positions.weights)
        losses.append(float(summed.loss_sum / summed.denominator))
    assert losses == pytest.approx([1.0] * 4)
