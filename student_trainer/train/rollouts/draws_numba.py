"""Draws a token and its position's likeliest ids and other draws from probabilities on a CPU, compiled with numba: few passes over a row.

Sums are in float64, block by block, so that a draw looks into one block alone. A row's result is independent of the others.
Axes: B sequences, N rows, T places, V vocabulary, Q likeliest ids, R draws.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.tensors.compiled_loop import compiled_loop
from stillhouse.protos.tensors.instructions_numba import wide_vectors

_BLOCK = 128
"""Ids whose probabilities are summed, and compared, first."""


class Places(NamedTuple):
    """Arrays in which the parts of `token_sampler.Support` are filled in, and the place of each of B positions in them."""

    rows: NDArray[np.int64]
    """[B]."""
    places: NDArray[np.int64]
    """[B]."""
    likeliest: NDArray[np.int32]
    """[N, T, Q]."""
    draws: NDArray[np.int32]
    """[N, T, R], of which only as many are filled in as there are."""
    draw_shares: NDArray[np.float32]
    """[N, T, R]: of which the support has logs."""
    num_draws: NDArray[np.int32]
    """[N, T]."""


def draw_tokens(probs_BV: NDArray[np.float32], uniform_B: NDArray[np.float64]) -> NDArray[np.int64]:
    """Samples by the inverse CDF, [B]; never a token of probability 0. Ids of rows with NaN mean nothing."""
    tokens_B = np.empty(len(probs_BV), np.int64)
    _draw_tokens(probs_BV, probs_BV.view(np.int32), uniform_B, tokens_B)
    return tokens_B


def draw_all(
    probs_BV: NDArray[np.float32],
    uniform_2B: NDArray[np.float64],
    least_step: float,
    places: Places,
) -> NDArray[np.int64]:
    """`draw_tokens` by the first numbers and `take_support` by the second, of the same probabilities, in fewer passes."""
    tokens_B = np.empty(len(probs_BV), np.int64)
    _draw_all(probs_BV, probs_BV.view(np.int32), *uniform_2B, least_step, tokens_B, *places)
    return tokens_B


def take_support(
    probs_BV: NDArray[np.float32], uniform_B: NDArray[np.float64], least_step: float, places: Places
) -> None:
    """Fills in the likeliest ids, in falling order, ties by id, draws from the others, and their mean shares.

    As `token_sampler.Support` has them: on the line of the others' probabilities points lie at equal distances, at least
    `least_step`, and each id under one is drawn once.
    """
    no_tokens = np.empty(0, np.int64)
    _draw_all(probs_BV, probs_BV.view(np.int32), uniform_B, uniform_B, least_step, no_tokens, *places)


def _vectorised(function: Any) -> Any:
    """Sums and maxima in any order."""
    return compiled_loop(function, fastmath={"reassoc", "nnan", "nsz", "contract"})


@_vectorised
def _scan(probs_V: Any, keys_V: Any, sums: Any, highest: Any) -> None:
    """Fills in the sum and the largest key of each block."""
    wide_vectors()
    whole = len(probs_V) // _BLOCK
    for block in range(whole):
        total, most, first = 0.0, np.int32(-1), block * _BLOCK
        # Loops of a constant length have neither a remainder nor a test of it.
        for token in range(_BLOCK):
            total += np.float64(probs_V[first + token])
        for token in range(_BLOCK):
            most = max(most, keys_V[first + token])
        sums[block], highest[block] = total, most
    if whole < len(sums):
        total, most = 0.0, np.int32(-1)
        for token in range(whole * _BLOCK, len(probs_V)):
            total += np.float64(probs_V[token])
            most = max(most, keys_V[token])
        sums[whole], highest[whole] = total, most


@_vectorised
def _block_sum(probs_V: Any, first: Any, end: Any) -> Any:
    total = 0.0
    for token in range(first, end):
        total += np.float64(probs_V[token])
    return total


@compiled_loop
def _draw_tokens(probs_BV: Any, keys_BV: Any, uniform_B: Any, tokens_B: Any) -> None:
    sums = np.empty(-(-probs_BV.shape[1] // _BLOCK), np.float64)
    highest = np.empty(len(sums), np.int32)
    for row in range(len(probs_BV)):
        _scan(probs_BV[row], keys_BV[row], sums, highest)
        tokens_B[row] = _draw_token(probs_BV[row], sums, uniform_B[row])


@compiled_loop
def _draw_all(  # noqa: PLR0917 - compiled code takes no keywords
    probs_BV: Any,
    keys_BV: Any,
    uniform_B: Any,
    uniform_draws_B: Any,
    least_step: Any,
    tokens_B: Any,
    rows_B: Any,
    places_B: Any,
    likeliest_NTQ: Any,
    draws_NTR: Any,
    shares_NTR: Any,
    num_draws_NT: Any,
) -> None:
    """Draws tokens too where there is room for them."""
    sums = np.empty(-(-probs_BV.shape[1] // _BLOCK), np.float64)
    highest = np.empty(len(sums), np.int32)
    values = np.empty(likeliest_NTQ.shape[2], np.int32)
    for row in range(len(probs_BV)):
        probs_V, keys_V = probs_BV[row], keys_BV[row]
        _scan(probs_V, keys_V, sums, highest)
        if len(tokens_B) > 0:
            tokens_B[row] = _draw_token(probs_V, sums, uniform_B[row])
        own, place = rows_B[row], places_B[row]
        likeliest, draws, shares = (
            likeliest_NTQ[own, place],
            draws_NTR[own, place],
            shares_NTR[own, place],
        )
        _find_likeliest(keys_V, highest, values, likeliest)
        if len(draws) > 0:
            num_draws_NT[own, place] = _draw_others(
                probs_V, sums, uniform_draws_B[row], least_step, likeliest, draws, shares
            )
            for number in range(len(likeliest)):
                keys_V[likeliest[number]] = values[number]


@compiled_loop
def _draw_token(probs_V: Any, sums: Any, uniform: Any) -> Any:
    """The id of the first cumulative sum above a share of the whole.

    Where rounding leaves that point just outside its block, the block's last id that has a probability.
    """
    total = 0.0
    for block in range(len(sums)):
        total += sums[block]
    point, before, chosen, reached = uniform * total, 0.0, 0, 0.0
    for block in range(len(sums)):
        if sums[block] > 0:
            chosen, reached = block, before
            before += sums[block]
            if before > point:
                break
    first = chosen * _BLOCK
    found = first
    for token in range(first, min(first + _BLOCK, len(probs_V))):
        share = np.float64(probs_V[token])
        if share > 0:
            found = token
            reached += share
            if reached > point:
                break
    return found


@compiled_loop
def _find_likeliest(keys_V: Any, highest: Any, values: Any, ids: Any) -> None:
    wanted, found = len(ids), 0
    for block in range(len(highest)):
        if wanted == 0 or (found == wanted and highest[block] <= values[wanted - 1]):
            continue
        first = block * _BLOCK
        for token in range(first, min(first + _BLOCK, len(keys_V))):
            value = keys_V[token]
            if found == wanted and value <= values[wanted - 1]:
                continue
            place = found if found < wanted else wanted - 1
            while place > 0 and value > values[place - 1]:
                values[place], ids[place] = values[place - 1], ids[place - 1]
                place -= 1
            values[place], ids[place] = value, token
            found = min(found + 1, wanted)


@compiled_loop
def _draw_others(  # noqa: PLR0917 - compiled code takes no keywords
    probs_V: Any, sums: Any, uniform: Any, least_step: Any, likeliest: Any, draws: Any, shares: Any
) -> Any:
    """Draws from all but the likeliest, whose probabilities become 0, and the sums of blocks without them; the number of draws."""
    for token in likeliest:
        probs_V[token] = 0
    for token in likeliest:
        first = token // _BLOCK * _BLOCK
        sums[first // _BLOCK] = _block_sum(probs_V, first, min(first + _BLOCK, len(probs_V)))
    mass = 0.0
    for block in range(len(sums)):
        mass += sums[block]
    if not mass > 0:
        return 0
    step = max(mass / len(draws), least_step)
    found, part, before, point = 0, 0, 0.0, uniform * step
    for block in range(len(sums)):
        if before + sums[block] > point:
            first, reached = block * _BLOCK, before
            for token in range(first, min(first + _BLOCK, len(probs_V))):
                share = np.float64(probs_V[token])
                reached += share
                if reached > point and share > 0 and found < len(draws):
                    draws[found], shares[found] = token, min(share / step, 1.0) / len(draws)
                    found += 1
                    while reached > point:
                        part += 1
                        point = (part + uniform) * step
        before += sums[block]
    return found
