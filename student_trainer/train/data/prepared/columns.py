"""Columns of prepared examples in Arrow: the one place that knows their layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.data.prepared.arrow_arrays import to_arrow, to_numpy
from stillhouse.student_trainer.train.data.teacher_prompt import TeacherPrompt

SCHEMA = pa.schema(
    [
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("mask", pa.list_(pa.bool_()), nullable=False),
        # Largest token id.
        pa.field("largest", pa.int32(), nullable=False),
        # -1 for None.
        pa.field("num_prompt", pa.int32(), nullable=False),
        # Source: number of the row in its file, and places of the file and of the teacher among the table's names.
        pa.field("number", pa.int64(), nullable=False),
        pa.field("path", pa.int32(), nullable=False),
        pa.field("teacher", pa.int32(), nullable=False),
        # Prompts that teachers alone see, one behind the other: teachers, the student's tokens that each replaces, sizes, ids.
        pa.field("prompt_teachers", pa.list_(pa.int32()), nullable=False),
        pa.field("prompt_replaces", pa.list_(pa.int32()), nullable=False),
        pa.field("prompt_sizes", pa.list_(pa.int32()), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
    ]
)
NAMED = ("path", "teacher", "prompt_teachers")
"""Columns that hold places in lists of names."""
_PROMPTS = ("prompt_teachers", "prompt_replaces", "prompt_sizes", "prompt_ids")


@dataclass(kw_only=True, slots=True)
class Names:
    """Distinct names in order of appearance, and their places."""

    names: list[str]
    _places: dict[str, int]

    @classmethod
    def of(cls, names: Sequence[str] = ()) -> Names:
        """The given names, all distinct."""
        return cls(names=list(names), _places={name: place for place, name in enumerate(names)})

    def place(self, name: str) -> int:
        """Returns the place of a name, which is added if it is new."""
        found = self._places.get(name)
        if found is None:
            found = self._places[name] = len(self.names)
            self.names.append(name)
        return found


class BatchBuilder:
    """Collects examples and makes a record batch of them."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._masks: list[NDArray[np.bool_]] = []
        self._offsets = [0]
        self._num_prompt: list[int] = []
        self._numbers: list[int] = []
        self._places: dict[str, list[int]] = {name: [] for name in ("path", "teacher")}
        self._prompts: dict[str, list[int]] = {name: [] for name in _PROMPTS}
        self._prompt_offsets: dict[str, list[int]] = {name: [0] for name in _PROMPTS}
        self.names = {name: Names.of() for name in NAMED}
        """Names of the columns that hold places."""

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return len(self._ids)

    def add(
        self,
        token_ids: Sequence[int],
        mask: NDArray[np.bool_],
        *,
        num_prompt: int | None,
        path: str,
        number: int,
        teacher: str,
        prompts: Mapping[str, TeacherPrompt],
    ) -> None:
        """Adds an example, whose source is row `number` of `path`."""
        self._ids += token_ids
        self._masks.append(mask)
        self._offsets.append(len(self._ids))
        self._num_prompt.append(-1 if num_prompt is None else num_prompt)
        self._numbers.append(number)
        for column, name in (("path", path), ("teacher", teacher)):
            self._places[column].append(self.names[column].place(name))
        for name, prompt in prompts.items():
            self._prompts["prompt_teachers"].append(self.names["prompt_teachers"].place(name))
            self._prompts["prompt_replaces"].append(prompt.replaces)
            self._prompts["prompt_sizes"].append(len(prompt.token_ids))
            self._prompts["prompt_ids"] += prompt.token_ids.tolist()
        for column, ends in self._prompt_offsets.items():
            ends.append(len(self._prompts[column]))

    def finish(self) -> pa.RecordBatch:
        """The batch of all examples so far."""
        offsets = np.array(self._offsets, np.int32)
        ids = np.array(self._ids, np.int32)
        mask = np.concatenate(self._masks) if self._masks else np.zeros(0, np.bool_)
        largest = np.maximum.reduceat(ids, offsets[:-1]) if len(self) else np.zeros(0, np.int32)
        arrays = [
            pa.ListArray.from_arrays(to_arrow(offsets), to_arrow(ids)),
            pa.ListArray.from_arrays(to_arrow(offsets), to_arrow(mask)),
            to_arrow(largest),
            to_arrow(np.array(self._num_prompt, np.int32)),
            to_arrow(np.array(self._numbers, np.int64)),
            *(to_arrow(np.array(each, np.int32)) for each in self._places.values()),
            *(_lists(self._prompt_offsets[name], self._prompts[name]) for name in _PROMPTS),
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _lists(offsets: list[int], values: list[int]) -> pa.ListArray:
    return pa.ListArray.from_arrays(
        to_arrow(np.array(offsets, np.int32)), to_arrow(np.array(values, np.int32))
    )


def renamed(batch: pa.RecordBatch, column: str, names: Sequence[str], target: Names) -> pa.RecordBatch:
    """Returns the batch with the places of `names` in `column` replaced by their places in `target`."""
    places = np.array([target.place(name) for name in names], np.int32)
    if np.array_equal(places, np.arange(len(places))):
        return batch
    at = SCHEMA.get_field_index(column)
    arrays = batch.columns
    old = arrays[at]
    if pa.types.is_list(old.type):
        arrays[at] = pa.ListArray.from_arrays(old.offsets, to_arrow(places[to_numpy(old.values)]))
    else:
        arrays[at] = to_arrow(places[to_numpy(old)])
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


class BatchView:
    """The columns of one record batch as arrays, without a copy."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        columns = {name: batch.column(name) for name in SCHEMA.names}
        self.num_rows: int = batch.num_rows
        self.offsets: NDArray[np.int32] = to_numpy(columns["token_ids"].offsets)
        self._ids: NDArray[np.int32] = to_numpy(columns["token_ids"].values)
        mask = columns["mask"].values
        # Bits, the first of each byte at its lower end.
        self._mask_bits = np.frombuffer(mask.buffers()[1], np.uint8) if len(mask) else np.zeros(0, np.uint8)
        self._mask_offset: int = mask.offset
        self.largest: NDArray[np.int32] = to_numpy(columns["largest"])
        self._num_prompt: NDArray[np.int32] = to_numpy(columns["num_prompt"])
        self._number: NDArray[np.int64] = to_numpy(columns["number"])
        self._path: NDArray[np.int32] = to_numpy(columns["path"])
        self.teacher: NDArray[np.int32] = to_numpy(columns["teacher"])
        self._prompts: dict[str, tuple[NDArray[np.int32], NDArray[np.int32]]] = {
            name: (to_numpy(columns[name].offsets), to_numpy(columns[name].values)) for name in _PROMPTS
        }

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row."""
        return np.diff(self.offsets)

    def example(self, row: int, names: dict[str, list[str]]) -> Example:
        """Makes an example of one row; its arrays are copies, which anyone may change and keep."""
        begin, end = int(self.offsets[row]), int(self.offsets[row + 1])
        first, last = begin + self._mask_offset, end + self._mask_offset
        bits = np.unpackbits(self._mask_bits[first // 8 : (last + 7) // 8], bitorder="little")
        num_prompt = int(self._num_prompt[row])
        return Example(
            token_ids=self._ids[begin:end].copy(),
            mask=bits[first % 8 :][: end - begin].astype(np.bool_),
            place=f"{names['path'][self._path[row]]}, row {self._number[row]}",
            num_prompt=None if num_prompt < 0 else num_prompt,
            teacher=names["teacher"][self.teacher[row]],
            teacher_prompts=self._prompts_of(row, names["prompt_teachers"]),
        )

    def _prompts_of(self, row: int, names: Sequence[str]) -> dict[str, TeacherPrompt]:
        if not len(self._prompts["prompt_teachers"][1]):
            return {}
        teachers, replaces, sizes, ids = (
            values[offsets[row] : offsets[row + 1]] for offsets, values in self._prompts.values()
        )
        ends = np.cumsum(sizes)
        return {
            names[teacher]: TeacherPrompt(ids[end - size : end].copy(), int(replaced))
            for teacher, replaced, size, end in zip(teachers, replaces, sizes, ends, strict=True)
        }


def check_batch(batch: pa.RecordBatch, names: Mapping[str, Sequence[str]]) -> None:
    """Checks that the columns fit one another and `names`, without a look at token ids and masks. Raises ValueError."""
    batch.validate(full=True)
    columns = {name: batch.column(name) for name in SCHEMA.names}
    offsets = {name: to_numpy(each.offsets) for name, each in columns.items() if pa.types.is_list(each.type)}
    lengths = np.diff(offsets["token_ids"])
    num_prompt = to_numpy(columns["num_prompt"])
    places = {name: columns[name] for name in ("path", "teacher")}
    places["prompt_teachers"] = columns["prompt_teachers"].flatten()
    sizes = to_numpy(columns["prompt_sizes"].values)
    # The ids of all prompts of a row lie behind one another.
    ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])[offsets["prompt_sizes"]]
    fits = (
        not any(each.null_count for each in columns.values())
        and np.array_equal(lengths, np.diff(offsets["mask"]))
        and bool(((num_prompt >= -1) & (num_prompt <= lengths)).all())
        and all(_are_below(to_numpy(each), len(names[name])) for name, each in places.items())
        and all(
            np.array_equal(np.diff(offsets[name]), np.diff(offsets["prompt_teachers"]))
            for name in ("prompt_replaces", "prompt_sizes")
        )
        and _are_below(sizes, 1 << 31)
        and np.array_equal(np.diff(ends), np.diff(offsets["prompt_ids"]))
    )
    if not fits:
        raise ValueError("its columns do not fit one another")


def _are_below(values: NDArray[np.int32], limit: int) -> bool:
    return bool(((values >= 0) & (values < limit)).all())


def examples_bytes(batch: pa.RecordBatch) -> Iterator[bytes | memoryview]:
    """Yields all that examples are made of, but for the places of their rows."""
    for name in SCHEMA.names:
        column = batch.column(name)
        if pa.types.is_list(column.type):
            yield np.diff(to_numpy(column.offsets)).tobytes()
            column = column.flatten()
        if name not in ("path", "number"):
            yield np.ascontiguousarray(to_numpy(column)).data


def to_bytes(batch: pa.RecordBatch) -> bytes:
    """Serialises a batch for another process."""
    return bytes(memoryview(batch.serialize()))


def from_bytes(data: bytes) -> Any:
    """The batch of `to_bytes`."""
    return pa.ipc.read_record_batch(pa.py_buffer(data), SCHEMA)
