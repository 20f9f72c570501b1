"""Converts vLLM's flat logprobs to distributions; the only module that knows their layout.

A row holds 1 + K candidates: first the actual token, whatever its rank, then the top K in order, where that token may
occur again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.distributions.from_logits import non_finite
from stillhouse.teacher_service.distributions.tail import log_tail


def to_distributions(
    flat: Any, *, first_row: int, num_rows: int, top_k: int, start: int, vocab_size: int
) -> Distributions:
    """Converts rows [first_row, first_row + num_rows) of vLLM's `FlatLogprobs` to distributions with `top_k` columns.

    `start` is the position that the first row predicts. Raises `StillhouseError` (NON_FINITE) for NaN or infinite
    logprobs.
    """
    width = top_k + 1
    if len(flat.start_indices) < first_row + num_rows:
        raise RuntimeError(f"vLLM returned {len(flat.start_indices)} rows of {first_row + num_rows}")
    begin = int(flat.start_indices[first_row])
    if int(flat.end_indices[first_row + num_rows - 1]) == begin + num_rows * width:
        token_ids_TW = np.array(flat.token_ids[begin : begin + num_rows * width], dtype=np.int32)
        logprobs_TW = np.array(flat.logprobs[begin : begin + num_rows * width], dtype=np.float32)
    else:
        order = [
            place for row in range(first_row, first_row + num_rows) for place in _places(flat, row, width)
        ]
        token_ids_TW = np.array([flat.token_ids[place] for place in order], dtype=np.int32)
        logprobs_TW = np.array([flat.logprobs[place] for place in order], dtype=np.float32)
    token_ids_TW, logprobs_TW = token_ids_TW.reshape(num_rows, width), logprobs_TW.reshape(num_rows, width)
    return from_arrays(
        token_ids_TW, logprobs_TW, num_rows=num_rows, top_k=top_k, start=start, vocab_size=vocab_size
    )


def _places(flat: Any, row: int, width: int) -> list[int]:
    """Indices of a row's candidates in the flat lists.

    vLLM joins the outputs that wait for a slow reader through dictionaries. There the actual token loses its second
    place if it is among the top K; its rank tells that place.
    """
    places = list(range(int(flat.start_indices[row]), int(flat.end_indices[row])))
    ranked = sorted(places, key=lambda place: int(flat.ranks[place]))
    if [flat.ranks[place] for place in ranked] == list(range(1, width)):
        return places[:1] + ranked
    if len(places) != width:
        raise RuntimeError(
            f"vLLM returned rows that are not all {width} wide: one has {len(places)} candidates"
        )
    return places


def from_arrays(
    token_ids_TW: Any, logprobs_TW: Any, *, num_rows: int, top_k: int, start: int, vocab_size: int
) -> Distributions:
    """Converts arrays [T, 1 + K], as vLLM's worker makes them."""
    if logprobs_TW.shape != (num_rows, top_k + 1) or token_ids_TW.shape != logprobs_TW.shape:
        raise RuntimeError(
            f"vLLM returned {list(token_ids_TW.shape)} ids and {list(logprobs_TW.shape)} logprobs for {num_rows} rows "
            f"that are {top_k + 1} wide"
        )
    token_ids_TW = token_ids_TW.astype(np.int32, copy=False)
    _require_finite(logprobs_TW, start)
    return Distributions(
        start=start,
        token_ids=np.ascontiguousarray(token_ids_TW[:, 1:]),
        logprobs=np.ascontiguousarray(logprobs_TW[:, 1:]),
        target_logprobs=np.ascontiguousarray(logprobs_TW[:, 0]),
        log_tail=log_tail(logprobs_TW[:, 1:], vocab_size),
    )


def _require_finite(logprobs_TW: np.ndarray[tuple[int, ...], np.dtype[np.float32]], start: int) -> None:
    bad_T = ~np.isfinite(logprobs_TW).all(axis=1)
    if bad_T.any():
        raise non_finite(start + int(bad_T.argmax()))
