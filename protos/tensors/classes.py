"""Class distributions as arrays, to and from their wire message; a receiver checks every value.

A distribution over C classes is a Distributions of one row, whose token ids are the classes: so caches, streams and losses
treat it as they do a model with a vocabulary of C tokens that sends all of them.
"""

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import ClassDistribution
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import MAX_LOGPROB, Distributions
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
    return class_row(row.logprobs[0, order], row.start + 1)


def encode_classes(row: Distributions) -> ClassDistribution:
    """The message of a class row."""
    return ClassDistribution(logprobs=encode(row.logprobs[0]))


def decode_classes(message: ClassDistribution, *, num_classes: int, num_tokens: int) -> Distributions:
    """The class row of a message from elsewhere.

    Raises StillhouseError(TENSOR_INVALID) for another number of classes or for what is no distribution, and
    StillhouseError(NON_FINITE) for NaN.
    """
    field = "classes.logprobs"
    logprobs: NDArray[np.float32] = decode(
        message.logprobs, field=field, dtypes=(Tensor.DATA_TYPE_FLOAT32,), shape=(num_classes,)
    )
    if np.isnan(logprobs).any():
        raise StillhouseError(
            Reason.NON_FINITE,
            f"{field} holds NaN; the model produces non-finite values.",
            metadata={"field": field},
        )
    total = float(np.exp(logprobs.astype(np.float64)).sum())
    if logprobs.max() > MAX_LOGPROB or abs(total - 1.0) > MAX_SUM_ERROR:
        raise StillhouseError(
            Reason.TENSOR_INVALID,
            f"{field} reach {logprobs.max():.4g} and sum to {total:.6g} as probabilities; log-probabilities are at most 0, "
            "and sum to 1.",
            metadata={"field": field},
        )
    return class_row(logprobs, num_tokens)
