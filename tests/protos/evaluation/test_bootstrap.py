"""Intervals hold the value, are the same in every process, and those of pairs see what is common to both."""

from __future__ import annotations

import json

import numpy as np
import pytest

from stillhouse.protos.evaluation.bootstrap import interval, paired_interval
from stillhouse.protos.evaluation.report import make_report
from stillhouse.protos.evaluation.row_sums import RowSums


def rows(values: np.ndarray) -> RowSums:
    return RowSums.mean(values)


def test_an_interval_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = interval(rows(values))
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert found == interval(rows(values))


def test_a_paired_interval_is_narrow_where_rows_differ_more_than_models() -> None:
    random = np.random.default_rng(0)
    before = random.normal(size=200) * 10
    after = before + 0.1 + random.normal(size=200) * 0.1
    found = paired_interval(rows(after), rows(before))
    assert 0 < found.low < found.value < found.high < 0.2
    assert interval(rows(after)).high - interval(rows(after)).low > 1


def test_models_on_different_rows_are_not_paired() -> None:
    with pytest.raises(ValueError, match="3 rows are compared with 2"):
        paired_interval(rows(np.zeros(3)), rows(np.zeros(2)))


def test_a_report_is_plain_json_also_without_values() -> None:
    scores = {"before": {"kl": rows(np.array([1.0, 2.0]))}, "after": {"kl": rows(np.zeros(0))}}
    with pytest.raises(ValueError, match="0 rows"):
        make_report({"": scores}, {})
    report = make_report({"a": {"after": {"kl": rows(np.zeros(0))}}}, {"step": 3})
    assert (
        json.loads(json.dumps(report, allow_nan=False))["sets"][0]["metrics"]["kl"]["after"]["value"] is None
    )
