"""Reverse KL of rows of logits over kept tokens, draws of the student and the tail, with its gradient in place, compiled with numba.

As student_trainer/train/loss/ defines it, at temperature 1; a row's result is independent of the others. With q the
student's probability of a token, r its log ratio to the teacher's, s the share of a draw, R the tail's log ratio, D the row's loss, w
its weight and c the gradient of the text's token, the gradient of a logit is
    q (w (r - D) - c)                 of a kept token,
    q (w (R - D + s (r - R)) - c)     of a draw,
    q (w (R - D) - c)                 of any other token, and c more of the text's.
Axes: C rows, K kept and drawn tokens, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.tensors.compiled_loop import compiled_loop
from stillhouse.protos.tensors.exponentials_numba import (
    LOG2_E,
    exponentials,
    number_at,
    power_of_two,
    put_number,
)
from stillhouse.protos.tensors.instructions_numba import wide_vectors

_UNUSED, _KEPT, _DRAWN, _BEYOND = np.int32(0), np.int32(1), np.int32(2), np.int32(3)
"""Kinds of tokens; those beyond the valid ids belong to the tail."""
_MAX_QUOTIENT = 1e30
"""Largest quotient of a gradient and its row's factor, which float32 and bfloat16 hold."""
_ZERO, _ONE, _NOTHING = np.float32(0.0), np.float32(1.0), np.float32(-np.inf)


class TargetRows(NamedTuple):
    """Targets and weights of C rows."""

    token_ids: NDArray[np.int64]
    """[C, K], distinct, negative in unused columns."""
    logprobs: NDArray[np.float32]
    """[C, K]: the teacher's."""
    draw_shares: NDArray[np.float32]
    """[C, K]: 0 for kept tokens."""
    log_tail: NDArray[np.float32]
    """[C]: the teacher's."""
    text_ids: NDArray[np.int64]
    """[C]."""
    weights: NDArray[np.float32]
    """[C]: w."""
    text_gradients: NDArray[np.float32]
    """[C]: c."""


class Limits(NamedTuple):
    """Limits of all rows."""

    num_valid: int
    """Ids from here on belong to the tail."""
    least_logprob: float
    """Stands for the teacher's log-probability of a token without one."""
    least_tail: float
    """Least log of the teacher's tail."""


class RowValues(NamedTuple):
    """Values of C rows, in float32."""

    losses: NDArray[np.float32]
    text_logprobs: NDArray[np.float32]
    """The student's, of the text's tokens."""
    is_clamped: NDArray[np.float32]
    """1 where the teacher's tail is below its floor and the student has one, else 0."""
    factors: NDArray[np.float32]
    """Numbers by which the rows of gradients still have to be multiplied."""


def differentiate(
    logits_CV: Any, targets: TargetRows, limits: Limits, values: RowValues, rows: slice
) -> None:
    """Replaces the logits of `rows`, float32 or the bits of bfloat16, by the gradient, up to the row's factor, and fills in `values`."""
    parts: Any = (each[rows] for each in targets)
    logits, own = logits_CV[rows], TargetRows(*parts)
    bits, count = logits.dtype == np.uint16, len(logits)
    kept, text = np.empty(own.token_ids.shape, np.float32), np.empty(count, np.float32)
    _take(logits, bits, own.token_ids, own.text_ids, limits.num_valid, kept, text)
    references, sums = np.empty(count, np.float32), np.empty(count, np.float64)
    exponentials(logits, slice(count), scale=1.0, keep=True, references_R=references, sums_R=sums)
    found = (each[rows] for each in values)
    _differentiate(logits, bits, *own, *limits, kept, text, references, sums, *found)


def prepare() -> None:
    """Calls the compiled loops once, for logits of both types."""
    ids, logprobs = np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32)
    one = logprobs[0]
    targets = TargetRows(ids, logprobs, logprobs, one, ids[0], one, one)
    for logits in (np.zeros((1, 16), np.float32), np.zeros((1, 16), np.uint16)):  # bfloat16 as bits
        values = RowValues(*(np.zeros(1, np.float32) for _ in RowValues._fields))
        differentiate(logits, targets, Limits(16, -1.0, -1.0), values, slice(1))


def _in_any_order(function: Any) -> Any:
    return compiled_loop(function, fastmath={"reassoc", "nsz", "contract"}, error_model="numpy")


@compiled_loop
def _take(  # noqa: PLR0917 - compiled code takes no keywords
    logits_CV: Any, bits: Any, ids_CK: Any, text_ids_C: Any, num_valid: Any, kept_CK: Any, text_C: Any
) -> None:
    """Copies the logits of tokens, and overwrites those of kept and drawn ones with -inf."""
    for row in range(len(logits_CV)):
        logits, ids, kept = logits_CV[row], ids_CK[row], kept_CK[row]
        text_C[row] = number_at(logits, text_ids_C[row], bits)
        for place in range(len(ids)):
            token = ids[place]
            kept[place] = number_at(logits, token, bits) if 0 <= token < num_valid else _NOTHING
        for token in ids:
            if 0 <= token < num_valid:
                put_number(logits, token, bits, _NOTHING)


@compiled_loop
def _differentiate(  # noqa: PLR0917
    logits_CV: Any,
    bits: Any,
    ids_CK: Any,
    logprobs_CK: Any,
    shares_CK: Any,
    log_tail_C: Any,
    text_ids_C: Any,
    weights_C: Any,
    text_gradients_C: Any,
    num_valid: Any,
    least_logprob: Any,
    least_tail: Any,
    kept_CK: Any,
    text_C: Any,
    references_C: Any,
    sums_C: Any,
    losses_C: Any,
    text_logprobs_C: Any,
    is_clamped_C: Any,
    factors_C: Any,
) -> None:
    num_tokens, num_logits = ids_CK.shape[1], logits_CV.shape[1]
    probs, ratios = np.empty(num_tokens, np.float32), np.empty(num_tokens, np.float32)
    kinds, shares = np.empty(num_tokens, np.int32), np.empty(num_tokens, np.float32)
    for row in range(len(logits_CV)):
        logits, ids, kept = logits_CV[row], ids_CK[row], kept_CK[row]
        has_all = _sort_out(ids, shares_CK[row], num_valid, kinds) >= num_logits
        log_mass, log_tail = _teacher(kinds, logprobs_CK[row], log_tail_C[row], has_all)
        reference, highest = references_C[row], max(references_C[row], _highest(kept))
        unit = math.exp(np.float64(reference - highest))
        rest = unit * sums_C[row]
        total = rest + np.float64(_exponentials(kept, highest, probs))
        log_total = math.log(total)
        student = highest, np.float32(log_total)
        teacher = np.float32(log_mass), np.float32(least_logprob)
        _compare(kinds, logprobs_CK[row], kept, *student, *teacher, ratios)
        _count(kinds, logprobs_CK[row], shares_CK[row], log_tail > -np.inf, shares)
        tail = rest + np.float64(_drawn_sum(kinds, probs))
        tail_ratio = 0.0
        if tail != 0:
            tail_ratio = math.log(tail) - log_total - max(log_tail, least_tail)
        terms = np.float64(_sum_of_terms(kinds, probs, ratios, shares, np.float32(tail_ratio)))
        loss = (terms + tail * tail_ratio) / total
        weight, of_text = np.float64(weights_C[row]), np.float64(text_gradients_C[row])
        base = weight * (tail_ratio - loss) - of_text
        factor = np.float32(unit / total * base)
        most = _gradients(
            kinds,
            probs,
            ratios,
            shares,
            np.float32(tail_ratio),
            np.float32(1 / total),
            np.float32(weight * loss + of_text),
            weights_C[row],
        )
        losses_C[row], text_logprobs_C[row] = loss, np.float64(text_C[row] - highest) - log_total
        is_clamped_C[row] = 1 if log_tail < least_tail and not has_all else 0
        if abs(np.float64(factor)) * _MAX_QUOTIENT < max(np.float64(most), abs(of_text)):
            for token in range(num_logits):
                put_number(logits, token, bits, number_at(logits, token, bits) * factor)
            factor = _ONE
        factors_C[row] = factor
        divisor = _ONE if factor == 0 else factor
        for place in range(num_tokens):
            if kinds[place] == _KEPT or kinds[place] == _DRAWN:
                put_number(logits, ids[place], bits, probs[place] / divisor)
        text = text_ids_C[row]
        put_number(logits, text, bits, number_at(logits, text, bits) + text_gradients_C[row] / divisor)


@compiled_loop
def _sort_out(ids: Any, shares: Any, num_valid: Any, kinds: Any) -> Any:
    """Fills in the kinds; the number of kept tokens."""
    number = 0
    for place in range(len(ids)):
        token, is_drawn = ids[place], shares[place] > 0
        kinds[place] = _UNUSED
        if 0 <= token < num_valid:
            kinds[place] = _DRAWN if is_drawn else _KEPT
            number += 0 if is_drawn else 1
        elif token >= 0 and not is_drawn:
            kinds[place] = _BEYOND
    return number


@compiled_loop
def _teacher(kinds: Any, logprobs: Any, log_tail: Any, has_all: Any) -> Any:
    """Logs of the teacher's mass of kept tokens and tail, and of the tail's part in it; there is no tail if the kept are all."""
    tail = _log_mass(kinds, _BEYOND, logprobs, np.float64(log_tail))
    if has_all:
        tail = -np.inf
    mass = _log_mass(kinds, _KEPT, logprobs, tail)
    if mass == -np.inf:
        mass = 0.0
    return mass, tail - mass


@compiled_loop
def _log_mass(kinds: Any, kind: Any, logprobs: Any, log_other: Any) -> Any:
    """Log of the mass of the tokens of one kind and another one."""
    most = log_other
    for place in range(len(kinds)):
        if kinds[place] == kind:
            most = max(most, np.float64(logprobs[place]))
    if most == -np.inf:
        return most
    total = math.exp(log_other - most)
    for place in range(len(kinds)):
        if kinds[place] == kind:
            total += math.exp(np.float64(logprobs[place]) - most)
    return most + math.log(total)


@_in_any_order
def _highest(kept: Any) -> Any:
    wide_vectors()
    highest = _NOTHING
    for place in range(len(kept)):
        highest = max(highest, kept[place])
    return highest


@_in_any_order
def _exponentials(kept: Any, highest: Any, probs: Any) -> Any:
    """Fills in e^(logit - highest); their sum."""
    wide_vectors()
    total = _ZERO
    for place in range(len(kept)):
        probs[place] = power_of_two(np.float32((kept[place] - highest) * LOG2_E))
        total += probs[place]
    return total


@_in_any_order
def _compare(  # noqa: PLR0917
    kinds: Any,
    logprobs: Any,
    kept: Any,
    highest: Any,
    log_total: Any,
    log_mass: Any,
    least_logprob: Any,
    ratios: Any,
) -> None:
    """Fills in log ratios of student and teacher; 0 for tokens without a probability of the student."""
    wide_vectors()
    for place in range(len(kinds)):
        own = kept[place] - highest - log_total
        other = logprobs[place] - (log_mass if kinds[place] == _KEPT else _ZERO)
        ratio = own - (least_logprob if other == _NOTHING else other)
        ratios[place] = _ZERO if kept[place] == _NOTHING else ratio


@compiled_loop
def _count(kinds: Any, logprobs: Any, draw_shares: Any, has_tail: Any, shares: Any) -> None:
    """Fills in the shares of draws that count: of a tail, and known to the teacher."""
    wide_vectors()
    for place in range(len(kinds)):
        counts = has_tail and kinds[place] == _DRAWN and logprobs[place] > _NOTHING
        shares[place] = draw_shares[place] if counts else _ZERO


@_in_any_order
def _drawn_sum(kinds: Any, probs: Any) -> Any:
    wide_vectors()
    total = _ZERO
    for place in range(len(kinds)):
        total += probs[place] if kinds[place] == _DRAWN else _ZERO
    return total


@_in_any_order
def _sum_of_terms(kinds: Any, probs: Any, ratios: Any, shares: Any, tail_ratio: Any) -> Any:
    """The loss of kept tokens and of what draws tell beyond the tail's ratio."""
    wide_vectors()
    total = _ZERO
    for place in range(len(kinds)):
        drawn = shares[place] * (ratios[place] - tail_ratio)
        total += probs[place] * (ratios[place] if kinds[place] == _KEPT else drawn)
    return total


@_in_any_order
def _gradients(  # noqa: PLR0917
    kinds: Any,
    probs: Any,
    ratios: Any,
    shares: Any,
    tail_ratio: Any,
    share_of_one: Any,
    common: Any,
    weight: Any,
) -> Any:
    """Replaces exponentials by gradients; the largest absolute value."""
    wide_vectors()
    most = _ZERO
    for place in range(len(kinds)):
        drawn = tail_ratio + shares[place] * (ratios[place] - tail_ratio)
        compared = ratios[place] if kinds[place] == _KEPT else drawn
        gradient = probs[place] * share_of_one * (weight * compared - common)
        probs[place] = gradient
        most = max(most, abs(gradient))
    return most
