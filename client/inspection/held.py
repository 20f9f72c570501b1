"""Datasets that the trainer holds, as a scan of a file on this machine shows them."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from stillhouse.protos.rows.reading.row_error import row_error
from stillhouse.protos.rows.reading.source import RowSource
from stillhouse.protos.rows.scan import FieldUse, Row, Scan
from stillhouse.protos.stillhouse.v1.run_pb2 import InspectDatasetResponse

_HELD = re.compile(r"datasets/[^/]+")


def is_held(location: str) -> bool:
    """True for the name of an uploaded dataset that is no file of this machine."""
    return _HELD.fullmatch(location) is not None and not Path(location).exists()


def scan_of(response: InspectDatasetResponse, location: str) -> Scan:
    """The scan that a response tells of, without its sample."""
    return Scan(
        source=RowSource(location=location),
        container=response.container,
        form=response.format,
        num_rows=response.num_rows,
        num_refused=response.num_refused,
        refused=[row_error(location, each.number, each.field, each.problem) for each in response.refusals],
        is_complete=response.complete,
        fields={
            each.name: FieldUse(
                rows=each.num_rows, kinds=Counter(dict.fromkeys(each.kinds, 1)), example=each.example
            )
            for each in response.fields
        },
        rows=[
            Row(number=each.number, values=json.loads(each.json) if each.json else {})
            for each in response.rows
        ],
    )
