"""Batch inference from file to file: what `stillhouse generate --in` does, for Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stillhouse.client.batch.capture import Capture
from stillhouse.client.batch.dispatcher import MAX_INFLIGHT, BatchDispatcher, RowResult
from stillhouse.client.batch.input_rows import (
    InputLine,
    PromptRow,
    Sampling,
    count_rows,
    detect_format,
    plain_row,
    read_lines,
)
from stillhouse.client.batch.journal import Header, Position, RowRecord
from stillhouse.client.batch.openai_input import openai_row
from stillhouse.client.batch.ordered_output import RETRY, Output, OutputPaths, commit_retry, locked
from stillhouse.client.batch.output_formats import OpenAi, TokenTexts, dataset, plain, require_text
from stillhouse.client.batch.retry import EarlierOutput
from stillhouse.client.batch.teacher_identity import BatchTeacher, identity, matching_replicas
from stillhouse.client.batch.unique_ids import check_ids
from stillhouse.client.core.connection import PATIENCE_S, OnLost
from stillhouse.client.core.errors import usage_error
from stillhouse.client.teacher.tool_calls import format_of
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.known_fields import ExtraFields
from stillhouse.protos.rows.reading.line_pairs import pair_of
from stillhouse.protos.rpc.pool.bounded_wait import BoundedWait

if TYPE_CHECKING:
    from stillhouse.client.teacher.teacher import Teacher

CAPTURE_TOP_K = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSettings:
    """Settings for one file of prompts."""

    sampling: Sampling = field(default_factory=Sampling)
    """Defaults of rows that do not set their own."""
    format: Literal["auto", "plain", "openai"] = "auto"
    """Format of the input; "auto" looks at its first row."""
    chat: bool = False
    """Make a user's turn of each plain row's prompt of text."""
    date: str = ""
    """Day that chat templates are told; empty means that of the batch's begin, in UTC, also where it resumes."""
    extra_fields: ExtraFields = "keep"
    """Copy fields that no rule knows to the output, or refuse their rows."""
    as_dataset: bool = False
    """Write rows of training data instead of the format of the input."""
    capture: Path | None = None
    """Folder of a cache that takes the distributions of every token that is written."""
    top_k: int = CAPTURE_TOP_K
    """Candidates at each position of `capture`."""
    retry_failed: bool = False
    """Repeat the rows that failed, once all others are completed."""
    overwrite: bool = False
    """Start from scratch, whatever the output holds."""
    max_inflight: int = MAX_INFLIGHT
    """Samples in flight."""
    patience_s: float = PATIENCE_S
    """Time without a response after which a lost teacher is given up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchProgress:
    """Progress of a batch."""

    rows: int
    """Completed rows, also of earlier commands."""
    total_rows: int
    """Rows of the input."""
    failed: int
    """Rows of the output that failed."""
    tokens: int
    """Tokens that this command generated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSummary:
    """Result of a batch."""

    out: Path
    """The output."""
    failed_file: Path | None
    """Rows that failed, where the output cannot hold them."""
    format: Literal["plain", "openai"]
    """Format of the input."""
    rows: int
    """Rows of the output, whichever command completed them."""
    failed: int
    """Rows of these that failed."""
    asked: int
    """Rows that this command sent to a teacher."""
    tokens: int
    """Tokens that it generated."""
    seconds: float
    """Duration of the command."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listeners:
    """Callbacks for events on the way."""

    progress: Callable[[BatchProgress], None] = lambda _: None
    """Called after every row."""
    note: Callable[[str], None] = lambda _: None
    """Called with a sentence for people."""
    lost: OnLost | None = None
    """Called with the error of a lost teacher and the seconds until the next attempt."""


def generate_file(
    teacher: Teacher | Sequence[Teacher],
    source: Path | str,
    out: Path | str,
    settings: BatchSettings | None = None,
    listeners: Listeners | None = None,
) -> BatchSummary:
    """Completes every row of `source` in `out`, in order, each exactly once, also over kills of either side.

    Several services of one teacher share the work, and one that is lost leaves its part to the others.
    Calling it again resumes a killed batch, and does nothing for a finished one. A failed row is reported in `out`.

    Raises StillhouseError: INVALID_REQUEST for files that cannot be read or written; REQUEST_CONFLICT if `out` was begun
    with other settings or another input; TEACHER_CHANGED, ADAPTER_NOT_FOUND; what makes a teacher refuse the whole batch.
    """
    teachers = list(teacher) if isinstance(teacher, Sequence) else [teacher]
    batch = _Batch(teachers, Path(source), Path(out), settings or BatchSettings(), listeners or Listeners())
    return batch.run()


class _Batch:
    def __init__(
        self,
        teachers: Sequence[Teacher],
        source: Path,
        out: Path,
        settings: BatchSettings,
        listeners: Listeners,
    ) -> None:
        if not source.is_file() and pair_of(source) is None:
            raise usage_error(
                f"{source} is not a file. The input is read again when a batch resumes: give a file."
            )
        if out.exists() and source.exists() and out.samefile(source):
            raise usage_error(f"{out} is the input, too. Choose another --out.")
        self._teachers = teachers
        self._source = source
        self._paths = OutputPaths(out=out)
        self._settings = settings
        self._tell = listeners
        self._format = detect_format(source) if settings.format == "auto" else settings.format
        if settings.chat and self._format == "openai":
            raise usage_error(
                f"{source} has rows of OpenAI's format, whose url says if they are chats. Leave --chat out."
            )
        self._date = ""
        self._num_sent = 0
        self._tokens = 0

    def run(self) -> BatchSummary:
        began_s = time.monotonic()
        check_ids(self._source, self._format)
        self._wait_until_loaded()
        with locked(self._paths.out):
            if self._settings.overwrite:
                self._paths.retry.journal.unlink(missing_ok=True)
            commit_retry(self._paths)
            position = self._pass(self._paths, overwrite=self._settings.overwrite, earlier=None)
            if self._settings.retry_failed and position.num_failed:
                with EarlierOutput(self._paths, position, is_dataset=self._settings.as_dataset) as earlier:
                    position = self._pass(self._paths.retry, overwrite=False, earlier=earlier)
                commit_retry(self._paths)
        has_failures = self._settings.as_dataset and position.num_failed
        return BatchSummary(
            out=self._paths.out,
            failed_file=self._paths.failed if has_failures else None,
            format=self._format,
            rows=position.rows,
            failed=position.num_failed,
            asked=self._num_sent,
            tokens=self._tokens,
            seconds=time.monotonic() - began_s,
        )

    @cached_property
    def _total_rows(self) -> int:
        return count_rows(self._source)

    def _wait_until_loaded(self) -> None:
        """Raises at once if no teacher is reached; waits for one that loads its model."""
        wait = BoundedWait(self._settings.patience_s, on_pause=self._tell.lost)
        while True:
            try:
                self._teachers = matching_replicas(self._teachers)
            except StillhouseError as error:
                if error.reason is not Reason.TEACHER_LOADING:
                    raise
                wait.pause(error)
            else:
                return

    def _pass(self, paths: OutputPaths, *, overwrite: bool, earlier: EarlierOutput | None) -> Position:
        """Completes all rows into `paths`; those that `earlier` holds are taken from there."""
        header = self._header(earlier)
        with ExitStack() as stack:
            output = stack.enter_context(
                Output(paths, header, overwrite=overwrite, has_failed_file=self._settings.as_dataset)
            )
            # A resumed batch keeps its ids and times.
            header = output.journal.header
            begun = datetime.fromtimestamp(header.started_s, UTC).date()
            # A retry is told the day of the rows that it repeats.
            self._date = self._date or self._settings.date or begun.isoformat()
            teacher = BatchTeacher(self._teachers, paths.out, header, output.journal, self._tell.note)
            capture = None
            if self._settings.capture is not None:
                capture = stack.enter_context(Capture(self._settings.capture, self._settings.top_k, teacher))
            self._complete_all(output, teacher, capture, earlier)
            output.finish()
            return output.position

    def _complete_all(
        self, output: Output, teacher: BatchTeacher, capture: Capture | None, earlier: EarlierOutput | None
    ) -> None:
        record_of = self._record_of(output.journal.header)
        flow = BatchDispatcher(
            self._teachers,
            self._rows(output, teacher, capture, earlier),
            verify=teacher.verify,
            top_k=None if capture is None else self._settings.top_k,
            max_inflight=self._settings.max_inflight,
            on_lost=self._tell.lost,
            patience_s=self._settings.patience_s,
        )
        before = self._tokens
        for result in flow.results():
            self._num_sent += 1
            self._tokens = before + flow.tokens
            done = result.row.line.number, record_of(result)
            if capture is None:
                self._add(output, *done)
                continue
            capture.add(result, done)
            if capture.is_due:
                self._flush(output, capture)
        if capture is not None:
            self._flush(output, capture)

    def _flush(self, output: Output, capture: Capture) -> None:
        """Adds the rows whose distributions are on the disk: only these count as completed."""
        for number, row in capture.flush():
            self._add(output, number, row)

    def _add(self, output: Output, number: int, row: RowRecord) -> None:
        output.add(number, row)
        self._tell.progress(
            BatchProgress(
                rows=output.num_answered,
                total_rows=self._total_rows,
                failed=output.num_failed,
                tokens=self._tokens,
            )
        )

    def _rows(
        self, output: Output, teacher: BatchTeacher, capture: Capture | None, earlier: EarlierOutput | None
    ) -> Iterator[PromptRow | None]:
        """Yields the rows to complete, and None while so many wait for an earlier one that no more may be sent."""
        num_lines = 0
        for line in read_lines(self._source):
            num_lines += 1
            is_answered = output.is_answered(line)
            kept = None if earlier is None else earlier.next(line, partial(self._row, teacher))
            if is_answered:
                continue
            while output.is_full:
                if capture is not None:
                    self._flush(output, capture)
                if output.is_full:
                    yield None
            if kept is not None:
                self._add(output, line.number, kept)
            else:
                yield self._row(teacher, line)
        output.check_end(num_lines)

    def _row(self, teacher: BatchTeacher, line: InputLine) -> PromptRow:
        sampling = self._settings.sampling
        if self._format == "openai":
            longest = teacher.info.max_sequence_tokens
            row = openai_row(
                line,
                sampling,
                max_tokens=longest,
                resolve_adapter=teacher.resolve_adapter,
                extra_fields=self._settings.extra_fields,
            )
        else:
            settings = self._settings
            row = plain_row(line, sampling, chat=settings.chat, extra_fields=settings.extra_fields)
        for prompt in row.prompts:
            teacher.use(prompt.adapter)
            if prompt.HasField("conversation"):
                prompt.conversation.date = self._date
            if prompt.HasField("student_conversation"):
                prompt.student_conversation.date = self._date
        return require_text(row) if self._settings.as_dataset else row

    def _record_of(self, header: Header) -> Callable[[RowResult], RowRecord]:
        if self._settings.as_dataset:
            return dataset
        if self._format == "plain":
            return plain
        files = cache(self._teachers[0].tokenizer)
        return OpenAi(
            created_s=header.started_s,
            model=str(header.teacher["model"]),
            fingerprint=str(header.teacher["model_fingerprint"]),
            token_texts=cache(lambda: TokenTexts(files().get("tokenizer.json", b""))),
            tool_format=cache(lambda: format_of(files())),
        )

    def _header(self, earlier: EarlierOutput | None) -> Header:
        settings: dict[str, Any] = {"input format": self._format}
        settings["output"] = "dataset" if self._settings.as_dataset else self._format
        settings |= asdict(self._settings.sampling)
        settings["stop"] = list(self._settings.sampling.stop)
        # Only where they differ from the default, so that batches of older versions resume.
        if self._settings.chat:
            settings["chat"] = True
        if self._settings.date:
            settings["date"] = self._settings.date
        if self._settings.extra_fields != "keep":
            settings["extra_fields"] = self._settings.extra_fields
        if self._settings.capture is not None:
            settings |= {"capture": str(self._settings.capture), "capture's top_k": self._settings.top_k}
        if earlier is not None:
            settings[RETRY] = earlier.digest
        return Header(
            settings=settings, teacher=identity(self._teachers[0].limits), started_s=int(time.time())
        )
