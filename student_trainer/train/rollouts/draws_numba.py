"""Draws a token and its position's likeliest ids and other draws from probabilities on a CPU, compiled with numba: few passes over a row.

Sums are in float64, block by block, so that a draw looks into one block alone. A row's result is independent of the others.
Axes: B sequences, V vocabulary, Q likeliest ids, R draws.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.tensors.compiled_loop import compiled_loop

_BLOCK = 128
"""Ids whose probabilities are summed, and compared, first."""


def draw_tokens(probs_BV: NDArray[np.float32], uniform_B: NDArray[np.float64]) -> NDArray[np.int64]:
    """Samples by the inverse CDF, [B]; never a token of probability 0. Ids of rows with NaN mean nothing."""
    tokens_B = np.empty(len(probs_BV), np.int64)
    _draw_tokens(probs_BV, uniform_B, tokens_B)
    return tokens_B


def take_support(
    probs_BV: NDArray[np.float32], uniform_B: NDArray[np.float64], num_likeliest: int, num_draws: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """(Likeliest ids [B, Q] in falling order, ties by id, draws [B, R] from the others, ascending, their log-probabilities there).

    The line of the others' probabilities is cut into R equal parts, of which each gives the id under one place, the same in all
    parts. A draw is -1 where nothing is left. `probs_BV` is changed.
    """
    batch = len(probs_BV)
    likeliest_BQ, draws_BR = (
        np.zeros((batch, num_likeliest), np.int32),
        np.empty((batch, num_draws), np.int32),
    )
    logprobs_BR = np.empty((batch, num_draws), np.float32)
    # The bits of numbers of one sign are in their order, and compared many at a time.
    _take_support(probs_BV, probs_BV.view(np.int32), uniform_B, likeliest_BQ, draws_BR, logprobs_BR)
    return likeliest_BQ, draws_BR, logprobs_BR


def _vectorised(function: Any) -> Any:
    """Sums and maxima in any order."""
    return compiled_loop(function, fastmath={"reassoc", "nnan", "nsz", "contract"})


@_vectorised
def _block_sum(probs_V: Any, first: Any, end: Any) -> Any:
    total = 0.0
    for token in range(first, end):
        total += np.float64(probs_V[token])
    return total


@_vectorised
def _block_max(keys_V: Any, first: Any, end: Any) -> Any:
    highest = np.int32(-1)
    for token in range(first, end):
        highest = max(highest, keys_V[token])
    return highest


@compiled_loop
def _walk(probs_V: Any, first: Any, before: Any, point: Any) -> Any:
    """(Id, sum before it) of the first cumulative sum above `point` in the block that begins with `first`.

    Where rounding leaves the point just outside, the block's last id that has a probability.
    """
    last, last_before, reached = first, before, before
    for token in range(first, min(first + _BLOCK, len(probs_V))):
        share = np.float64(probs_V[token])
        if share > 0:
            last, last_before = token, reached
            reached += share
            if reached > point:
                break
    return last, last_before


@compiled_loop
def _draw_tokens(probs_BV: Any, uniform_B: Any, tokens_B: Any) -> None:
    vocab_size = probs_BV.shape[1]
    sums = np.empty(-(-vocab_size // _BLOCK), np.float64)
    for row in range(probs_BV.shape[0]):
        probs_V, total = probs_BV[row], 0.0
        for block in range(len(sums)):
            first = block * _BLOCK
            sums[block] = _block_sum(probs_V, first, min(first + _BLOCK, vocab_size))
            total += sums[block]
        point, before, chosen = uniform_B[row] * total, 0.0, 0
        chosen_before = 0.0
        for block in range(len(sums)):
            if sums[block] > 0:
                chosen, chosen_before = block, before
                before += sums[block]
                if before > point:
                    break
        tokens_B[row] = _walk(probs_V, chosen * _BLOCK, chosen_before, point)[0]


@compiled_loop
def _take_support(  # noqa: PLR0917 - compiled code takes no keywords
    probs_BV: Any, keys_BV: Any, uniform_B: Any, likeliest_BQ: Any, draws_BR: Any, logprobs_BR: Any
) -> None:
    sums = np.empty(-(-probs_BV.shape[1] // _BLOCK), np.float64)
    highest = np.empty(likeliest_BQ.shape[1], np.int32)
    for row in range(len(probs_BV)):
        _find_likeliest(probs_BV[row], keys_BV[row], sums, highest, likeliest_BQ[row])
        if draws_BR.shape[1] > 0:
            _draw_others(
                probs_BV[row], sums, uniform_B[row], likeliest_BQ[row], draws_BR[row], logprobs_BR[row]
            )


@compiled_loop
def _find_likeliest(probs_V: Any, keys_V: Any, sums: Any, highest: Any, ids: Any) -> None:
    """Fills in the sums of blocks and the likeliest ids."""
    wanted, found = len(ids), 0
    for block in range(len(sums)):
        first = block * _BLOCK
        end = min(first + _BLOCK, len(probs_V))
        sums[block] = _block_sum(probs_V, first, end)
        if wanted == 0 or (found == wanted and _block_max(keys_V, first, end) <= highest[wanted - 1]):
            continue
        for token in range(first, end):
            value = keys_V[token]
            if found == wanted and value <= highest[wanted - 1]:
                continue
            place = found if found < wanted else wanted - 1
            while place > 0 and value > highest[place - 1]:
                highest[place], ids[place] = highest[place - 1], ids[place - 1]
                place -= 1
            highest[place], ids[place] = value, token
            found = min(found + 1, wanted)


@compiled_loop
def _draw_others(  # noqa: PLR0917 - compiled code takes no keywords
    probs_V: Any, sums: Any, uniform: Any, likeliest: Any, draws: Any, logprobs: Any
) -> None:
    """Draws from all but the likeliest, whose probabilities become 0."""
    for token in likeliest:
        probs_V[token] = 0
    for token in likeliest:
        first = token // _BLOCK * _BLOCK
        sums[first // _BLOCK] = _block_sum(probs_V, first, min(first + _BLOCK, len(probs_V)))
    mass = 0.0
    for block in range(len(sums)):
        mass += sums[block]
    if not mass > 0:
        draws[:], logprobs[:] = -1, 0
        return
    block, before = 0, 0.0
    for part in range(len(draws)):
        point = (part + uniform) / len(draws) * mass
        while before + sums[block] <= point and block + 1 < len(sums):
            before += sums[block]
            block += 1
        here, here_before = block, before
        while sums[here] <= 0 and here > 0:  # rounding has left the point behind the last id
            here -= 1
            here_before -= sums[here]
        token = _walk(probs_V, here * _BLOCK, here_before, point)[0]
        draws[part], logprobs[part] = token, np.log(np.float64(probs_V[token]) / mass)
