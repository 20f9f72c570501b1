"""Looks through the rows of a batch before any is worked on: ids that differ, one endpoint, one model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.client.batch.input_rows import InputLine, parse_object, read_lines
from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rows.field_error import kind_of, shown

MAX_ROWS = 100_000
MAX_ID_CHARACTERS = 512
MAX_PROBLEMS = 100


@dataclass(kw_only=True, slots=True)
class InputCheck:
    """Result of a look."""

    rows: int = 0
    model: str = ""
    problems: list[dict[str, Any]] = field(default_factory=list)
    """Keyword arguments of Batch.add_error."""


def check_input(path: Path, endpoint: str) -> InputCheck:
    """Reads the file at `path`. Blocks."""
    check, ids = InputCheck(), set[str]()
    try:
        for line in read_lines(path):
            check.rows += 1
            if check.rows > MAX_ROWS:
                check.problems.append(
                    _problem("too_many_requests", f"more than {MAX_ROWS} requests; split the file.")
                )
                break
            _check_row(line, endpoint, check, ids)
            if len(check.problems) >= MAX_PROBLEMS:
                break
    except StillhouseError as error:  # no text, or too long a line
        check.problems.append(_problem("invalid_file", error.message))
    if not check.rows and not check.problems:
        check.problems.append(_problem("empty_file", "the file has no request; a line is one."))
    return check


def _check_row(line: InputLine, endpoint: str, check: InputCheck, ids: set[str]) -> None:
    number = line.line_number
    try:
        row = parse_object(line)
    except StillhouseError as error:
        check.problems.append(_problem("invalid_json_line", error.message, line=number))
        return
    custom_id, body = row.get("custom_id"), row.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARACTERS:
        told = f"it is {shown(custom_id)}; give text of 1 to {MAX_ID_CHARACTERS} characters."
        check.problems.append(_problem("invalid_custom_id", told, line=number, param="custom_id"))
    elif custom_id in ids:
        told = f"{shown(custom_id)} is there twice; give each request its own."
        check.problems.append(_problem("duplicate_custom_id", told, line=number, param="custom_id"))
    else:
        ids.add(custom_id)
    if row.get("method") != "POST":
        told = f"it is {shown(row.get('method'))}; it must be POST."
        check.problems.append(_problem("invalid_method", told, line=number, param="method"))
    if row.get("url") != endpoint:
        told = f"it is {shown(row.get('url'))}, and the batch is for {endpoint}."
        check.problems.append(_problem("mismatched_endpoint", told, line=number, param="url"))
    if not isinstance(body, dict):
        told = f"it is {kind_of(body)}; it must be an object."
        check.problems.append(_problem("invalid_body", told, line=number, param="body"))
        return
    model = body.get("model")
    if not isinstance(model, str) or not model:
        told = f"it is {shown(model)}; name a model of GET /v1/models."
        check.problems.append(_problem("invalid_model", told, line=number, param="body.model"))
    elif check.model and model != check.model:
        told = f"it is {shown(model)}, and earlier requests name {shown(check.model)}; a batch has one model."
        check.problems.append(_problem("mismatched_model", told, line=number, param="body.model"))
    else:
        check.model = model


def _problem(code: str, message: str, *, line: int | None = None, param: str | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "line": line, "param": param}
