"""The run service from Python: creates and lists runs, uploads data."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from stillhouse.client.core.connection import Connection
from stillhouse.client.core.errors import file_errors
from stillhouse.client.core.settings import DEFAULT_TRAINER
from stillhouse.client.runfile.load import RunFile, load_run_file, parse_fields
from stillhouse.client.runfile.source_map import invalid
from stillhouse.client.trainer.dataset_upload import upload_of
from stillhouse.client.trainer.run_handle import RunHandle
from stillhouse.client.trainer.run_lookup import LATEST, WITHOUT_MODEL, find_run, run_id
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.files import check_rows
from stillhouse.protos.rows.known_fields import ExtraFields
from stillhouse.protos.rows.reading.line_pairs import pair_of
from stillhouse.protos.rows.reading.source import RowReader, RowSource
from stillhouse.protos.stillhouse.v1 import run_pb2
from stillhouse.protos.stillhouse.v1.run_pb2_grpc import RunServiceStub

PAGE_SIZE = 500
UPLOAD_TIMEOUT_S = 24 * 3600.0
INSPECTION_TIMEOUT_S = 600.0

Spec = run_pb2.RunSpec | RunFile | Mapping[str, Any] | str | Path
NamedRows = run_pb2.DatasetSpec | run_pb2.EvaluationSetSpec
OnBytes = Callable[[int], None]
"""Called with the number of bytes just sent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PushedDataset:
    """A file that the trainer stores."""

    name: str
    """Its path in run specs: `datasets/{id}@{version}`, or `datasets/{sha256}` without an id."""
    size_bytes: int
    """Its size."""
    num_rows: int
    """Its rows."""


class Trainer(Connection):
    """The run service at `target`, `host:port` or `unix:PATH`; a context manager.

    With `tls_ca` or a certificate the connection is TLS. Every method raises StillhouseError with a sentence that
    names a remedy; SERVICE_UNREACHABLE if no service responds.
    """

    service = "trainer"

    def __init__(self, target: str = DEFAULT_TRAINER, **options: Any) -> None:
        super().__init__(target, **options)
        self.stub = RunServiceStub(self.channel)

    def create_run(self, spec: Spec, *, overrides: Sequence[str] = (), request_id: str = "") -> RunHandle:
        """Creates and queues a run.

        `spec` is a RunSpec, a mapping with its field names, or the path of a run file; `overrides` are such as
        "loss.top_k=32". Repeating an equal `request_id`, a UUID4, returns the first run. Raises INVALID_SPEC with every
        problem and its source location.
        """
        run = self._create(spec, overrides, request_id or str(uuid.uuid4()), validate_only=False)
        return RunHandle(self, run.name)

    def validate(self, spec: Spec, *, overrides: Sequence[str] = ()) -> run_pb2.Run:
        """Returns the run that `spec` would create, with `effective_spec`; nothing is queued. Raises as create_run does.

        The problems of a RunFile that was read in part are reported together with those that the service finds.
        """
        if not isinstance(spec, RunFile) or not spec.problems:
            return self._create(spec, overrides, "", validate_only=True)
        problems = list(spec.problems)
        try:
            request = run_pb2.CreateRunRequest(spec=spec.spec, validate_only=True)
            self.call(self.stub.CreateRun, request)
        except (
            StillhouseError
        ) as error:  # also of a service that does not respond: the file's own problems stand
            problems += spec.source_map.problems_of(error.violations, spec.problems)
        raise invalid(problems)

    def _create(
        self, spec: Spec, overrides: Sequence[str], request_id: str, *, validate_only: bool
    ) -> run_pb2.Run:
        file = as_run_file(spec, overrides)
        request = run_pb2.CreateRunRequest(spec=file.spec, request_id=request_id, validate_only=validate_only)
        try:
            return self.call(self.stub.CreateRun, request)
        except StillhouseError as error:
            raise file.source_map.located(error) from error

    def run(self, name: str = "latest", *, with_model: bool = False) -> RunHandle:
        """Looks a run up by its id, a prefix of it, or `latest`; with `with_model` that is the newest run that trains a model."""

        left_out = WITHOUT_MODEL if with_model and run_id(name.strip()) == LATEST else ()
        kind = "run that trains a model" if left_out else "run"
        names = (run.name for run in self.runs() if run.spec.task not in left_out)
        return RunHandle(self, find_run(name, lambda: names, kind=kind))

    def runs(
        self,
        states: Iterable[run_pb2.Run.State.ValueType] = (),
        *,
        labels: Iterable[str] = (),
        text: str = "",
    ) -> Iterator[run_pb2.Run]:
        """Yields every run, newest first; only those in one of `states` if any are given, with all of `labels`, each KEY or
        KEY=VALUE, and with `text` in their id, display name or student's model."""
        request = run_pb2.ListRunsRequest(page_size=PAGE_SIZE, states=states, labels=labels, text=text)
        while True:
            page = self.call(self.stub.ListRuns, request)
            yield from page.runs
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def push_dataset(
        self,
        path: Path | str | RowSource,
        dataset_id: str = "",
        *,
        num_tokens: int = 0,
        extra_fields: ExtraFields = "keep",
        checked: bool = True,
        on_bytes: OnBytes | None = None,
    ) -> PushedDataset:
        """Uploads the file at `path`, which the trainer stores by content; repeating it is not an error.

        Rows that lie in several files, such as pairs and saved datasets, travel as JSONL. With `dataset_id` it becomes that
        dataset's next version, unless its newest one has the same content. Raises
        StillhouseError(DATASET_INVALID) for a row that cannot be trained on, before anything is sent; with `extra_fields`
        "refuse" also for one with a field that no row has. Not `checked`, as rows of an evaluation's choices are not, they are
        sent as they are.
        """
        source = path if isinstance(path, RowSource) else RowSource(location=str(path))
        path = Path(source.location)
        digest = hashlib.sha256()
        with file_errors("read", path):
            rows = RowReader(source)
            num_rows = check_rows(rows, extra_fields=extra_fields) if checked else 0
            name, pieces = upload_of(rows)
            first = run_pb2.UploadDatasetRequest(
                file_name=name, dataset_id=dataset_id, num_rows=num_rows, num_tokens=num_tokens
            )
            chunks = _chunks(pieces, first, digest.update, on_bytes)
            answer = self.call(self.stub.UploadDataset, chunks, timeout_s=UPLOAD_TIMEOUT_S)
        if answer.name != f"datasets/{digest.hexdigest()}":
            raise StillhouseError(
                Reason.INTERNAL,
                f"the trainer stored {path} as {answer.name}, which is not its content; push it again.",
            )
        if dataset_id and not answer.dataset.name.startswith(f"datasets/{dataset_id}@"):
            raise StillhouseError(
                Reason.CAPABILITY,
                f"the trainer stored {path} as {answer.name}, but does not know ids of datasets; use a later version of it.",
            )
        name = answer.dataset.name if dataset_id else answer.name
        return PushedDataset(name=name, size_bytes=answer.size_bytes, num_rows=first.num_rows)

    def datasets(self, dataset_id: str = "") -> Iterator[run_pb2.Dataset]:
        """Yields every uploaded dataset, newest first; only the versions of `dataset_id` if it is given."""
        request = run_pb2.ListDatasetsRequest(page_size=PAGE_SIZE, dataset_id=dataset_id)
        while True:
            page = self.call(self.stub.ListDatasets, request)
            yield from page.datasets
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def dataset(self, name: str) -> run_pb2.Dataset:
        """Looks up `datasets/{id}`, `datasets/{id}@{version}` or `datasets/{sha256}`. Raises DATASET_NOT_FOUND."""
        return self.call(self.stub.GetDataset, run_pb2.GetDatasetRequest(name=name))

    def delete_dataset(self, name: str) -> None:
        """Deletes a dataset. Raises StillhouseError: DATASET_NOT_FOUND, DATASET_IN_USE, PERMISSION_DENIED."""
        self.call(self.stub.DeleteDataset, run_pb2.DeleteDatasetRequest(name=name))

    def inspect_rows(
        self, spec: Spec, rows: Iterable[tuple[int, str]], *, in_full: int | None = None
    ) -> run_pb2.InspectRowsResponse:
        """Returns how a run with the settings of `spec` would train on rows: number and JSON text of each.

        The row with the number `in_full` comes with its tokens. Raises StillhouseError, INVALID_SPEC for the settings.
        """
        file = as_run_file(spec)
        request = run_pb2.InspectRowsRequest(
            spec=file.spec,
            rows=[
                run_pb2.InspectedRow(number=number, json=text, in_full=number == in_full)
                for number, text in rows
            ],
        )
        try:
            return self.call(self.stub.InspectRows, request, timeout_s=INSPECTION_TIMEOUT_S)
        except StillhouseError as error:
            raise file.source_map.located(error) from error

    def inspect_dataset(
        self, dataset: run_pb2.DatasetSpec, spec: Spec | None = None, **options: int
    ) -> run_pb2.InspectDatasetResponse:
        """Returns what a dataset that the trainer reads holds, and what a run with the settings of `spec` would make of it.

        `options` are first_row, num_rows, sample_rows and max_rows of InspectDatasetRequest. Raises StillhouseError.
        """
        settings = None if spec is None else as_run_file(spec).spec
        request = run_pb2.InspectDatasetRequest(dataset=dataset, spec=settings, **options)
        return self.call(self.stub.InspectDataset, request, timeout_s=INSPECTION_TIMEOUT_S)

    def inspect_student(self, model: str, revision: str = "") -> run_pb2.InspectStudentResponse:
        """Returns the configuration of a model as the trainer finds it, and the memory of the trainer's devices."""
        return self.call(
            self.stub.InspectStudent, run_pb2.InspectStudentRequest(model=model, revision=revision)
        )

    def push_datasets_of(self, file: RunFile, *, on_push: Callable[[Path], None] | None = None) -> RunFile:
        """Uploads every dataset next to `file` and renames it `datasets/{sha256}` in it.

        Paths that do not exist next to it are unchanged: they are the trainer's.
        """
        for dataset, local in local_datasets(file):
            if on_push is not None:
                on_push(local)
            dataset.path = self._push(local, dataset).name
        return file

    def _push(self, local: Path, named: NamedRows) -> PushedDataset:
        if isinstance(named, run_pb2.EvaluationSetSpec):
            return self.push_dataset(local, checked=named.match != "choices")
        return self.push_dataset(
            RowSource(
                location=str(local),
                format=named.format or "auto",
                split=named.split,
                config=named.config,
                columns=dict(named.columns),
            )
        )


def local_datasets(file: RunFile) -> list[tuple[NamedRows, Path]]:
    """The datasets of a run that lie next to its file, each with its path; all others are the trainer's."""
    sets: Iterable[NamedRows] = (*file.spec.data.train, *file.spec.data.eval, *file.spec.evaluation.sets)
    paths = [(each, file.directory / each.path) for each in sets if each.path]
    return [(each, local) for each, local in paths if local.is_file() or pair_of(local)]


def as_run_file(spec: Spec, overrides: Sequence[str] = ()) -> RunFile:
    """Parses, copies and checks `spec` in any of its forms, with `overrides` applied."""
    match spec:
        case RunFile():
            return spec
        case str() | Path():
            return load_run_file(spec, overrides)
        case run_pb2.RunSpec():
            return parse_fields(MessageToDict(spec, preserving_proto_field_name=True), overrides)
        case _:
            return parse_fields(spec, overrides)


def _chunks(
    pieces: Iterator[bytes],
    first: run_pb2.UploadDatasetRequest,
    digest: Callable[[bytes], None],
    on_bytes: OnBytes | None,
) -> Iterator[run_pb2.UploadDatasetRequest]:
    yield first
    for data in pieces:
        digest(data)
        yield run_pb2.UploadDatasetRequest(data=data)
        if on_bytes is not None:
            on_bytes(len(data))
