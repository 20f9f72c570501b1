"""Prepares datasets: takes the tables that an earlier run left, and encodes and keeps what is missing."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import DatasetConfig
from stillhouse.student_trainer.prepared_store import OWN, PreparedFolder, PreparedStore
from stillhouse.student_trainer.train.data.cached_texts import cached_examples, is_cache
from stillhouse.student_trainer.train.data.chat.marks import TurnEnds
from stillhouse.student_trainer.train.data.chat.mask import Learned
from stillhouse.student_trainer.train.data.prepared.block import Block
from stillhouse.student_trainer.train.data.prepared.columns import NAMED, BatchBuilder, from_bytes, to_bytes
from stillhouse.student_trainer.train.data.prepared.encoding_run import BLOCK_ROWS, START_AFTER_S, EncodingRun
from stillhouse.student_trainer.train.data.prepared.identity import (
    DatasetContent,
    dataset_content,
    dated,
    encoding_digest,
    tokenizer_digest,
)
from stillhouse.student_trainer.train.data.prepared.progress import Observer, ProgressReport, Unobserved
from stillhouse.student_trainer.train.data.prepared.settings import ExampleSettings
from stillhouse.student_trainer.train.data.prepared.table import PreparedTable, TableWriter
from stillhouse.student_trainer.train.data.readers import read_rows, resolve, source_of

log = structlog.get_logger()

ROWS_FILE = "rows.arrow"
_WAIT_S = 0.5
_NOTES = {
    "rewritten_turns": "turns are not learnt: the chat template writes them in another way once turns follow, such as without "
    "their thoughts",
    "unprompted_turns": "turns do not begin with the generation prompt of the chat template",
    "unended_turns": "turns have no token at their end, so the student learns none there",
    "doubled_openings": "texts spell the beginning-of-text token that is added to each: one of the two was dropped",
}
"""Sentences of the log about counts of RowEncoder.notes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """Knowledge from the rows of a dataset, besides their examples."""

    left_out: Counter[str]
    """Rows that were left out, by reason."""
    notes: Counter[str]
    """RowEncoder.notes."""
    end_ids: tuple[int, ...]
    """Tokens that ended a text or a turn."""
    wrote_date: bool
    """A template asked for the date."""
    learned: Learned
    """Knowledge from these and all rows before them of the chat template."""

    def to_json(self) -> dict[str, Any]:
        """For a manifest."""
        ends = [[source, dataclasses.asdict(each)] for source, each in self.learned.turn_ends]
        return {
            "left_out": dict(self.left_out),
            "notes": dict(self.notes),
            "end_ids": list(self.end_ids),
            "wrote_date": self.wrote_date,
            "learned": {"marks": list(self.learned.marks), "turn_ends": ends},
        }

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Told:
        """The value of `to_json`."""
        learned = told["learned"]
        return cls(
            left_out=Counter(told["left_out"]),
            notes=Counter(told["notes"]),
            end_ids=tuple(told["end_ids"]),
            wrote_date=told["wrote_date"],
            learned=Learned(
                marks=tuple(learned["marks"]),
                turn_ends=tuple((source, TurnEnds(**ends)) for source, ends in learned["turn_ends"]),
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """One dataset, prepared."""

    table: PreparedTable
    told: Told
    name: str
    """Name of its folder; empty in memory."""
    digest: str
    """Digest of its examples, wherever their rows were read."""


class Preparer:
    """Prepares datasets, in the order of a run; a context manager that ends the processes it started."""

    def __init__(
        self,
        settings: ExampleSettings,
        tokenizer: Any,
        data_dir: Path,
        *,
        store: PreparedStore | None = None,
        cores: int = 1,
        observer: Observer | None = None,
        start_after_s: float = START_AFTER_S,
    ) -> None:
        """Without `store` tables stay in memory. Raises StillhouseError(TOKENIZER_INVALID)."""
        self._settings = settings
        self._data_dir = data_dir
        self._store = store
        self._observer = observer or Unobserved()
        self._stack = ExitStack()
        self._run = self._stack.enter_context(
            EncodingRun(
                tokenizer, settings, cores=cores, observer=self._observer, start_after_s=start_after_s
            )
        )
        self._tokenizer_digest = tokenizer_digest(tokenizer)
        # Such a template would be told the time of the attempt.
        self._is_lasting = bool(settings.data.date) or "strftime_now" not in str(tokenizer.chat_template)
        self._learned = Learned()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def prepare(self, dataset: DatasetConfig) -> Prepared:
        """Takes or makes the table of a dataset, and logs what was left out.

        Raises StillhouseError: DATASET_NOT_FOUND, DATASET_INVALID, CACHE_INVALID, TOKENIZER_MISMATCH; OSError of a full disk.
        """
        prepared = self._in_memory(dataset) if self._store is None else self._kept(dataset, self._store)
        self._learned = prepared.told.learned
        _log_told(dataset, prepared.told)
        return prepared

    def reopen(self, name: str, dataset: DatasetConfig) -> Prepared:
        """Opens the table that another process of the run has prepared, or prepares it here if it cannot be opened."""
        found = None if self._store is None else _opened(self._store, name)
        if found is None:
            return self.prepare(dataset)
        self._learned = found.told.learned
        return found

    def _in_memory(self, dataset: DatasetConfig) -> Prepared:
        writer = TableWriter()
        told = self._write(dataset, writer, None)
        return Prepared(
            table=PreparedTable(writer.close(), writer.names), told=told, name="", digest=writer.digest
        )

    def _kept(self, dataset: DatasetConfig, store: PreparedStore) -> Prepared:
        source = source_of(dataset, self._data_dir)
        content = dataset_content(source, store.folder) if self._is_lasting else None
        if content is None:
            return self._build(dataset, store, _own_name(), None)
        name = encoding_digest(
            dataset,
            source.location,
            content.digest,
            tokenizer=self._tokenizer_digest,
            settings=self._settings,
            learned=self._learned,
        )
        is_waiting = False
        while True:
            found = self._earlier(dataset, store, name)
            if found is not None:
                return found
            with store.turn(name) as is_mine:
                if is_mine:
                    # The process that had the turn may have put the folder there in between.
                    found = self._earlier(dataset, store, name)
                    return self._build(dataset, store, name, content) if found is None else found
            if not is_waiting:
                is_waiting = True
                log.info("waiting for another run that prepares the same data", path=dataset.path)
            self._observer.check()
            time.sleep(_WAIT_S)

    def _earlier(self, dataset: DatasetConfig, store: PreparedStore, name: str) -> Prepared | None:
        """Opens what an earlier run has prepared, with its date or without one."""
        for each in (name, dated(name, self._settings.data.date)):
            found = _opened(store, each)
            if found is not None:
                log.info("data was prepared before", path=dataset.path, rows=len(found.table))
                return found
        return None

    def _build(
        self, dataset: DatasetConfig, store: PreparedStore, name: str, content: DatasetContent | None
    ) -> Prepared:
        """Encodes the rows of a dataset into a folder; `content` is what its files held before, if `name` tells of it."""
        store.folder.mkdir(exist_ok=True)
        with store.new_folder() as folder:
            with (folder / ROWS_FILE).open("wb") as file:
                writer = TableWriter(file)
                told = self._write(dataset, writer, None if content is None else content.num_rows)
                writer.close()
            if content is not None and content != dataset_content(
                source_of(dataset, self._data_dir), store.folder
            ):
                log.warning("the data changed while it was read: no other run takes it", path=dataset.path)
                name = _own_name()
            elif told.wrote_date:
                name = dated(name, self._settings.data.date)
            manifest = {"names": writer.names, "told": told.to_json(), "digest": writer.digest}
            store.put(folder, name, manifest)
            found = _opened(store, name)
            if found is None and folder.is_dir():
                # A damaged folder has the name, and another process holds it.
                name = _own_name()
                store.put(folder, name, manifest)
                found = _opened(store, name)
        if found is None:
            raise OSError(f"{store.folder / name} cannot be read although it was just written")
        return found

    def _write(self, dataset: DatasetConfig, writer: TableWriter, num_rows: int | None) -> Told:
        """Encodes the rows of a dataset into `writer`."""
        if num_rows is not None and dataset.limit is not None:
            num_rows = min(num_rows, dataset.limit)
        report = ProgressReport(dataset.path, num_rows, self._observer)
        left_out, notes = Counter[str](), Counter[str]()
        end_ids: set[int] = set()
        wrote_date, learned = False, self._learned
        for block in self._blocks(dataset):
            writer.add(from_bytes(block.data), block.names)
            left_out.update(block.left_out)
            notes.update(block.notes)
            end_ids.update(block.end_ids)
            wrote_date, learned = wrote_date or block.wrote_date, block.learned
            report.add(block.num_read)
        report.close()
        return Told(
            left_out=left_out,
            notes=notes,
            end_ids=tuple(sorted(end_ids)),
            wrote_date=wrote_date,
            learned=learned,
        )

    def _blocks(self, dataset: DatasetConfig) -> Iterator[Block]:
        path = resolve(dataset.path, self._data_dir)
        if is_cache(path):
            return self._cached(path, dataset.limit)
        return self._run.blocks(read_rows(dataset, self._data_dir), self._learned)

    def _cached(self, path: Path, limit: int | None) -> Iterator[Block]:
        """Yields texts of a cache unchanged: truncated ones would have no targets in it."""
        rows, data = self._run.encoder.rows, self._settings.data
        if self._run.encoder.prompts:
            raise StillhouseError(
                Reason.DATASET_INVALID,
                f"{path} is a cache, whose rows have token ids and no fields for teachers[].prompt. Leave the prompt out: a "
                "cache keeps those that its teachers saw; or name the rows that it was built from.",
            )
        found = itertools.islice(
            cached_examples(path, rows.fingerprint, routed=bool(data.teacher_field)), limit
        )
        while examples := list(itertools.islice(found, BLOCK_ROWS)):
            self._observer.check()
            rows.learned = self._learned
            rows.forget_counts()
            builder, left_out = BatchBuilder(), Counter[str]()
            for each in examples:
                if len(each.token_ids) > data.max_sequence_tokens:
                    left_out["too_long"] += 1
                    continue
                rows.see_end(each.token_ids.tolist())
                source, _, number = each.place.rpartition(", row ")
                builder.add(
                    each.token_ids.tolist(),
                    each.mask,
                    num_prompt=each.num_prompt,
                    path=source,
                    number=int(number),
                    teacher=each.teacher,
                    prompts=each.teacher_prompts,
                )
            yield Block(
                data=to_bytes(builder.finish()),
                names={name: builder.names[name].names for name in NAMED},
                num_read=len(examples),
                left_out=left_out,
                notes=Counter(),
                end_ids=rows.end_ids,
                wrote_date=False,
                learned=self._learned,
            )


def check_equal(digests: Sequence[Sequence[str]], datasets: Sequence[DatasetConfig]) -> None:
    """Checks that all processes of a run have the same examples; `digests` are those of each process, by dataset.

    Raises StillhouseError(DATASET_INVALID) for a dataset whose rows differ, such as that of a hub which has changed.
    """
    for rank, own in enumerate(digests):
        for dataset, first, here in zip(datasets, digests[0], own, strict=True):
            if here != first:
                raise StillhouseError(
                    Reason.DATASET_INVALID,
                    f"{dataset.path} has other rows on the host of process {rank} than on that of process 0. Give all hosts "
                    "one data directory, or upload the rows with `stillhouse data push` and name them by that.",
                )


def _own_name() -> str:
    """Names a folder of rows that cannot be told from others: no other run finds it."""
    return f"{OWN}{secrets.token_hex(12)}"


def _opened(store: PreparedStore, name: str) -> Prepared | None:
    folder = store.open(name)
    if folder is None:
        return None
    try:
        return _read(folder, name)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, AttributeError) as error:
        log.warning(
            "prepared data cannot be read and is prepared again", path=str(folder.path), why=str(error)
        )
        folder.close()
        store.discard(name)
        return None


def _read(folder: PreparedFolder, name: str) -> Prepared:
    manifest = folder.manifest
    table = PreparedTable.open(folder.path / ROWS_FILE, manifest["names"], owner=folder)
    return Prepared(
        table=table, told=Told.from_json(manifest["told"]), name=name, digest=str(manifest["digest"])
    )


def _log_told(dataset: DatasetConfig, told: Told) -> None:
    if told.left_out.total():
        log.warning("rows left out", path=dataset.path, **told.left_out)
    for name, count in told.notes.items():
        if count:
            log.warning(_NOTES[name], path=dataset.path, number=count)
