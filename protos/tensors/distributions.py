"""Token distributions as arrays, to and from their wire message; a receiver checks every value."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor, TokenDistributions
from stillhouse.protos.tensors import differences, falling_rows
from stillhouse.protos.tensors.layout import (
    decode,
    encode,
    encode_falling,
    encode_scaled,
    encode_sorted,
    packed_bits,
)
from stillhouse.protos.tensors.sorted_rows import PackBlock

__all__ = ["Distributions", "decode", "decode_distributions", "encode", "encode_distributions", "packed_bits"]

MAX_LOGPROB = 1e-3
"""Largest logprob accepted, for rounding."""
MAX_ROW_SUM = 1.01
"""Largest sum of probabilities accepted, for rounding."""
MAX_COLUMNS = 64 * 1024
"""Columns of a part whose width the caller does not bound: temperatures, queries, samples, hidden units of all layers."""

MAX_STATES_BYTES = 256 * 1024 * 1024
"""Most bytes of the layer states of one sequence."""

LEVEL_BITS = 7
"""Bits of the levels of FALLING logprobs: a reconstruction KL of 1e-5 to 1e-4 nats (docs/concepts/targets.md)."""

_FLOAT32 = (Tensor.DATA_TYPE_FLOAT32,)
_HALF_OR_FULL = (Tensor.DATA_TYPE_FLOAT16, *_FLOAT32)
_KEPT = (*_HALF_OR_FULL, Tensor.DATA_TYPE_FALLING)
_IDS = (Tensor.DATA_TYPE_INT32, Tensor.DATA_TYPE_PACKED_UINT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Distributions:
    """A model's distributions at T consecutive positions of one sequence.

    Row t predicts sequence[start + t]; protos/stillhouse/v1/tensor.proto defines every part.
    T positions, K kept tokens, N temperatures, Q queried tokens, R samples, D layers, H hidden units.
    """

    start: int
    """Position that row 0 predicts, >= 1."""
    token_ids: NDArray[np.int32]
    """[T, K], most probable first."""
    logprobs: NDArray[np.float32]
    """[T, K], natural log, at temperature 1, normalized over the complete vocabulary."""
    target_logprobs: NDArray[np.float32]
    """[T], logprob of the actual token."""
    log_tail: NDArray[np.float32]
    """[T], log of the probability outside the top K; -inf if it is 0."""
    log_partitions: NDArray[np.float32] | None = None
    """[T, N], log sum_v p_v^(1/T_n)."""
    query_logprobs: NDArray[np.float32] | None = None
    """[T, Q], logprobs of the queried tokens; -inf where the caller padded with -1."""
    sampled_token_ids: NDArray[np.int32] | None = None
    """[T, R], sampled with replacement."""
    sampled_logprobs: NDArray[np.float32] | None = None
    """[T, R], logprobs of the sampled tokens, as `logprobs`."""
    entropy: NDArray[np.float32] | None = None
    """[T], nats."""
    hidden_states: NDArray[np.float32] | None = None
    """[T, H], last hidden state."""
    layer_states: NDArray[np.float32] | None = None
    """[T, D, H], hidden states after each requested layer; of a class row [1, L, D, H], those of all L tokens."""

    @property
    def num_rows(self) -> int:
        """T."""
        return int(self.target_logprobs.shape[0])

    @property
    def row_bytes(self) -> int:
        """Upper bound of a row's bytes on the wire, to choose the rows of a message."""
        arrays = (getattr(self, name) for name in _ARRAYS)
        return sum(4 * math.prod(array.shape[1:]) for array in arrays if array is not None)

    def rows(self, begin: int, end: int) -> "Distributions":
        """Rows [begin, end), 0 <= begin <= end <= num_rows, as views; start is shifted."""
        if not 0 <= begin <= end <= self.num_rows:
            raise ValueError(f"rows [{begin}, {end}) of {self.num_rows}")
        parts = {name: getattr(self, name) for name in _ARRAYS}
        cut: dict[str, Any] = {
            name: None if array is None else array[begin:end] for name, array in parts.items()
        }
        return Distributions(start=self.start + begin, **cut)

    @staticmethod
    def concat(parts: Sequence["Distributions"]) -> "Distributions":
        """The parts as one.

        Raises StillhouseError(TENSOR_INVALID) unless there is a part, each begins where the one before ends, and
        all have the same columns.
        """
        if not parts:
            raise _invalid("distributions", "have no parts")
        if len(parts) == 1:
            return parts[0]
        for before, after in itertools.pairwise(parts):
            if after.start != before.start + before.num_rows:
                expected = before.start + before.num_rows
                raise _invalid("distributions.start", f"is {after.start}; the rows before end at {expected}")
        joined: dict[str, Any] = {}
        for name in _ARRAYS:
            arrays = [getattr(part, name) for part in parts]
            widths = {None if array is None else array.shape[1:] for array in arrays}
            if len(widths) > 1:
                raise _invalid(f"distributions.{name}", "has different columns in different parts")
            joined[name] = None if arrays[0] is None else np.concatenate(arrays)
        return Distributions(start=parts[0].start, **joined)


_ARRAYS = tuple(field.name for field in fields(Distributions) if field.name != "start")
_OF_ROW = frozenset({"target_logprobs", "log_tail"})
"""Parts that are FLOAT16 where logprobs were requested as FALLING."""


def encode_distributions(
    distributions: Distributions,
    *,
    logprob_dtype: Tensor.DataType.ValueType = Tensor.DATA_TYPE_FLOAT16,
    pack_bits: int | None = None,
    sort_bits: int | None = None,
    sampled_logprob_bits: int = 0,
    pack_block: PackBlock | None = None,
    queried_ids: NDArray[np.int32] | None = None,
) -> TokenDistributions:
    """The message, with logprobs of type `logprob_dtype` and, with `pack_bits`, ids packed to so many bits.

    FALLING makes target_logprobs, log_tail and sampled_logprobs FLOAT16, and logprobs that no FALLING holds in fewer bytes.
    With `sort_bits` the samples of a row are sorted, and their ids, below 2^sort_bits, travel as SORTED_UINT. With
    `sampled_logprob_bits` their log-probabilities travel as SCALED_UINT of so many bits. `pack_block` is that of
    `sorted_rows.pack_sorted`. With `queried_ids` [T, Q] query_logprobs are those of the ids alone. Raises ValueError for another logprob_dtype.
    """
    if logprob_dtype not in _KEPT:
        raise ValueError(f"logprobs cannot be sent as {Tensor.DataType.Name(logprob_dtype)}")
    if sort_bits is not None:
        distributions = _sorted_samples(distributions)
    falling, kept = logprob_dtype == Tensor.DATA_TYPE_FALLING, None
    plain = Tensor.DATA_TYPE_FLOAT16 if falling else logprob_dtype
    top_k = distributions.logprobs.shape[1]
    if falling and falling_rows.row_bytes(top_k, LEVEL_BITS) < 2 * top_k:
        kept = encode_falling(distributions.logprobs, bits=LEVEL_BITS)
    message = TokenDistributions(
        start=distributions.start,
        token_ids=encode(distributions.token_ids, bits=pack_bits),
        logprobs=encode(distributions.logprobs, dtype=plain) if kept is None else kept,
    )
    for name in _ARRAYS[2:]:
        array = getattr(distributions, name)
        if array is None:
            continue
        if name == "sampled_token_ids":
            encoded = (
                encode(array, bits=pack_bits)
                if sort_bits is None
                else encode_sorted(array, bits=sort_bits, pack_block=pack_block)
            )
        elif name == "sampled_logprobs":
            scaled = sampled_logprob_bits
            encoded = encode_scaled(array, bits=scaled) if scaled else encode(array, dtype=plain)
        elif name == "query_logprobs" and queried_ids is not None:
            encoded = encode(differences.values_of_ids(array, queried_ids))
        else:
            encoded = encode(array, dtype=plain if falling and name in _OF_ROW else None)
        getattr(message, name).CopyFrom(encoded)
    return message


def _sorted_samples(distributions: Distributions) -> Distributions:
    """The same, with the samples of each row in ascending order."""
    ids, logprobs = distributions.sampled_token_ids, distributions.sampled_logprobs
    if ids is None or (ids[:, 1:] >= ids[:, :-1]).all():
        return distributions
    order = np.argsort(ids, axis=1, kind="stable")
    return replace(
        distributions,
        sampled_token_ids=np.take_along_axis(ids, order, axis=1),
        sampled_logprobs=None if logprobs is None else np.take_along_axis(logprobs, order, axis=1),
    )


def decode_distributions(
    message: TokenDistributions,
    *,
    vocab_size: int,
    max_rows: int,
    max_top_k: int,
    queried_ids: NDArray[np.int32] | None = None,
    queried_from: int = 1,
) -> Distributions:
    """The arrays of a message from elsewhere, always int32 and float32.

    `queried_ids` [T, Q] are what was queried from position `queried_from` on, if it went out as DIFFERENCES.

    Raises StillhouseError(TENSOR_INVALID) where a part is missing, parts disagree on T or K, an id is
    outside [0, vocab_size) or twice in a row, or probabilities exceed what rounding allows, and
    StillhouseError(NON_FINITE) where a number is NaN or infinite that must not be.
    """
    if not 1 <= message.start <= 2**31 - 1 - max_rows:
        raise _invalid(
            "distributions.start", f"is {message.start}; position 0 has no prediction, send 1 or more"
        )
    token_ids = _ids(message, "token_ids", vocab_size, (None, None), _IDS)
    num_rows, top_k = token_ids.shape
    if num_rows > max_rows or top_k > max_top_k:
        raise _invalid(
            "distributions.token_ids",
            f"has shape [{num_rows}, {top_k}]; at most [{max_rows}, {max_top_k}] was requested",
        )
    ordered = np.sort(token_ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise _invalid("distributions.token_ids", "names a token twice at one position")
    logprobs = _logprobs(message, "logprobs", (num_rows, top_k), _KEPT)
    log_tail = _logprobs(message, "log_tail", (num_rows,), _HALF_OR_FULL)
    sums = np.einsum("tk->t", np.exp(logprobs)) + np.exp(log_tail)
    if (sums > MAX_ROW_SUM).any():
        raise _invalid(
            "distributions.logprobs", f"sum to {sums.max():.4g} at one position; probabilities sum to 1"
        )
    query, samples = message.HasField("query_logprobs"), message.HasField("sampled_token_ids")
    sampled = None
    if samples:
        coded = (*_IDS, Tensor.DATA_TYPE_SORTED_UINT)
        sampled = _ids(message, "sampled_token_ids", vocab_size, (num_rows, None), coded)
    has_logprobs = sampled is not None and message.HasField("sampled_logprobs")
    return Distributions(
        start=message.start,
        token_ids=token_ids,
        logprobs=logprobs,
        target_logprobs=_logprobs(message, "target_logprobs", (num_rows,), _HALF_OR_FULL),
        log_tail=log_tail,
        log_partitions=_finite(message, "log_partitions", (num_rows, None)),
        query_logprobs=_queried(message, num_rows, queried_ids, message.start - queried_from)
        if query
        else None,
        sampled_token_ids=sampled,
        sampled_logprobs=_logprobs(
            message, "sampled_logprobs", sampled.shape, (*_HALF_OR_FULL, Tensor.DATA_TYPE_SCALED_UINT)
        )
        if sampled is not None and has_logprobs
        else None,
        entropy=_finite(message, "entropy", (num_rows,)),
        hidden_states=_finite(message, "hidden_states", (num_rows, None)),
        layer_states=_finite(message, "layer_states", (num_rows, None, None)),
    )


def _queried(
    message: TokenDistributions, num_rows: int, ids: NDArray[np.int32] | None, first: int
) -> NDArray[np.float32]:
    """[T, Q]: of each id, or of those alone that row `first` of `ids` and the rows behind it hold."""
    if ids is None or len(message.query_logprobs.shape) != 1:
        return _logprobs(message, "query_logprobs", (num_rows, None))
    ids = ids[first : first + num_rows] if first >= 0 else ids[:0]
    if len(ids) != num_rows:
        raise _invalid(
            "distributions.query_logprobs", f"are of {num_rows} rows, of which {len(ids)} were queried"
        )
    count = int(np.count_nonzero(ids >= 0))
    return differences.values_in_rows(_logprobs(message, "query_logprobs", (count,)), ids)


def _part(
    message: TokenDistributions, name: str, dtypes: Sequence[Any], shape: Sequence[int | None]
) -> NDArray[Any]:
    field = f"distributions.{name}"
    if not message.HasField(name):  # type: ignore[arg-type]  # a name in _ARRAYS
        raise _invalid(field, "is missing")
    array = decode(getattr(message, name), field=field, dtypes=dtypes, shape=shape)
    num_columns = math.prod(array.shape[1:])
    if num_columns > MAX_COLUMNS:
        raise _invalid(field, f"has {num_columns} columns; the limit is {MAX_COLUMNS}")
    return array


def _ids(
    message: TokenDistributions,
    name: str,
    vocab_size: int,
    shape: Sequence[int | None],
    dtypes: Sequence[Any],
) -> NDArray[np.int32]:
    ids = _part(message, name, dtypes, shape)
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise _invalid(
            f"distributions.{name}",
            f"has ids from {ids.min()} to {ids.max()}; the vocabulary has {vocab_size}",
        )
    return ids.astype(np.int32, copy=False)


def _logprobs(
    message: TokenDistributions, name: str, shape: Sequence[int | None], dtypes: Sequence[Any] = _FLOAT32
) -> NDArray[np.float32]:
    logprobs = _part(message, name, dtypes, shape).astype(np.float32, copy=False)
    if getattr(message, name).dtype == Tensor.DATA_TYPE_FALLING:
        highest = logprobs[:, :1]  # its numbers are finite, and none rises
    else:
        highest = logprobs
        if np.isnan(logprobs).any():
            raise _non_finite(name)
    if highest.size and highest.max() > MAX_LOGPROB:
        raise _invalid(f"distributions.{name}", f"has {highest.max():.4g}; a log-probability is at most 0")
    return logprobs


def _finite(
    message: TokenDistributions, name: str, shape: Sequence[int | None]
) -> NDArray[np.float32] | None:
    if not message.HasField(name):  # type: ignore[arg-type]  # a name in _ARRAYS
        return None
    dtypes = (*_FLOAT32, Tensor.DATA_TYPE_BFLOAT16) if name == "hidden_states" else _FLOAT32
    array = _part(message, name, dtypes, shape).astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise _non_finite(name)
    return array


def _invalid(field: str, what: str) -> StillhouseError:
    return StillhouseError(Reason.TENSOR_INVALID, f"{field} {what}.", metadata={"field": field})


def _non_finite(name: str) -> StillhouseError:
    field = f"distributions.{name}"
    return StillhouseError(
        Reason.NON_FINITE,
        f"{field} holds NaN or infinity; the model produces non-finite values.",
        metadata={"field": field},
    )
