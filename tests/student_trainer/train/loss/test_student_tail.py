"""Compiled reverse KL over draws of the student equals the plain objective in value, metrics and gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.train.loss import student_tail
from stillhouse.student_trainer.train.loss.fused import OutputLayer, fused_objective
from stillhouse.student_trainer.train.loss.logit_chunk import COMPILED_VOCAB, RowThreads
from stillhouse.student_trainer.train.loss.objective import ObjectiveSum, Positions, objective
from stillhouse.student_trainer.train.loss.policy_gradient import SampledTokens
from stillhouse.student_trainer.train.loss.sparse import PAD_ID, SparseTargets
from tests.student_trainer.train.loss.dense_reference import random_logits

V, VALID, KEPT, DRAWS, ROWS, UPSTREAM = 60, 56, 5, 9, 16, 0.25
TERM = LossTermConfig(divergence="reverse_kl", weight=0.7)
LOSSES = {
    "alone": LossConfig(terms=(LossTermConfig(divergence="reverse_kl"),), sparse_target="student_tail"),
    "with the text": LossConfig(terms=(TERM,), hard_weight=0.3, sparse_target="student_tail"),
    "weighted": LossConfig(
        terms=(replace(TERM, token_weighting="teacher_entropy"), LossTermConfig(weight=0)),
        sparse_target="student_tail",
    ),
}


def _targets(num_rows: int, vocab: int, *, kept: int = KEPT, draws: int = DRAWS) -> SparseTargets:
    """Kept tokens, and distinct draws behind them."""
    logprobs = random_logits(num_rows, vocab, seed=1).log_softmax(-1)
    ids = random_logits(num_rows, vocab, seed=2).argsort(-1)[:, : kept + draws]
    shares = torch.rand(num_rows, kept + draws, generator=torch.Generator().manual_seed(3)) + 0.1
    shares[:, :kept] = 0
    own = logprobs.gather(-1, ids)
    return SparseTargets(
        token_ids=ids.unsqueeze(0),
        logprobs=own.unsqueeze(0),
        log_tail=logprobs.scatter(-1, ids[:, :kept], -torch.inf).logsumexp(-1).unsqueeze(0),
        draw_shares=shares.unsqueeze(0),
    )


def _unusual() -> tuple[Tensor, SparseTargets]:
    """Logits and targets whose rows behind the fourth have what is rare."""
    logits, targets = random_logits(ROWS, V, seed=4), _targets(ROWS, V)
    assert targets.draw_shares is not None
    ids, logprobs, log_tail, shares = (
        each[0] for each in (targets.token_ids, targets.logprobs, targets.log_tail, targets.draw_shares)
    )
    ids[3, KEPT + 3 :] = ids[3, 2] = PAD_ID
    logits[4, ids[4, [0, KEPT]]] = -torch.inf
    logits[5] = torch.full_like(logits[5], -torch.inf).scatter(0, ids[5], logits[5, ids[5]])
    logits[6] = torch.full_like(logits[6], -torch.inf).scatter(0, ids[6, :KEPT], logits[6, ids[6, :KEPT]])
    log_tail[7], log_tail[8] = -torch.inf, -30.0
    others = [token for token in range(VALID) if token not in ids[9].tolist()]
    ids[9] = torch.where(ids[9] >= VALID, torch.tensor(others[: KEPT + DRAWS]), ids[9])
    ids[9, [1, KEPT + 1]] = torch.tensor([VALID, VALID + 2])
    logprobs[10, [0, KEPT]] = -torch.inf
    ids[11, :KEPT], shares[11, :KEPT] = PAD_ID, 0
    ids[12] = PAD_ID
    logits[13, ids[13, 1]], logits[14, ids[14, KEPT + 1]] = 90.0, 90.0
    logits[15] += 200.0 * (torch.arange(V) == 58)
    return logits, targets


def _positions(logits: Tensor, targets: SparseTargets) -> Positions:
    generator, num_rows = torch.Generator().manual_seed(5), len(logits)
    ids = torch.randint(0, VALID, (num_rows, 1), generator=generator)
    ids = torch.where(logits.gather(-1, ids).isneginf(), logits.argmax(-1, keepdim=True), ids)
    weights = torch.rand(1, num_rows, generator=generator) + 0.5
    weights[0, 1] = 0
    return Positions(
        target_ids=ids.T,
        weights=weights,
        targets=targets,
        sampled=SampledTokens(
            teacher_logprobs=-torch.rand(1, num_rows, generator=generator),
            behaviour_logprobs=-torch.rand(1, num_rows, generator=generator),
            max_importance_weight=2.0,
        ),
        token_factors={"teacher_entropy": torch.rand(1, num_rows, generator=generator)},
    )


def _plain(
    logits: Tensor, positions: Positions, config: LossConfig, vocab_size: int | None
) -> tuple[ObjectiveSum, Tensor]:
    leaf = logits.double().unsqueeze(0).requires_grad_()
    summed = objective(
        leaf,
        positions.target_ids,
        positions.targets,
        positions.weights,
        config,
        vocab_size=vocab_size,
        sampled=positions.sampled,
        token_factors=positions.token_factors,
    )
    (gradient,) = torch.autograd.grad(UPSTREAM * summed.loss_sum, leaf)
    return summed, gradient[0]


def _compare(
    logits: Tensor, targets: SparseTargets, config: LossConfig, vocab_size: int | None, *, rtol: float = 2e-5
) -> None:
    positions = _positions(logits, targets)
    assert student_tail.computes(config, targets)
    expected, gradient = _plain(logits, positions, config, vocab_size)
    memory = logits.clone()
    found, factors = student_tail.differentiate(
        memory,
        RowThreads(2, rows_per_piece=3),
        positions,
        config,
        vocab_size=vocab_size,
        upstream=UPSTREAM,
    )
    torch.testing.assert_close(found.loss_sum.double(), expected.loss_sum.double(), rtol=rtol, atol=1e-6)
    assert found.parts.keys() == expected.parts.keys()
    for name, part in expected.parts.items():
        torch.testing.assert_close(found.parts[name].double(), part.double(), rtol=rtol, atol=1e-5, msg=name)
    torch.testing.assert_close(memory.double() * factors, gradient, rtol=10 * rtol, atol=rtol)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("vocab_size", [None, VALID])
def test_rows_of_all_kinds_have_the_value_and_the_gradient_of_the_plain_objective(
    name: str, vocab_size: int | None
) -> None:
    _compare(*_unusual(), LOSSES[name], vocab_size)


@pytest.mark.parametrize("kept", [V, V - 3, 0])
def test_draws_and_kept_tokens_may_be_the_whole_vocabulary(kept: int) -> None:
    _compare(
        random_logits(ROWS, V, seed=4), _targets(ROWS, V, kept=kept, draws=V - kept), LOSSES["alone"], None
    )


def test_a_row_is_the_same_whatever_its_neighbours() -> None:
    logits, targets = _unusual()
    positions = _positions(logits, targets)

    def differentiate(rows: slice) -> Tensor:
        memory = logits[rows].clone()
        _, factors = student_tail.differentiate(
            memory,
            RowThreads(1, rows_per_piece=5),
            positions.rows(rows),
            LOSSES["alone"],
            vocab_size=VALID,
            upstream=UPSTREAM,
        )
        return memory * factors

    whole = differentiate(slice(ROWS))
    assert all(torch.equal(whole[row], differentiate(slice(row, row + 1))[0]) for row in range(ROWS))


def test_a_logit_that_is_not_finite_gives_a_loss_that_is_not() -> None:
    for value in (torch.nan, torch.inf):
        for number in (0, KEPT, V):
            logits, targets = random_logits(2, V, seed=4), _targets(2, V)
            ids = targets.token_ids[0, 0].tolist()
            logits[
                0, next(token for token in range(V) if token not in ids) if number == V else ids[number]
            ] = value
            positions = Positions(
                target_ids=torch.zeros(1, 2, dtype=torch.long), weights=torch.ones(1, 2), targets=targets
            )
            found, _ = student_tail.differentiate(
                logits,
                RowThreads(1, rows_per_piece=5),
                positions,
                LOSSES["alone"],
                vocab_size=None,
                upstream=1.0,
            )
            assert not bool(found.loss_sum.isfinite()), (value, number)


@pytest.mark.parametrize("token", [-1, V])
def test_a_text_whose_token_has_no_logit_is_refused(token: int) -> None:
    logits, targets = random_logits(4, V, seed=4), _targets(4, V)
    positions = _positions(logits, targets)
    positions.target_ids[0, 2] = token
    with pytest.raises(IndexError, match="60 logits"):
        student_tail.differentiate(
            logits,
            RowThreads(1, rows_per_piece=5),
            positions,
            LOSSES["alone"],
            vocab_size=None,
            upstream=1.0,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_objective_over_it_equals_the_plain_one(dtype: torch.dtype) -> None:
    num_rows, hidden_size, vocab = 12, 16, COMPILED_VOCAB + 300
    hidden = random_logits(num_rows, hidden_size, seed=6).to(dtype)
    weight = random_logits(vocab, hidden_size, seed=7, scale=0.5).to(dtype)
    logits = (hidden.double() @ weight.double().T).to(dtype)
    positions = _positions(logits, _targets(num_rows, vocab, draws=200))
    expected, gradient = _plain(logits, positions, LOSSES["with the text"], None)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    found = fused_objective(
        leaves[0],
        OutputLayer(weight=leaves[1], bias=None),
        positions,
        LOSSES["with the text"],
        chunk_logits=5 * vocab,
        upstream=UPSTREAM,
    )
    wanted = gradient @ weight.detach().double(), gradient.T @ hidden.detach().double()
    got = torch.autograd.grad(UPSTREAM * found.loss_sum, leaves)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    assert found.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=tolerance)
    for one, other in zip(got, wanted, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < tolerance


def test_other_losses_are_none_of_its_own() -> None:
    targets = _targets(2, V)
    plain = LOSSES["alone"]
    sampled = replace(TERM, estimator="policy_gradient")
    for config in (
        replace(plain, temperature=2.0),
        replace(plain, terms=(TERM, LossTermConfig())),
        replace(plain, terms=(LossTermConfig(),)),
        replace(plain, terms=(sampled,)),
        replace(plain, sparse_target="sampled_tail"),
    ):
        assert not student_tail.computes(config, targets)
    assert not student_tail.computes(plain, replace(targets, draw_shares=None))
    assert not student_tail.computes(plain, None)
