"""Sources of rows in other packages, by the entry point group `stillhouse.datasets`.

A package names a function there:

    [project.entry-points."stillhouse.datasets"]
    wiki = "my_package:rows"

and `path: wiki:ANYTHING` calls `rows("ANYTHING", split=…, config=…)`, which returns an iterable of mappings with the fields
of rows, in the same order each time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.library_errors import reported_as
from stillhouse.protos.rows.field_error import kind_of
from stillhouse.protos.rows.reading.row_error import OnBadRow, row_error

GROUP = "stillhouse.datasets"
_LOCATION = re.compile(r"([A-Za-z][\w-]+):(.*)", re.DOTALL)
"""Two letters at least: one is a drive of Windows."""


def plugin_of(location: str) -> EntryPoint | None:
    """Returns the source that a location such as "wiki:en" names; None for anything else."""
    found = _LOCATION.fullmatch(location)
    if found is None:
        return None
    return next(iter(entry_points(group=GROUP, name=found[1])), None)


def read_plugin(
    location: str, plugin: EntryPoint, refuse: OnBadRow, *, split: str, config: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields number, from 1, and fields of each row of a source. Raises StillhouseError(DATASET_INVALID)."""

    def failed(error: BaseException) -> StillhouseError:
        return StillhouseError(
            Reason.DATASET_INVALID,
            f"{location} is read by {plugin.value}, which failed ({type(error).__name__}: {error}); correct that package or "
            "the path.",
        )

    with reported_as(failed):
        rows = iter(plugin.load()(location.partition(":")[2], split=split, config=config))
    number = 0
    while True:
        with reported_as(failed):
            values = next(rows, None)
        if values is None:
            return
        number += 1
        if isinstance(values, Mapping):
            yield number, dict(values)
        else:
            refuse(
                row_error(
                    location, number, "(the row)", f"is {kind_of(values)}; it must be a mapping of fields."
                )
            )
