"""Reverse KL from draws of the student's own tail: their mean is the whole vocabulary's value and gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig, RolloutConfig
from stillhouse.student_trainer.train.batching.supports import with_query
from stillhouse.student_trainer.train.batching.target_forms import target_rows
from stillhouse.student_trainer.train.loss.objective import objective
from stillhouse.student_trainer.train.loss.sparse import DenseTargets, SparseTargets, Targets
from stillhouse.student_trainer.train.rollouts.token_sampler import LARGEST_UNIFORM, TokenSampler

V, K, Q, ROWS = 30, 2, 3, 4000
LOSS = LossConfig(terms=(LossTermConfig(divergence="reverse_kl"),), sparse_target="student_tail", top_k=K)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor, Tensor]:
    """Logits [V] of the teacher, of the student, and of an earlier student that drew."""
    generator = torch.Generator().manual_seed(5)
    teacher, student, change = torch.randn(3, V, generator=generator, dtype=torch.float64) * 2
    return teacher, student, student + change / 8


def targets_of(teacher_V: Tensor, drawer_V: Tensor, num_draws: int, *, rows: int = ROWS) -> SparseTargets:
    """Rows of one position whose draws are at evenly spread places, as a run makes them of the teacher's answers."""
    sampler = TokenSampler(num_valid=V, num_likeliest=Q, num_draws=num_draws, generation=RolloutConfig())
    places = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    drawn = sampler.support(drawer_V.float().expand(rows, V), places)
    likeliest, draws = drawn.likeliest.numpy(), drawn.draws.numpy()
    logprobs = teacher_V.log_softmax(-1).numpy()
    top = np.argsort(-logprobs)[:K]
    sequence = np.full(rows + 1, top[0], np.int32)
    queried = logprobs[np.concatenate([likeliest, draws], axis=1).clip(0)].astype(np.float32)
    answer = Distributions(
        start=1,
        token_ids=np.tile(top, (rows, 1)).astype(np.int32),
        logprobs=np.tile(logprobs[top], (rows, 1)).astype(np.float32),
        target_logprobs=np.full(rows, logprobs[top[0]], np.float32),
        log_tail=np.full(rows, np.log(1 - np.exp(logprobs[top]).sum()), np.float32),
        query_logprobs=queried,
    )
    joined, clamped = with_query(answer, likeliest, sequence, draws)
    assert not clamped
    found = target_rows(joined, np.arange(rows), "student_tail", draw_logprobs=drawn.draw_logprobs.numpy())
    assert found.draw_shares is not None
    return SparseTargets(
        token_ids=torch.from_numpy(found.token_ids).long().unsqueeze(0),
        logprobs=torch.from_numpy(found.logprobs).unsqueeze(0),
        log_tail=torch.from_numpy(found.log_tail).unsqueeze(0),
        draw_shares=torch.from_numpy(found.draw_shares).unsqueeze(0),
    )


def mean_value_and_gradient(student_V: Tensor, targets: Targets, rows: int) -> tuple[float, Tensor]:
    leaf = student_V.expand(1, rows, V).clone().requires_grad_()
    summed = objective(leaf, torch.zeros(1, rows, dtype=torch.long), targets, torch.ones(1, rows), LOSS)
    summed.loss_sum.backward()
    assert leaf.grad is not None
    return summed.loss_sum.item() / rows, leaf.grad[0].mean(0)


@pytest.mark.parametrize("num_draws", [1, 4, 40])
@pytest.mark.parametrize("drew_earlier", [False, True], ids=["present", "earlier"])
def test_the_mean_of_all_draws_is_the_whole_vocabularys_reverse_kl(
    logits: tuple[Tensor, Tensor, Tensor], num_draws: int, *, drew_earlier: bool
) -> None:
    teacher, student, earlier = logits
    exact = mean_value_and_gradient(student, DenseTargets(logprobs=teacher.log_softmax(-1)[None, None]), 1)
    targets = targets_of(teacher, earlier if drew_earlier else student, num_draws)
    value, gradient = mean_value_and_gradient(student, targets, ROWS)
    assert value == pytest.approx(exact[0], rel=2e-3)
    torch.testing.assert_close(gradient, exact[1], rtol=0, atol=2e-3 * float(exact[1].abs().max()))


def test_a_student_that_is_its_teacher_has_no_gradient_from_any_draw(
    logits: tuple[Tensor, Tensor, Tensor],
) -> None:
    teacher, _, _ = logits
    targets = targets_of(teacher, teacher, 4, rows=50)
    leaf = teacher.expand(1, 50, V).clone().requires_grad_()
    summed = objective(leaf, torch.zeros(1, 50, dtype=torch.long), targets, torch.ones(1, 50), LOSS)
    summed.loss_sum.backward()
    assert summed.loss_sum.item() == pytest.approx(0, abs=1e-4)
    assert leaf.grad is not None
    assert float(leaf.grad.abs().max()) < 1e-5


def test_the_bucket_alone_is_another_loss(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    teacher, student, _ = logits
    exact = mean_value_and_gradient(student, DenseTargets(logprobs=teacher.log_softmax(-1)[None, None]), 1)
    targets = targets_of(teacher, student, 4)
    assert targets.draw_shares is not None
    bucket = SparseTargets(
        token_ids=targets.token_ids[..., : K + Q + 1],
        logprobs=targets.logprobs[..., : K + Q + 1],
        log_tail=targets.log_tail,
    )
    value, _ = mean_value_and_gradient(student, bucket, ROWS)
    assert value < 0.9 * exact[0]


def test_draws_avoid_the_likeliest_ids_and_come_with_their_mean_shares() -> None:
    logits = torch.randn(50, V, generator=torch.Generator().manual_seed(0))
    sampler = TokenSampler(num_valid=V - 4, num_likeliest=Q, num_draws=9, generation=RolloutConfig(top_p=0.5))
    ends = torch.linspace(0, 1, 50, dtype=torch.float64).clamp(max=LARGEST_UNIFORM)
    drawn = sampler.support(logits, ends)
    assert int(drawn.draws.max()) < V - 4
    assert not (drawn.draws.unsqueeze(-1) == drawn.likeliest.unsqueeze(1)).any()
    tail = logits[:, : V - 4].softmax(-1).scatter(-1, drawn.likeliest.long(), 0.0)
    step = (tail.sum(-1, keepdim=True) / 9).clamp(min=sampler.least_step)
    is_drawn = drawn.draws >= 0
    shares = (tail.gather(-1, drawn.draws.clamp(min=0).long()) / step).clamp(max=1) / 9
    torch.testing.assert_close(drawn.draw_logprobs[is_drawn], shares[is_drawn].log(), rtol=1e-4, atol=1e-4)


def test_positions_with_little_outside_the_likeliest_have_few_draws_and_all_ids_of_weight() -> None:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(0)).expand(2, V).clone()
    logits[0] *= 6
    sampler = TokenSampler(num_valid=V, num_likeliest=Q, num_draws=9, generation=RolloutConfig())
    drawn = sampler.support(logits, torch.full((2,), 0.5, dtype=torch.float64))
    counts = (drawn.draws >= 0).sum(-1).tolist()
    assert counts[0] < counts[1] <= 9
    probs = logits.softmax(-1).scatter(-1, drawn.likeliest.long(), 0.0)
    step = (probs.sum(-1, keepdim=True) / 9).clamp(min=sampler.least_step)
    for row in range(2):
        assert set((probs[row] > step[row]).nonzero().flatten().tolist()) <= set(drawn.draws[row].tolist())


def test_nothing_is_drawn_where_the_likeliest_are_all() -> None:
    sampler = TokenSampler(num_valid=Q, num_likeliest=Q, num_draws=2, generation=RolloutConfig())
    drawn = sampler.support(torch.zeros(1, Q), torch.tensor([0.5]))
    assert drawn.draws.tolist() == [[-1, -1]]
    assert drawn.draw_logprobs.tolist() == [[0, 0]]
