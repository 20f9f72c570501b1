"""Answers <-> rows of a shard: how arrays become columns, and every check on what comes back from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.cache.format import COMPACT_BITS, CacheMeta, Codec
from stillhouse.protos.tensors.distributions import MAX_LOGPROB, MAX_ROW_SUM, Distributions

MAX_VALUES = 32 * 1024 * 1024
"""Values in one column of one row group: top-256 at 131,072 positions."""
MAX_COMPACT_SUM = 1.1
"""Largest sum of probabilities after the rounding of codec "compact", before renormalization."""
_REQUIRED_LISTS = ("token_ids", "top_token_ids", "logprobs", "target_logprobs", "log_tail")
STUDENT_PROMPT = "student_prompt_ids"
"""Column of rows whose teacher alone saw the first `start` tokens."""
_OPTIONAL_LISTS = (
    *(
        "log_partitions",
        "sampled_token_ids",
        "sampled_logprobs",
        "query_token_ids",
        "query_logprobs",
        "entropy",
        "token_type_ids",
    ),
)
_WIRE_LOGPROBS = frozenset({"logprobs", "sampled_logprobs"})
"""Log-probabilities that travel in the type that the caller chose."""
_IDS = frozenset(
    {"token_ids", "top_token_ids", "sampled_token_ids", "query_token_ids", "token_type_ids", STUDENT_PROMPT}
)
_OF_QUERY = ("query_token_ids", "token_type_ids", STUDENT_PROMPT)
"""Columns of what was asked, besides the tokens."""
_FLAT = frozenset({"target_logprobs", "log_tail", "entropy"})
"""Columns with one value per position."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheRow:
    """One sequence with its teacher output."""

    key: str
    token_ids: NDArray[np.int32]
    """[L]."""
    answer: Distributions
    """Distributions of positions [start, L)."""
    query_token_ids: NDArray[np.int32] | None = None
    """[T, Q], where query_logprobs were requested."""
    student_prompt_ids: NDArray[np.int32] | None = None
    """[S], S >= 1: the student's tokens in the place of the first `start`; None if teacher and student see the same."""
    token_type_ids: NDArray[np.int32] | None = None
    """[L], for a classifier's pair of texts."""

    @property
    def num_bytes(self) -> int:
        """Approximate size in memory."""
        return self.answer.row_bytes * self.answer.num_rows + 4 * len(self.token_ids)

    def check(self, meta: CacheMeta) -> None:
        """Checks that the row can be stored. Raises ValueError, since only a bug can cause it."""
        answer = self.answer
        if answer.hidden_states is not None or answer.layer_states is not None:
            raise ValueError("hidden states are not cached")
        if answer.start + answer.num_rows != len(self.token_ids) or not answer.num_rows:
            raise ValueError(
                f"the output covers [{answer.start}, {answer.start + answer.num_rows}) of {len(self.token_ids)} tokens"
            )
        if max(answer.token_ids.size, len(self.token_ids)) > MAX_VALUES:
            raise ValueError(f"an output of {answer.token_ids.size} logprobs is too large for a cache")
        columns = 0 if answer.log_partitions is None else answer.log_partitions.shape[1]
        if columns != len(meta.temperatures) or (answer.entropy is not None) != meta.entropy:
            raise ValueError("the output has other columns than its metadata says")
        if self.token_type_ids is not None and len(self.token_type_ids) != len(self.token_ids):
            raise ValueError(f"{len(self.token_type_ids)} token types for {len(self.token_ids)} tokens")
        if (answer.query_logprobs is None) != (self.query_token_ids is None):
            raise ValueError("query_logprobs and query_token_ids go together")
        if (self.student_prompt_ids is not None) != meta.prompted:
            raise ValueError("the student's prompt and a prompted shard go together")
        if self.student_prompt_ids is not None and not len(self.student_prompt_ids):
            raise ValueError("the student's prompt is empty")


def prompt_digest(student_prompt_ids: NDArray[np.int32] | None) -> bytes:
    """Tells the student's prompts of rows with one key apart; empty for a row without one of its own."""
    if student_prompt_ids is None:
        return b""
    return hashlib.blake2b(np.ascontiguousarray(student_prompt_ids, "<i4").tobytes(), digest_size=16).digest()


def schema(meta: CacheMeta, codec: Codec, optional: Sequence[str]) -> Any:
    """The Arrow schema of a shard with these optional columns."""
    import pyarrow as pa

    half = codec == "compact" or meta.logprob_dtype != "float32"
    rest = pa.float16() if codec == "compact" else pa.float32()

    def listed(name: str) -> Any:
        kind = pa.int32() if name in _IDS else rest
        if name in _WIRE_LOGPROBS:
            kind = pa.float16() if half else pa.float32()
        return pa.field(name, pa.list_(pa.field("element", kind, nullable=False)), nullable=False)

    fields = [pa.field("key", pa.string(), nullable=False), pa.field("start", pa.int32(), nullable=False)]
    fields += [listed(name) for name in (*_REQUIRED_LISTS, *optional)]
    return pa.schema(fields)


def optional_columns(row: CacheRow | None) -> tuple[str, ...]:
    """The optional columns of a row in schema order; all of them for None."""
    if row is None:
        return (*_OPTIONAL_LISTS, STUDENT_PROMPT)
    present = {name for name in _OPTIONAL_LISTS if getattr(row.answer, name, None) is not None}
    present |= {name for name in _OF_QUERY if getattr(row, name) is not None}
    return tuple(name for name in (*_OPTIONAL_LISTS, STUDENT_PROMPT) if name in present)


def table(rows: Sequence[CacheRow], wanted: Any, codec: Codec) -> Any:
    """The rows as an Arrow table of schema `wanted`. Raises ValueError if "lossless" would lose precision."""
    import pyarrow as pa

    columns: list[Any] = [
        pa.array([row.key for row in rows], pa.string()),
        pa.array([row.answer.start for row in rows], pa.int32()),
    ]
    for each in list(wanted)[2:]:
        arrays = [_array(row, each.name) for row in rows]
        offsets = np.cumsum([0, *(array.size for array in arrays)]).astype(np.int32)
        flat = np.concatenate([array.reshape(-1) for array in arrays])
        values = pa.array(_typed(flat, each, codec))
        columns.append(pa.ListArray.from_arrays(pa.array(offsets), values, type=each.type))
    return pa.Table.from_arrays(columns, schema=wanted)


def _array(row: CacheRow, name: str) -> NDArray[Any]:
    array: NDArray[Any]
    if name == "token_ids" or name in _OF_QUERY:
        array = getattr(row, name)
    else:
        array = getattr(row.answer, "token_ids" if name == "top_token_ids" else name)
    return array


def _typed(flat: NDArray[Any], column: Any, codec: Codec) -> NDArray[Any]:
    """The values in the type of the column."""
    wanted = np.dtype(column.type.value_type.to_pandas_dtype())
    if wanted.kind != "f":
        return flat.astype(np.int32, copy=False)
    with np.errstate(over="ignore"):  # below -65504 a float16 is -inf
        typed = flat.astype(wanted)
    if codec == "compact":
        return _rounded(typed) if column.name in _WIRE_LOGPROBS else typed
    if wanted == np.float16 and not np.array_equal(typed.astype(np.float32), flat):
        raise ValueError(f"{column.name} are not float16 values; describe them as float32")
    return typed


def _rounded(values: NDArray[np.float16]) -> NDArray[np.float16]:
    """Rounds float16 values to COMPACT_BITS of their 10 bits of fraction, to nearest; zero bits compress to nothing."""
    drop = 10 - COMPACT_BITS
    words = values.view(np.uint16).astype(np.uint32) + np.uint32(1 << (drop - 1))
    rounded: NDArray[np.float16] = (words >> drop << drop).astype(np.uint16).view(np.float16)
    return np.where(np.isfinite(values), rounded, values)


class StoredText(NamedTuple):
    """The text of a row."""

    token_ids: NDArray[np.int32]
    """[L]: all that the teacher saw."""
    start: int
    """The first position with a distribution."""
    student_prompt_ids: NDArray[np.int32] | None = None
    """[S]: the student's tokens in the place of the first `start`; None if both see the same."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group of a file; Arrow has checked its types and offsets, nothing else yet."""

    table: Any
    meta: CacheMeta
    codec: Codec
    _parts: dict[str, tuple[NDArray[np.int32], NDArray[Any]]] = field(default_factory=dict)
    """Offsets and values of the lists read so far."""

    def answer(self, index: int, asked: CacheMeta, *, checked: bool = False) -> Distributions:
        """The output in row `index`, with the columns that `asked` needs and those of samples and queries.

        `checked`: its values were checked before.

        Raises:
            ValueError: its arrays are inconsistent, or not a valid distribution.
        """
        token_ids, start = self.text(index)
        num_rows = len(token_ids) - start
        arrays = {name: self._wide(name, index, num_rows) for name in self._present()}
        top_k = arrays["top_token_ids"].shape[1]
        if arrays["logprobs"].shape[1] != top_k or top_k > max(self.meta.top_k, 0):
            raise ValueError(f"it has {top_k} ids and {arrays['logprobs'].shape[1]} logprobs a position")
        partitions = arrays.get("log_partitions")
        if partitions is not None:
            arrays["log_partitions"] = self._partitions(partitions, asked)
        if not asked.temperatures:
            arrays.pop("log_partitions", None)
        if not asked.entropy:
            arrays.pop("entropy", None)
        answer = Distributions(
            start=start,
            token_ids=arrays.pop("top_token_ids"),
            **{name: array for name, array in arrays.items() if name not in _OF_QUERY},
        )
        compact = self.codec == "compact"
        if not checked:
            check_answer(answer, self.meta.vocab_size, max_sum=MAX_COMPACT_SUM if compact else MAX_ROW_SUM)
        return _normalised(answer) if compact else answer

    def text(self, index: int) -> tuple[NDArray[np.int32], int]:
        """The sequence in row `index` and the first position with a distribution. Raises ValueError for invalid values."""
        token_ids = self._list("token_ids", index)
        start = self.table.column("start")[index].as_py()
        if not 1 <= start < len(token_ids):
            raise ValueError(f"start is {start} in a sequence of {len(token_ids)} tokens")
        if not (token_ids.min() >= 0 and token_ids.max() < self.meta.vocab_size):
            raise ValueError(
                f"token_ids reach from {token_ids.min()} to {token_ids.max()} in a vocabulary of {self.meta.vocab_size}"
            )
        return token_ids, start

    def stored_text(self, index: int) -> StoredText:
        """The sequence in row `index`, and the student's prompt if it is another one. Raises ValueError for invalid values."""
        token_ids, start = self.text(index)
        if not self.meta.prompted:
            return StoredText(token_ids, start)
        prompt = self._list(STUDENT_PROMPT, index)
        if not (len(prompt) and prompt.min() >= 0 and prompt.max() < self.meta.vocab_size):
            raise ValueError(f"student_prompt_ids are no tokens of a vocabulary of {self.meta.vocab_size}")
        return StoredText(token_ids, start, prompt)

    def row(self, index: int) -> CacheRow:
        """Everything in row `index`; raises ValueError as `answer` does, and if its key is not that of its content."""
        answer = self.answer(index, self.meta)
        token_ids = self._list("token_ids", index)
        query = None
        if "query_token_ids" in self._present():
            query = self._wide("query_token_ids", index, answer.num_rows)
        types = self._list("token_type_ids", index) if "token_type_ids" in self._present() else None
        key = self.table.column("key")[index].as_py()
        if key != self.meta.key(token_ids, answer.start, query, types):
            raise ValueError("its key does not match its tokens and teacher")
        return CacheRow(
            key=key,
            token_ids=token_ids,
            answer=answer,
            query_token_ids=query,
            student_prompt_ids=self.stored_text(index).student_prompt_ids,
            token_type_ids=types,
        )

    def _present(self) -> list[str]:
        names = set(self.table.column_names)
        lists = (*_REQUIRED_LISTS[1:], *_OPTIONAL_LISTS)
        return [name for name in lists if name in names]

    def _list(self, name: str, index: int) -> NDArray[Any]:
        if name not in self._parts:
            column = self.table.column(name).chunk(0)
            self._parts[name] = (column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=False))
        offsets, values = self._parts[name]
        array = values[offsets[index] : offsets[index + 1]]
        return array.astype(np.float32) if array.dtype == np.float16 else array

    def _wide(self, name: str, index: int, num_rows: int) -> NDArray[Any]:
        """[T], or [T, columns]."""
        array = self._list(name, index)
        if len(array) % num_rows or (name in _FLAT and len(array) != num_rows):
            raise ValueError(f"{name} has {len(array)} numbers for {num_rows} positions")
        return array if name in _FLAT else array.reshape(num_rows, -1)

    def _partitions(self, array: NDArray[np.float32], asked: CacheMeta) -> NDArray[np.float32]:
        have = self.meta.temperatures
        if array.shape[1] != len(have):
            raise ValueError(f"log_partitions has {array.shape[1]} columns for {len(have)} temperatures")
        return array[:, [have.index(each) for each in asked.temperatures if each in have]]


def _normalised(answer: Distributions) -> Distributions:
    """Renormalizes probabilities to sum to 1 at each position, after rounding."""
    tail = np.exp(answer.log_tail.astype(np.float64))
    log_sum = np.log(np.exp(answer.logprobs.astype(np.float64)).sum(axis=1) + tail).astype(np.float32)
    drawn = answer.sampled_logprobs
    return replace(
        answer,
        logprobs=answer.logprobs - log_sum[:, None],
        log_tail=answer.log_tail - log_sum,
        sampled_logprobs=None if drawn is None else drawn - log_sum[:, None],
    )


def check_answer(answer: Distributions, vocab_size: int, *, max_sum: float = MAX_ROW_SUM) -> None:
    """Checks that the arrays form valid distributions. Raises ValueError."""
    for name in ("token_ids", "sampled_token_ids"):
        ids = getattr(answer, name)
        if ids is not None and ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
            raise ValueError(f"{name} reach from {ids.min()} to {ids.max()} in a vocabulary of {vocab_size}")
    ordered = np.sort(answer.token_ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError("a token occurs twice at one position")
    for name in ("logprobs", "target_logprobs", "log_tail", "query_logprobs", "sampled_logprobs"):
        logprobs = getattr(answer, name)
        if logprobs is not None and logprobs.size and not logprobs.max() <= MAX_LOGPROB:  # also false for NaN
            raise ValueError(f"{name} hold {logprobs.max():.4g}; a log-probability is at most 0")
    for name in ("log_partitions", "entropy"):
        numbers = getattr(answer, name)
        if numbers is not None and not np.isfinite(numbers).all():
            raise ValueError(f"{name} hold NaN or infinity")
    sums = np.exp(answer.logprobs).sum(axis=1) + np.exp(answer.log_tail)
    if (sums > max_sum).any():
        raise ValueError(f"probabilities sum to {sums.max():.4g} at one position")
