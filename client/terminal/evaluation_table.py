"""Formats the report of an evaluation: a row for each metric of each set, a column for teacher, student before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillhouse.client.terminal.render import columns, number_text

_COLUMNS = ("teacher", "before", "after", "change")


def report_text(report: Mapping[str, Any]) -> str:
    """Returns the table of a report, with intervals in brackets and the libraries' signatures below."""
    values = [
        (each["name"] or "held-out", each["rows"], name, metric)
        for each in report["sets"]
        for name, metric in each["metrics"].items()
    ]
    shown = [name for name in _COLUMNS if any(name in metric for *_, metric in values)]
    rows = [
        (place, str(number), name, *(_value(metric.get(column), column) for column in shown))
        for place, number, name, metric in values
    ]
    table = columns(rows, header=("SET", "ROWS", "METRIC", *(name.upper() for name in shown)))
    signatures = {metric["signature"]: name for *_, name, metric in values if metric.get("signature")}
    share = f"{100 * report['bootstrap']['confidence']:g} %"
    notes = [f"{name}: {signature}" for signature, name in signatures.items()]
    how = f"In brackets: {share} of {report['bootstrap']['resamples']} bootstrap samples of rows"
    paired = ", the same for before and after" if "change" in shown else ""
    return "\n".join([table, "", *notes, f"{how}{paired}."])


def _value(value: Mapping[str, float | None] | None, column: str) -> str:
    if value is None:
        return ""
    texts = {name: "-" if each is None else number_text(each) for name, each in value.items()}
    centre = value["value"]
    sign = "+" if column == "change" and centre is not None and centre > 0 else ""
    return f"{sign}{texts['value']} [{texts['low']}, {texts['high']}]"
