"""The line about data that is prepared."""

from __future__ import annotations

import pytest

from stillhouse.client.terminal.run_progress import PlainView, preparation_text
from stillhouse.protos.stillhouse.v1.run_pb2 import MetricPoint, WatchRunResponse

ROWS = {"data/prepared_rows": 20_000.0, "data/rows_per_second": 5_120.4}


def test_rows_rate_and_time_left_are_shown_where_they_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert preparation_text(MetricPoint(values=ROWS)) == "data: 20,000 rows  5,120 rows/s"
    whole = MetricPoint(values={**ROWS, "data/rows": 1e6, "data/left_s": 191.0})
    PlainView().show(WatchRunResponse(sequence=1, metrics=whole))
    told = "data: 20,000 of 1,000,000 rows  5,120 rows/s  3 min 11 s left\n"
    assert capsys.readouterr().out == told
