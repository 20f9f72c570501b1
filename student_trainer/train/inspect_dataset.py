"""Reads a dataset for the page and the client of the run service, and chooses the rows to encode; a process of its own.

Reads an InspectDatasetRequest, whose paths are settled, on standard input. Writes the length of the response, 8 bytes, most
significant first, an InspectDatasetResponse without encodings, and an InspectRowsRequest for these; on failure a
google.rpc.Status, with exit code FAILED. No tokenizer is loaded: the process of inspect_rows has it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from stillhouse.protos.errors import StillhouseError, to_status
from stillhouse.protos.rows.reading.source import RowSource
from stillhouse.protos.rows.scan import Scan, scan
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb

FAILED = 3
"""Exit code of a refusal; any other but 0 is a crash."""
LENGTH_BYTES = 8
MAX_SHOWN_CHARS = 64 * 1024
"""Longest row that is returned as it is read."""


def main() -> int:
    """Answers the request on standard input; libraries that print go to standard error."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with out:
        try:
            request = pb.InspectDatasetRequest.FromString(sys.stdin.buffer.read())
            response, rows = inspect_dataset(request)
            told = response.SerializeToString()
            out.write(len(told).to_bytes(LENGTH_BYTES) + told + rows.SerializeToString())
        except StillhouseError as error:
            out.write(to_status(error).SerializeToString())
            return FAILED
    return 0


def inspect_dataset(
    request: pb.InspectDatasetRequest,
) -> tuple[pb.InspectDatasetResponse, pb.InspectRowsRequest]:
    """Reads the dataset; returns what it holds, and the rows to encode. Raises StillhouseError if it cannot be read."""
    source = _source(request.dataset)
    found = scan(
        source,
        sample_rows=max(1, request.sample_rows),
        first_row=max(1, request.first_row),
        num_rows=request.num_rows,
        limit=request.max_rows,
        **_parsing(request.spec),
    )
    response = pb.InspectDatasetResponse(
        container=found.container,
        format=found.form,
        num_rows=found.num_rows,
        num_refused=found.num_refused,
        complete=found.is_complete,
        fields=[
            pb.FieldUse(name=name, num_rows=use.rows, kinds=use.kinds, example=use.example)
            for name, use in found.fields.items()
        ],
        refusals=[_refusal(each) for each in found.refused],
        rows=[
            pb.InspectedRow(
                number=row.number, json=text if len(text := row.as_json()) <= MAX_SHOWN_CHARS else ""
            )
            for row in found.rows
        ],
    )
    return response, _to_encode(request, found)


def _source(dataset: pb.DatasetSpec) -> RowSource:
    return RowSource(
        location=dataset.path,
        format=dataset.format or "auto",
        split=dataset.split,
        config=dataset.config,
        columns=dict(dataset.columns),
    )


def _parsing(spec: pb.RunSpec) -> dict[str, Any]:
    """Options of `parse_training_row` that the run's settings give; the encoder knows the fields that prompts read."""
    data = spec.data
    reads_more = any(teacher.HasField("prompt") for teacher in spec.teachers)
    return {
        "chat": data.chat,
        "completion_only": not data.HasField("completion_only") or data.completion_only,
        "extra_fields": "refuse" if data.extra_fields == "refuse" and not reads_more else "keep",
        "own_fields": [data.teacher_field] if data.teacher_field else (),
    }


def _refusal(error: StillhouseError) -> pb.RowRefusal:
    field = error.metadata.get("field", "")
    problem = error.message.partition(f"field {field}: ")[2] or error.message
    return pb.RowRefusal(number=int(error.metadata.get("row", "0")), field=field, problem=problem)


def _to_encode(request: pb.InspectDatasetRequest, found: Scan) -> pb.InspectRowsRequest:
    """The shown rows and the sample, by number; without settings where there is no student to encode them for."""
    if not request.spec.student.model:
        return pb.InspectRowsRequest()
    shown = {row.number: row.as_json() for row in found.rows}
    texts = shown | dict(found.sample if request.sample_rows else ())
    rows = [
        pb.InspectedRow(number=number, json=text, in_full=number in shown)
        for number, text in sorted(texts.items())
    ]
    return pb.InspectRowsRequest(spec=request.spec, rows=rows)


if __name__ == "__main__":
    sys.exit(main())
