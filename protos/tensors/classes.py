"""Class distributions as arrays, to and from their wire message; a receiver checks every value.

A distribution over C classes is a Distributions of one row, whose token ids are the classes: so caches, streams and losses
treat it as they do a model with a vocabulary of C tokens that sends all of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import ClassDistribution
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import MAX_COLUMNS, MAX_LOGPROB, Distributions
from stillhouse.protos.tensors.layout import decode, encode

MAX_SUM_ERROR = 1e-3
"""Largest distance from 1 of the sum of probabilities in float32."""


def class_row(logprobs: NDArray[np.float32], num_tokens: int) -> Distributions:
    """The distribution over C classes of a sequence of `num_tokens` >= 2 tokens, `logprobs` [C].

    Its row stands at the last token, and its target is the likeliest class: a sequence names none.
    """
    return Distributions(
        start=num_tokens - 1,
        token_ids=np.arange(len(logprobs), dtype=np.int32)[None],
        logprobs=logprobs.astype(np.float32, copy=False)[None],
        target_logprobs=logprobs.max(keepdims=True).astype(np.float32, copy=False),
        log_tail=np.full(1, -np.inf, np.float32),
    )


def reorder_classes(row: Distributions, order: NDArray[np.int64]) -> Distributions:
    """A class row whose class c is class order[c] of `row`, which has its classes in ascending order."""
    return replace(class_row(row.logprobs[0, order], row.start + 1), layer_states=row.layer_states)


def encode_classes(row: Distributions, *, part_bytes: int) -> Iterator[ClassDistribution]:
    """The messages of a class row, each of at most `part_bytes` where a token's states fit into that."""
    logprobs, states = encode(row.logprobs[0]), row.layer_states
    if states is None:
        yield ClassDistribution(logprobs=logprobs)
        return
    step = max(1, (part_bytes - len(logprobs.data)) // (states[0, 0].nbytes + 1))
    for begin in range(0, states.shape[1], step):
        yield ClassDistribution(
            logprobs=None if begin else logprobs, layer_states=encode(states[0, begin : begin + step])
        )


def decode_classes(
    parts: Sequence[ClassDistribution], *, num_classes: int, num_tokens: int, num_layers: int = 0
) -> Distributions:
    """The class row of messages from elsewhere, with the states after `num_layers` layers if there are any.

    Raises StillhouseError(TENSOR_INVALID) for another number of classes, layers or tokens or for what is no distribution,
    and StillhouseError(NON_FINITE) for NaN.
    """
    field = "classes.logprobs"
    logprobs: NDArray[np.float32] = decode(
        parts[0].logprobs, field=field, dtypes=(Tensor.DATA_TYPE_FLOAT32,), shape=(num_classes,)
    )
    if np.isnan(logprobs).any():
        raise _non_finite(field)
    total = float(np.exp(logprobs.astype(np.float64)).sum())
    if logprobs.max() > MAX_LOGPROB or abs(total - 1.0) > MAX_SUM_ERROR:
        raise StillhouseError(
            Reason.TENSOR_INVALID,
            f"{field} reach {logprobs.max():.4g} and sum to {total:.6g} as probabilities; log-probabilities are at most 0, "
            "and sum to 1.",
            metadata={"field": field},
        )
    row = class_row(logprobs, num_tokens)
    return replace(row, layer_states=_states(parts, num_layers, num_tokens)) if num_layers else row


def _states(parts: Sequence[ClassDistribution], num_layers: int, num_tokens: int) -> NDArray[np.float32]:
    """[1, T, D, H]: the states of all parts."""
    field = "classes.layer_states"
    arrays: list[NDArray[np.float32]] = [
        decode(
            part.layer_states, field=field, dtypes=(Tensor.DATA_TYPE_FLOAT32,), shape=(None, num_layers, None)
        )
        for part in parts
    ]
    widths = {each.shape[2] for each in arrays}
    found = sum(len(each) for each in arrays)
    if len(widths) > 1 or found != num_tokens or num_layers * max(widths) > MAX_COLUMNS:
        raise StillhouseError(
            Reason.TENSOR_INVALID,
            f"{field} are those of {found} tokens with {sorted(widths)} units in {num_layers} layers; {num_tokens} tokens were "
            f"sent, and all layers together have {MAX_COLUMNS} units at most.",
            metadata={"field": field},
        )
    if not all(np.isfinite(each).all() for each in arrays):
        raise _non_finite(field)
    return np.concatenate(arrays)[None]


def _non_finite(field: str) -> StillhouseError:
    return StillhouseError(
        Reason.NON_FINITE,
        f"{field} holds NaN or infinity; the model produces non-finite values.",
        metadata={"field": field},
    )
