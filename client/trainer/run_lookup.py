"""Looks a run up by its id, a unique prefix of it, or `latest`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from stillhouse.client.core.errors import usage_error
from stillhouse.protos.errors import Reason, StillhouseError

ID_LENGTH = 12
LATEST = "latest"
_PREFIX = re.compile(rf"[a-z2-7]{{1,{ID_LENGTH}}}")
_SHOWN = 5
CACHE_TASKS = ("cache", "classification_cache")
"""Tasks of runs that build a cache."""
WITHOUT_MODEL = ("evaluate", *CACHE_TASKS)
"""Tasks of runs that train nothing."""


def run_id(name: str) -> str:
    """Returns the id in a resource name `runs/{run}`."""
    return name.removeprefix("runs/")


def find_run(wanted: str, newest_first: Callable[[], Iterable[str]], *, kind: str = "run") -> str:
    """Returns the resource name `runs/{run}` of the run that `wanted` identifies.

    `newest_first` lists the names of all runs; it is called only for a prefix or `latest`, which may be the newest of one `kind`.
    Raises StillhouseError: RUN_NOT_FOUND, or INVALID_REQUEST for an invalid or ambiguous id.
    """
    text = run_id(wanted.strip())
    if text == LATEST:
        for name in newest_first():
            return name
        raise StillhouseError(
            Reason.RUN_NOT_FOUND, f"there is no {kind} yet; `stillhouse run create FILE` creates one."
        )
    if not _PREFIX.fullmatch(text):
        raise usage_error(
            f'"{wanted}" is not a run id: give one of {ID_LENGTH} characters of a-z and 2-7, a prefix of one, or '
            f'"{LATEST}"; `stillhouse run list` shows them.'
        )
    if len(text) == ID_LENGTH:
        return f"runs/{text}"
    found = [name for name in newest_first() if run_id(name).startswith(text)]
    if not found:
        raise StillhouseError(
            Reason.RUN_NOT_FOUND,
            f'no run\'s id begins with "{text}"; `stillhouse run list` shows the runs.',
            resource=f"runs/{text}",
        )
    if len(found) > 1:
        shown = ", ".join(run_id(name) for name in found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
        raise usage_error(f'"{text}" matches {len(found)} runs ({shown}); give more characters.')
    return found[0]
