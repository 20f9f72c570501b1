"""Target forms: the tokens beyond the teacher's top-k as one bucket, as nothing, or as tokens that the teacher sampled.

Every form is a row of distinct ids with log-probabilities and the log of all other mass; losses know no other.
Axes: T positions, K kept tokens, R draws.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.config.target_names import TargetForm as TargetForm  # noqa: PLC0414 - re-exported
from stillhouse.student_trainer.train.loss.sparse import PAD_ID

TokenWeighting = Literal["teacher_entropy", "teacher_confidence"]


class TargetRows(NamedTuple):
    """Distinct ids of each row, PAD_ID where there are fewer, their log-probabilities, and the log of all other mass."""

    token_ids: NDArray[np.int32]
    """[T, K]."""
    logprobs: NDArray[np.floating[Any]]
    """[T, K], -inf at PAD_ID."""
    log_tail: NDArray[np.floating[Any]]
    """[T], -inf where nothing is left."""
    draw_shares: NDArray[np.floating[Any]] | None = None
    """[T, K]: share of each token in its row's draws from the tail, 0 for kept tokens; None in forms without such. Of draws of
    the student: the share over the probability with which the token was drawn."""


def target_rows(
    answer: Distributions,
    rows: NDArray[np.int64],
    form: TargetForm,
    *,
    temperature: float = 1.0,
    draw_logprobs: NDArray[np.float32] | None = None,
) -> TargetRows:
    """Rows `rows` of a teacher's distributions in the form that a loss at `temperature` wants.

    tail_bucket: the top-k, and one bucket of all others. renormalise: the top-k as if there were no others,
    which biases the student towards them. sampled: draw i counts 1 / R for its token (random-sampling distillation,
    2503.16870), whose expectation is the teacher, so that the gradient of a loss that is linear in it is unbiased.
    top_k_and_sampled: the top-k exactly, and the tail's mass shared by the draws that fell into it; a row of which
    none did, a share of (1 - tail)^R of such rows, keeps the bucket. sampled_tail: the top-k exactly, the tail's mass,
    and draws from outside the top-k with their own log-probabilities. stratified_tail: the same, where the draws have such;
    else the top-k exactly, and the tail's mass at `temperature` shared by the draws. student_tail: the top-k exactly, the
    tail's mass, and the draws of the student, with their log-probabilities `draw_logprobs` in the distribution that they are
    from and the teacher's beside them. Raises StillhouseError(CAPABILITY) without draws of the teacher.
    """
    if form == "student_tail":
        return _with_own_draws(answer, _places(rows), draw_logprobs)
    ids, logprobs = answer.token_ids[rows], answer.logprobs[rows].astype(np.float64)
    log_tail = answer.log_tail[rows].astype(np.float64)
    if form == "tail_bucket":
        return TargetRows(ids, logprobs, log_tail)
    if form == "renormalise":
        return TargetRows(ids, logprobs, np.full_like(log_tail, -np.inf))
    needs = answer.sampled_logprobs if form == "sampled_tail" else answer.sampled_token_ids
    if needs is None or answer.sampled_token_ids is None:
        raise StillhouseError(
            Reason.CAPABILITY,
            f'loss.sparse_target is "{form}", but the teacher\'s answer holds no such draws. Use "tail_bucket", or a teacher '
            "whose capabilities have CAPABILITY_SAMPLED_TOKENS, such as one started with --engine hf.",
            metadata={"capability": "CAPABILITY_SAMPLED_TOKENS"},
        )
    draws = answer.sampled_token_ids[rows]
    if form == "sampled_tail" or (form == "stratified_tail" and answer.sampled_logprobs is not None):
        assert answer.sampled_logprobs is not None
        return _with_tail(ids, logprobs, log_tail, draws, answer.sampled_logprobs[rows].astype(np.float64))
    if form == "sampled":
        drawn = _distinct(draws)
        return TargetRows(drawn.token_ids, drawn.log_shares, np.full_like(log_tail, -np.inf))
    drawn = _distinct(draws, besides=ids, wanted=~np.isneginf(log_tail))
    shared = log_tail
    if temperature != 1:
        assert answer.log_partitions is not None, "checked with the request"
        shared = _log_tail_sum(logprobs, answer.log_partitions[rows, 0].astype(np.float64), temperature)
    some = (drawn.token_ids >= 0).any(axis=1)
    return TargetRows(
        np.concatenate([ids, drawn.token_ids], axis=1),
        # Tempered by the loss, a drawn token has its share of the tempered tail.
        np.concatenate([logprobs, temperature * drawn.log_shares + shared[:, None]], axis=1),
        np.where(some, -np.inf, log_tail),
    )


def _log_tail_sum(
    logprobs: NDArray[np.float64], log_partition: NDArray[np.float64], temperature: float
) -> NDArray[np.float64]:
    """[T]: T log sum_v p_v^(1/T) over the tokens outside the kept ones; -inf where rounding leaves nothing."""
    kept = np.exp(logprobs / temperature - log_partition[:, None]).sum(axis=1)
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.maximum(1.0 - kept, 0.0))
    return cast("NDArray[np.float64]", temperature * (log_tail + log_partition))


def entropy(answer: Distributions, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """[T]: the teacher's entropy in nats, where it sent it; else that of its top-k and the tail as one bucket.

    The latter is a lower bound, by at most P_tail log(V - K).
    """
    if answer.entropy is not None:
        return answer.entropy[rows].astype(np.float64)
    logprobs = np.concatenate([answer.logprobs[rows], answer.log_tail[rows, None]], axis=1).astype(np.float64)
    finite = np.where(np.isneginf(logprobs), 0.0, logprobs)
    return cast("NDArray[np.float64]", -(np.exp(logprobs) * finite).sum(axis=1))


def token_factor(
    entropies: NDArray[np.float64], weighting: TokenWeighting, vocab_size: int
) -> NDArray[np.float64]:
    """[T], >= 0: factor of each position's divergence, before it is scaled to mean 1 over a step."""
    if weighting == "teacher_entropy":
        return entropies
    return np.maximum(1.0 - entropies / math.log(vocab_size), 0.0)


def _with_tail(
    ids: NDArray[np.int32],
    logprobs: NDArray[np.float64],
    log_tail: NDArray[np.float64],
    draws: NDArray[np.int32],
    draw_logprobs: NDArray[np.float64],
) -> TargetRows:
    """Kept tokens, and behind them the distinct draws [T, R] with the share of each; none where no tail is left."""
    drawn = _distinct(draws, besides=ids, wanted=~np.isneginf(log_tail))
    own = np.take_along_axis(draw_logprobs, drawn.draws, axis=1)
    return TargetRows(
        np.concatenate([ids, drawn.token_ids], axis=1),
        np.concatenate([logprobs, np.where(drawn.token_ids < 0, -np.inf, own)], axis=1),
        log_tail,
        np.concatenate([np.zeros_like(logprobs), np.exp(drawn.log_shares)], axis=1),
    )


def _places(rows: NDArray[np.int64]) -> NDArray[np.int64] | slice:
    """Ascending rows, as a slice if one follows the other: it copies nothing."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _with_own_draws(
    answer: Distributions, rows: NDArray[np.int64] | slice, draw_logprobs: NDArray[np.float32] | None
) -> TargetRows:
    """Kept tokens, and behind them the distinct draws of the student from outside them."""
    ids, logprobs, log_tail = answer.token_ids[rows], answer.logprobs[rows], answer.log_tail[rows]
    if answer.sampled_token_ids is None or answer.sampled_logprobs is None or draw_logprobs is None:
        return TargetRows(ids, logprobs, log_tail, np.zeros_like(logprobs))
    own_ids, own_logprobs, weights = _weighted(
        answer.sampled_token_ids[rows],
        answer.sampled_logprobs[rows],
        draw_logprobs[rows],
        besides=ids,
        wanted=~np.isneginf(log_tail),
    )
    return TargetRows(
        np.concatenate([ids, own_ids], axis=1),
        np.concatenate([logprobs, own_logprobs], axis=1),
        log_tail,
        np.concatenate([np.zeros_like(logprobs), weights], axis=1),
    )


def _weighted(
    draws: NDArray[np.int32],
    logprobs: NDArray[np.float32],
    draw_logprobs: NDArray[np.float32],
    *,
    besides: NDArray[np.int32],
    wanted: NDArray[np.bool_],
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """Distinct draws that are not `besides`, their log-probabilities, and their shares over those of drawing them."""
    found = None
    if draws.size >= COMPILED_DRAWS:
        with contextlib.suppress(ImportError):
            from stillhouse.student_trainer.train.batching.distinct_numba import own_draws

            found = own_draws(
                draws,
                np.sort(besides, axis=1),
                wanted,
                PAD_ID,
                logprobs=logprobs,
                draw_logprobs=draw_logprobs,
            )
    if found is not None:
        return found
    drawn = _distinct(draws, besides=besides, wanted=wanted)
    # Draws that fell on kept tokens count as draws: the estimate is of the part of the tail that is left.
    shares = drawn.counts / max(1, draws.shape[1])
    proposed = np.take_along_axis(draw_logprobs, drawn.draws, axis=1)
    own = np.take_along_axis(logprobs, drawn.draws, axis=1)
    is_unused = drawn.token_ids < 0
    weights = np.where(is_unused, 0.0, shares * np.exp(-proposed)).astype(np.float32)
    return drawn.token_ids, np.where(is_unused, -np.inf, own).astype(np.float32), weights


class _DistinctDraws(NamedTuple):
    """Distinct draws [T, D] of each row in ascending order; PAD_ID, with share 0, where there are fewer."""

    token_ids: NDArray[np.int32]
    log_shares: NDArray[np.float64]
    draws: NDArray[np.int32]
    """Index of one draw of the token among the row's."""
    counts: NDArray[np.int32]
    """Draws of the token."""


_PLACE_BITS = 31
_IS_DRAW = np.int64(1) << _PLACE_BITS
COMPILED_DRAWS = 2**12
"""Draws from which on the compiled walk is loaded: fewer are sorted before it is."""


def _distinct(
    draws: NDArray[np.int32],
    besides: NDArray[np.int32] | None = None,
    wanted: NDArray[np.bool_] | None = None,
) -> _DistinctDraws:
    """Counts the distinct ids of each row of draws [T, R], but those of the same row of `besides` [T, K] and PAD_ID.

    A row that is not `wanted` has none.
    """
    if besides is None:
        besides = np.empty((len(draws), 0), np.int32)
    if wanted is None:
        wanted = np.ones(len(draws), np.bool_)
    found = _walk(draws, besides, wanted) if draws.size >= COMPILED_DRAWS else None
    ids, counts, places = _sort(draws, besides, wanted) if found is None else found
    totals = np.maximum(counts.sum(axis=1), 1)
    with np.errstate(divide="ignore"):
        # Counts are small: a table has their logarithms.
        logs = np.log(np.arange(int(totals.max(initial=1)) + 1, dtype=np.float64))
    return _DistinctDraws(ids, logs[counts] - logs[totals][:, None], places, counts)


_Counted: TypeAlias = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]
"""Ids, counts and places [T, D]."""


def _walk(draws: NDArray[np.int32], besides: NDArray[np.int32], wanted: NDArray[np.bool_]) -> _Counted | None:
    """Counts draws in ascending order, as teachers send them; None for others, and where numba is not installed."""
    try:
        from stillhouse.student_trainer.train.batching.distinct_numba import count_distinct
    except ImportError:
        return None
    return count_distinct(draws, np.sort(besides, axis=1), wanted, PAD_ID)


def _sort(draws: NDArray[np.int32], besides: NDArray[np.int32], wanted: NDArray[np.bool_]) -> _Counted:
    """Counts draws in any order."""
    # One key sorts ids, puts those of `besides` before equal draws, and carries each draw's place: faster than argsort, and
    # than a search of each draw.
    keys = np.concatenate(
        [
            besides.astype(np.int64) << 32,
            (draws.astype(np.int64) << 32) | _IS_DRAW | np.arange(draws.shape[1]),
        ],
        axis=1,
    )
    keys.sort(axis=1)
    every = (keys >> 32).astype(np.int32)
    first = np.ones_like(every, np.bool_)
    np.not_equal(every[:, 1:], every[:, :-1], out=first[:, 1:])
    # A row's first column begins a run, so no run crosses rows.
    starts = np.flatnonzero(first)
    lengths = np.diff(starts, append=every.size)
    run_ids, run_keys, row = every.ravel()[starts], keys.ravel()[starts], starts // max(1, every.shape[1])
    counted = (run_ids >= 0) & ((run_keys & _IS_DRAW) != 0) & wanted[row]
    run_ids, run_keys, row, lengths = run_ids[counted], run_keys[counted], row[counted], lengths[counted]
    per_row = np.bincount(row, minlength=len(draws))
    width = int(per_row.max(initial=0))
    at = np.arange(len(row)) + np.repeat(
        np.arange(len(draws)) * width - np.cumsum(per_row) + per_row, per_row
    )
    shape = len(draws), width
    ids, counts, places = (
        np.full(shape, PAD_ID, np.int32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
    )
    ids.ravel()[at] = run_ids
    counts.ravel()[at] = lengths
    places.ravel()[at] = run_keys & (_IS_DRAW - 1)
    return ids, counts, places
