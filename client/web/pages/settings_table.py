"""Settings of runs as rows: written against defaulted, and those that differ between runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.client.core.json_output import as_json, dumps
from stillhouse.protos.stillhouse.v1.run_pb2 import Run, RunSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A setting of a run."""

    path: str
    """Such as optimizer.learning_rate or teachers[0].name."""
    value: str
    written: bool
    """True if the run file has it; else it is a default, or follows from others."""


def settings_of(run: Run) -> list[Setting]:
    """Settings in effect, in the order of the contract; those that are empty only if they are written."""
    written = dict(_flat(as_json(run.spec)))
    return [
        Setting(path=path, value=value, written=path in written)
        for path, value in _flat(as_json(run.effective_spec))
    ]


def differences(specs: Sequence[RunSpec]) -> list[tuple[str, list[str]]]:
    """Path, and value in each of `specs`, of the settings that are not equal in all; "" where one has none."""
    tables = [dict(_flat(as_json(each))) for each in specs]
    paths = list(dict.fromkeys(path for table in tables for path in table))
    rows = [(path, [table.get(path, "") for table in tables]) for path in paths]
    return [(path, values) for path, values in rows if len(set(values)) > 1]


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Path and text of every value that is not empty."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _flat(item, f"{path}[{number}]")
    elif value not in ("", [], None):
        yield path, value if isinstance(value, str) else dumps(value)
