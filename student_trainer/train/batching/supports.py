"""Supports of distributions: joins a teacher's top-k with the student's, and mixes several teachers.

Every row keeps what it is: log-probabilities of distinct ids and the log of all other mass. Ids that a row has not are
PAD_ID with log-probability -inf. Axes: T positions, K kept tokens, Q queried tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.train.loss.sparse import PAD_ID

TAIL_FLOOR = 1e-6
"""Least mass of a tail that is a difference: below it float32 log-probabilities leave only noise."""


def with_query(
    answer: Distributions,
    query_token_ids: NDArray[np.int32],
    sequence: NDArray[np.int32],
    draws: NDArray[np.int32] | None = None,
) -> tuple[Distributions, int]:
    """Joins the teacher's top-k, the queried and the actual tokens; also the number of tails lifted to TAIL_FLOOR.

    The tail of the union is the teacher's tail less the queried mass outside its top-k, in float64. It is a
    difference: below TAIL_FLOOR it is taken to be TAIL_FLOOR, which bounds a reverse KL whose student has mass there.
    Draws of the student, if they were queried behind its top-k, become the sampled tokens in place of the teacher's.
    """
    assert answer.query_logprobs is not None, "the query had query ids"
    width = query_token_ids.shape[1]
    of_draws = answer.query_logprobs[:, width:]
    actual_T1 = sequence[answer.start :, None]
    extra_ids = np.concatenate([query_token_ids, actual_T1], axis=1)
    extra_logprobs = np.concatenate(
        [answer.query_logprobs[:, :width], answer.target_logprobs[:, None]], axis=1
    )
    known = (extra_ids < 0) | in_rows(extra_ids, answer.token_ids)
    known[:, -1] |= (query_token_ids == actual_T1).any(axis=1)
    added = np.where(known, -np.inf, extra_logprobs.astype(np.float64))
    tail = np.exp(answer.log_tail.astype(np.float64)) - np.exp(added).sum(axis=1)
    # The tail of the teacher's own top-k is exact, however small it is.
    changed = np.isfinite(added).any(axis=1)
    clamped = changed & (tail < TAIL_FLOOR)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_tail = np.where(changed, np.log(np.maximum(tail, TAIL_FLOOR)), answer.log_tail.astype(np.float64))
    joined = replace(
        answer,
        token_ids=np.concatenate([answer.token_ids, np.where(known, PAD_ID, extra_ids)], axis=1).astype(
            np.int32
        ),
        logprobs=np.concatenate([answer.logprobs, added], axis=1).astype(np.float32),
        log_tail=log_tail.astype(np.float32),
        query_logprobs=None,
        sampled_token_ids=answer.sampled_token_ids if draws is None else draws,
        sampled_logprobs=answer.sampled_logprobs if draws is None else of_draws,
    )
    return joined, int(clamped.sum())


def mix(answers: Sequence[Distributions], weights: Sequence[float], *, vocab_size: int) -> Distributions:
    """sum_i w_i p_i on the union of the supports, most likely first, with w normalised; its width is the sum of all K.

    Where a teacher has not reported a token that another one has, its probability is unknown: its tail spread evenly
    over the tokens outside its support, or its least likely reported token if that is less. With K = V, and where
    all supports are the same, the mixture is exact. `vocab_size` is the teachers' number of logits.
    """
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    candidates = np.concatenate([answer.token_ids for answer in answers], axis=1)
    distinct = _first_occurrences(candidates)
    probs = np.zeros(candidates.shape, np.float64)
    tail = np.zeros(len(candidates), np.float64)
    for share, answer in zip(shares, answers, strict=True):
        own, rest = _project(candidates, distinct, answer, vocab_size)
        probs += share * own
        tail += share * rest
    probs = np.where(distinct, probs, -1.0)
    order = np.argsort(-probs, axis=1, kind="stable")
    ids = np.where(distinct, candidates, PAD_ID)
    with np.errstate(divide="ignore"):
        targets = np.stack([answer.target_logprobs.astype(np.float64) for answer in answers])
        return Distributions(
            start=answers[0].start,
            token_ids=np.take_along_axis(ids, order, 1).astype(np.int32),
            logprobs=np.log(np.maximum(np.take_along_axis(probs, order, 1), 0.0)).astype(np.float32),
            target_logprobs=np.log((shares[:, None] * np.exp(targets)).sum(0)).astype(np.float32),
            log_tail=np.log(np.maximum(tail, 0.0)).astype(np.float32),
            query_logprobs=_mixed_queries(answers, shares),
        )


def _project(
    candidates: NDArray[np.int32], distinct: NDArray[np.bool_], answer: Distributions, vocab_size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A teacher's probability of each candidate [T, C], and its remaining mass [T]."""
    own_ids, own = answer.token_ids, np.exp(answer.logprobs.astype(np.float64))
    own = np.where(own_ids >= 0, own, 0.0)
    tail = np.exp(answer.log_tail.astype(np.float64))
    order = np.argsort(own_ids, axis=1, kind="stable")
    sorted_ids = np.take_along_axis(own_ids, order, 1)
    place = _search_rows(sorted_ids, candidates)
    found = np.take_along_axis(sorted_ids, place, 1) == candidates
    reported = np.take_along_axis(np.take_along_axis(own, order, 1), place, 1)
    num_others = np.maximum(vocab_size - (own_ids >= 0).sum(1), 1)
    least = np.where(own_ids >= 0, own, np.inf).min(1, initial=np.inf)
    guess = np.minimum(tail / num_others, least)
    probs = np.where(found, reported, guess[:, None]) * distinct
    unknown = (~found & distinct).sum(1)
    return probs, np.maximum(tail - guess * unknown, 0.0)


def _mixed_queries(
    answers: Sequence[Distributions], shares: NDArray[np.float64]
) -> NDArray[np.float32] | None:
    """Queried log-probabilities of the mixture, which are exact; -inf stays at padding."""
    queries = [answer.query_logprobs for answer in answers]
    if any(query is None for query in queries):
        return None
    probs = np.stack([np.exp(query.astype(np.float64)) for query in queries if query is not None])
    with np.errstate(divide="ignore"):
        mixed: NDArray[np.float32] = np.log(np.tensordot(shares, probs, axes=1)).astype(np.float32)
    return mixed


def in_rows(values: NDArray[np.int32], rows: NDArray[np.int32]) -> NDArray[np.bool_]:
    """[T, C]: membership of each of `values` in the same row of `rows` [T, K]."""
    if rows.shape[1] == 0:
        return np.zeros(values.shape, np.bool_)
    ordered = np.sort(rows, axis=1)
    found: NDArray[np.bool_] = np.take_along_axis(ordered, _search_rows(ordered, values), 1) == values
    return found


def _search_rows(ordered: NDArray[np.int32], values: NDArray[np.int32]) -> NDArray[np.int64]:
    """[T, C]: index of each of `values` in its ascending row of `ordered` [T, K], if it is there."""
    # One ascending line of all rows: a row's offset lifts it above the ones before it.
    span = np.int64(max(int(ordered.max(initial=0)), int(values.max(initial=0))) + 2)
    offsets = np.arange(len(ordered), dtype=np.int64)[:, None] * span
    flat = (ordered.astype(np.int64) + 1 + offsets).ravel()
    place = np.searchsorted(flat, (values.astype(np.int64) + 1 + offsets).ravel()).reshape(values.shape)
    columns = place - np.arange(len(ordered), dtype=np.int64)[:, None] * ordered.shape[1]
    clipped: NDArray[np.int64] = np.clip(columns, 0, ordered.shape[1] - 1)
    return clipped


def _first_occurrences(ids: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Marks the first occurrence of every id of each row."""
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, 1)
    first = np.ones_like(ordered, np.bool_)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    result = np.zeros_like(first)
    np.put_along_axis(result, order, first & (ordered >= 0), 1)
    return result
