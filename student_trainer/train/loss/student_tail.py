"""Objective of a chunk of logits whose one term is reverse KL with draws of the student, and its gradient, in compiled code.

The same as `objective_of` and `LogitChunk` compute, in two passes over the logits and none over arrays of the kept tokens' size.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.student_trainer.config.rules.loss import STUDENT_TAIL
from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.train.loss.divergences import NO_MASS_LOGPROB, TAIL_FLOOR_LOGPROB
from stillhouse.student_trainer.train.loss.logit_chunk import RowThreads, bits_of
from stillhouse.student_trainer.train.loss.objective import ObjectiveSum, Positions, objective_of_text
from stillhouse.student_trainer.train.loss.reduction import reduce
from stillhouse.student_trainer.train.loss.sparse import SparseTargets, Targets


def computes(config: LossConfig, targets: Targets | None) -> bool:
    """True if `differentiate` computes a loss."""
    return (
        isinstance(targets, SparseTargets)
        and targets.draw_shares is not None
        and config.sparse_target == STUDENT_TAIL
        and config.temperature == 1
        and _term(config) is not None
    )


def differentiate(
    logits: Float[Tensor, "C V"],
    threads: RowThreads,
    positions: Positions,
    config: LossConfig,
    *,
    vocab_size: int | None,
    upstream: float,
) -> tuple[ObjectiveSum, Float[Tensor, "C 1"]]:
    """Computes the objective, and replaces the logits by `upstream` times its gradient, up to the factors of the rows.

    Raises IndexError for a text's token without a logit: compiled code does not look.
    """
    from stillhouse.protos.tensors import reverse_kl_numba

    targets, term = positions.targets, _term(config)
    least, most = positions.target_ids.aminmax()
    if least < 0 or most >= logits.shape[-1]:
        raise IndexError(
            f"a text has the ids {int(least)} to {int(most)}; the student has {logits.shape[-1]} logits"
        )
    assert isinstance(targets, SparseTargets)
    assert targets.draw_shares is not None
    assert term is not None
    weights = positions.weights.float()
    of_term = weights * (upstream * term.weight)
    if term.token_weighting != "uniform":  # noqa: S105 (tokens of text)
        of_term = of_term * positions.token_factors[term.token_weighting].float()
    rows = (
        targets.token_ids,
        targets.logprobs.float(),
        targets.draw_shares.float(),
        targets.log_tail.float(),
        positions.target_ids,
        of_term,
        weights * (-upstream * config.hard_weight),
    )
    num_rows, num_logits = logits.shape
    losses, target_logprobs, is_clamped, factors = torch.empty(4, num_rows)
    values = reverse_kl_numba.RowValues(
        *(each.numpy() for each in (losses, target_logprobs, is_clamped, factors))
    )
    limits = reverse_kl_numba.Limits(
        num_valid=num_logits if vocab_size is None else min(vocab_size, num_logits),
        least_logprob=NO_MASS_LOGPROB,
        least_tail=TAIL_FLOOR_LOGPROB,
    )
    threads.run(
        num_rows,
        partial(
            reverse_kl_numba.differentiate,
            bits_of(logits),
            reverse_kl_numba.TargetRows(*(each[0].contiguous().numpy() for each in rows)),
            limits,
            values,
        ),
    )
    if term.token_weighting != "uniform":  # noqa: S105 (tokens of text)
        losses = losses * positions.token_factors[term.token_weighting][0].float()
    text = objective_of_text(target_logprobs.unsqueeze(0), positions, config)
    summed, clamped = (reduce(each.unsqueeze(0), positions.weights).loss_sum for each in (losses, is_clamped))
    return (
        ObjectiveSum(
            loss_sum=text.loss_sum + term.weight * summed,
            parts={**text.parts, term.divergence: summed, "tail_clamped": clamped},
        ),
        factors.unsqueeze(-1),
    )


def _term(config: LossConfig) -> LossTermConfig | None:
    """The one term of a loss, if it is reverse KL itself."""
    terms = [term for term in config.terms if term.weight != 0]
    if len(terms) != 1 or terms[0].divergence != "reverse_kl" or terms[0].estimator == "policy_gradient":
        return None
    return terms[0]
