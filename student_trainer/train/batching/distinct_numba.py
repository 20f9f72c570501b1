"""Distinct draws of rows in ascending order, compiled with numba: one walk over a row. Axes: T positions, K kept tokens, R draws."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.tensors.compiled_loop import compiled_loop


def count_distinct(
    draws: NDArray[np.int32], besides: NDArray[np.int32], wanted: NDArray[np.bool_], filling: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]] | None:
    """Ids, counts and places [T, D] of the distinct draws of wanted rows that are >= 0 and not among `besides` [T, K].

    Draws [T, R] but negative ones and `besides` ascend in each row. Ids are `filling` where a row has fewer. None if a row of draws
    does not ascend.
    """
    ids = np.full(draws.shape, filling, np.int32)
    counts, places = np.zeros(draws.shape, np.int32), np.zeros(draws.shape, np.int32)
    most = int(_count(np.ascontiguousarray(draws), besides, wanted, ids, counts, places))
    return None if most < 0 else (ids[:, :most], counts[:, :most], places[:, :most])


def own_draws(
    draws: NDArray[np.int32],
    besides: NDArray[np.int32],
    wanted: NDArray[np.bool_],
    filling: int,
    *,
    logprobs: NDArray[np.float32],
    draw_logprobs: NDArray[np.float32],
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]] | None:
    """Ids of the same draws as `count_distinct`'s, their `logprobs`, and the share of each in its row's draws over e^`draw_logprobs`.

    Both are [T, R]. Where a row has fewer draws, log-probabilities are -inf and shares 0. None if a row of draws does not ascend.
    """
    ids = np.empty(draws.shape, np.int32)
    own, shares = np.empty(draws.shape, np.float32), np.empty(draws.shape, np.float32)
    arrays = (np.ascontiguousarray(each) for each in (draws, logprobs, draw_logprobs))
    most = int(_weigh(*arrays, besides, wanted, np.int32(filling), ids, own, shares))
    return None if most < 0 else (ids[:, :most], own[:, :most], shares[:, :most])


@compiled_loop
def _walk(draws: Any, besides: Any, ids: Any, counts: Any, places: Any) -> Any:
    """Fills in ids, counts and places of one row's distinct draws; their number, or -1 if the row does not ascend."""
    found, other, before, is_other = 0, 0, -1, True
    for place in range(len(draws)):
        token = draws[place]
        if token < 0:
            continue
        if token < before:
            return -1
        if token == before:
            if not is_other:
                counts[found - 1] += 1
            continue
        before = token
        while other < len(besides) and besides[other] < token:
            other += 1
        is_other = other < len(besides) and besides[other] == token
        if not is_other:
            ids[found], counts[found], places[found] = token, 1, place
            found += 1
    return found


@compiled_loop
def _weigh(  # noqa: PLR0917 - compiled code takes no keywords
    draws: Any,
    logprobs: Any,
    draw_logprobs: Any,
    besides: Any,
    wanted: Any,
    filling: Any,
    ids: Any,
    own: Any,
    shares: Any,
) -> Any:
    """Fills in arrays of draws' shape; the most distinct draws of a row, or -1."""
    num_draws, most = draws.shape[1], 0
    counts, places = np.empty(num_draws, np.int32), np.empty(num_draws, np.int32)
    for row in range(draws.shape[0]):
        found = _walk(draws[row], besides[row], ids[row], counts, places) if wanted[row] else 0
        if found < 0:
            return -1
        for number in range(found):
            place = places[number]
            own[row, number] = logprobs[row, place]
            shares[row, number] = counts[number] * np.exp(-draw_logprobs[row, place]) / np.float32(num_draws)
        ids[row, found:], own[row, found:], shares[row, found:] = filling, -np.inf, 0
        most = max(most, found)
    return most


@compiled_loop
def _count(  # noqa: PLR0917 - compiled code takes no keywords
    draws: Any, besides: Any, wanted: Any, ids: Any, counts: Any, places: Any
) -> Any:
    """Fills in arrays of draws' shape; the most distinct draws of a row, or -1."""
    most = 0
    for row in range(draws.shape[0]):
        found = _walk(draws[row], besides[row], ids[row], counts[row], places[row]) if wanted[row] else 0
        if found < 0:
            return -1
        most = max(most, found)
    return most
