"""Rows from an upstream server's candidates: every id and number is checked before it becomes a distribution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import MAX_LOGPROB, MAX_ROW_SUM, Distributions
from stillhouse.teacher_service.distributions.tail import log_tail

# Axes: T positions, C candidates of a row as they came, K kept tokens.

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]


def to_distributions(
    ids_TC: Int64Array,
    logprobs_TC: Float64Array,
    target_logprobs_T: Float64Array,
    *,
    top_k: int,
    start: int,
    vocab_size: int,
) -> Distributions:
    """Checks and sorts candidates, of which a row has at least `top_k`; id -1 fills shorter rows.

    `start` is the position that row 0 predicts.

    Raises:
        StillhouseError: NON_FINITE for NaN or infinity; TENSOR_INVALID for too few candidates, ids outside of the vocabulary or
            twice in a row, positive log-probabilities, and rows that sum to more than 1.
    """
    num_rows = len(ids_TC)
    if ids_TC.shape != logprobs_TC.shape or target_logprobs_T.shape != (num_rows,):
        invalid(f"gives {list(ids_TC.shape)} ids and {list(logprobs_TC.shape)} log-probabilities")
    absent_TC = ids_TC == -1
    if ids_TC.size and not (ids_TC.min() >= -1 and ids_TC.max() < vocab_size):
        invalid(
            f"gives ids from {ids_TC.min()} to {ids_TC.max()}, and the vocabulary has {vocab_size}. If the model's output layer is "
            "larger, put its config.json beside the tokenizer"
        )
    values_TC = np.where(absent_TC, -np.inf, logprobs_TC)
    _require_finite(np.where(absent_TC, 0.0, logprobs_TC), target_logprobs_T, start)
    order_TC = np.argsort(-values_TC, axis=1, kind="stable")
    ids_TK = np.take_along_axis(ids_TC, order_TC, axis=1)[:, :top_k]
    logprobs_TK = np.take_along_axis(values_TC, order_TC, axis=1)[:, :top_k].astype(np.float32)
    if ids_TK.shape[1] < top_k or (ids_TK < 0).any():
        invalid(f"gives fewer than the {top_k} candidates at a position that were requested")
    ordered = np.sort(ids_TC, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        invalid("names a token twice at one position")
    if max(values_TC.max(initial=-np.inf), target_logprobs_T.max(initial=-np.inf)) > MAX_LOGPROB:
        invalid("gives a log-probability above 0")
    if (np.exp(logprobs_TK.astype(np.float64)).sum(axis=1) > MAX_ROW_SUM).any():
        invalid("gives probabilities that sum to more than 1 at one position")
    return Distributions(
        start=start,
        token_ids=np.ascontiguousarray(ids_TK, dtype=np.int32),
        logprobs=np.ascontiguousarray(logprobs_TK),
        target_logprobs=target_logprobs_T.astype(np.float32),
        log_tail=log_tail(logprobs_TK, vocab_size),
    )


def from_mappings(
    rows: Sequence[Mapping[int, float]],
    targets: Sequence[int],
    *,
    top_k: int,
    start: int,
    vocab_size: int,
) -> Distributions:
    """Converts rows of id to log-probability, each with its target. Raises `StillhouseError` as `to_distributions`."""
    width = max((len(row) for row in rows), default=0)
    if width > top_k + 2:
        invalid(f"gives {width} candidates at a position where {top_k} were requested")
    ids_TC = np.full((len(rows), width), -1, np.int64)
    logprobs_TC = np.full((len(rows), width), -np.inf)
    target_logprobs_T = np.zeros(len(rows))
    for index, (row, target) in enumerate(zip(rows, targets, strict=True)):
        ids_TC[index, : len(row)] = list(row)
        logprobs_TC[index, : len(row)] = list(row.values())
        if target not in row:
            invalid(f"leaves out the token at position {start + index}")
        target_logprobs_T[index] = row[target]
    return to_distributions(
        ids_TC, logprobs_TC, target_logprobs_T, top_k=top_k, start=start, vocab_size=vocab_size
    )


def number(value: Any) -> float:
    """A number of a JSON document; null is NaN. Raises `StillhouseError` (TENSOR_INVALID) for anything else."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        invalid("gives something that is not a number as a log-probability")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def token_id(value: Any) -> int:
    """An id of a JSON document: a number, or the name of a field. Raises `StillhouseError` (TENSOR_INVALID)."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        invalid("gives something that is not a token id")
    return int(value)


def token_ids(value: Any, *, most: int) -> list[int]:
    """A list of at most `most` ids of a JSON document. Raises `StillhouseError` (TENSOR_INVALID)."""
    return [token_id(each) for each in items(value, most=most)]


def items(value: Any, *, most: int) -> list[Any]:
    """A list of a JSON document with at most `most` entries. Raises `StillhouseError` (TENSOR_INVALID)."""
    if not isinstance(value, list) or len(value) > most:
        found = f"a list of {len(value)}" if isinstance(value, list) else "no list"
        invalid(f"gives {found} where at most {most} entries can be")
    return value


def fields(value: Any) -> dict[str, Any]:
    """An object of a JSON document. Raises `StillhouseError` (TENSOR_INVALID)."""
    if not isinstance(value, dict):
        invalid("answers in another form than its API has")
    return value


def invalid(what: str) -> NoReturn:
    """Raises the error of an answer that cannot be right."""
    raise StillhouseError(
        Reason.TENSOR_INVALID,
        f"The upstream server {what}. It may be of a version that this teacher does not know; see docs/guides/upstream.md.",
    )


def _require_finite(logprobs_TC: Float64Array, target_logprobs_T: Float64Array, start: int) -> None:
    bad_T = ~(np.isfinite(logprobs_TC).all(axis=1) & np.isfinite(target_logprobs_T))
    if bad_T.any():
        position = start + int(bad_T.argmax())
        raise StillhouseError(
            Reason.NON_FINITE,
            f"The upstream server's log-probabilities for position {position} are NaN, infinite or missing. Its weights are "
            "damaged, or its activations overflow: try a wider type there.",
            metadata={"position": str(position)},
        )
