"""Finds runs by state, label and text, page by page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlencode

from starlette.datastructures import QueryParams

from stillhouse.client.trainer.run_lookup import run_id
from stillhouse.client.web.api.messages import check_names, enum_names, invalid
from stillhouse.protos.stillhouse.v1.run_pb2 import ListRunsRequest, ListRunsResponse, Run

PAGE_RUNS = 50
SCAN_RUNS = 250
"""Runs of one request to the service in a search by label or text, which the service does not know."""
MOST_SCANNED = 2500
"""Runs that one page searches through."""
LONGEST_TEXT = 200
STATES: dict[str, str] = enum_names(Run.State.DESCRIPTOR)
List = Callable[[ListRunsRequest], Awaitable[ListRunsResponse]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFilter:
    """Conditions that a listed run meets."""

    state: str = ""
    """Short name such as RUNNING; empty for any."""
    label: str = ""
    """KEY or KEY=VALUE; empty for any."""
    text: str = ""
    """Part of the name, the id or the student's model, in any case; empty for any."""
    page_token: str = ""

    @property
    def searches(self) -> bool:
        """True if runs are chosen here, not by the service."""
        return bool(self.label or self.text)

    def takes(self, run: Run) -> bool:
        """True if `run` has the label and the text."""
        key, has_value, value = self.label.partition("=")
        labels = run.spec.labels
        if self.label and (key not in labels or (has_value and labels[key] != value)):
            return False
        texts = (run_id(run.name), run.spec.display_name, run.effective_spec.student.model)
        wanted = self.text.casefold()
        return any(wanted in each.casefold() for each in texts)

    def query(self, page_token: str = "") -> str:
        """The query of the page of this filter that begins at `page_token`."""
        values = {"state": self.state, "label": self.label, "text": self.text, "page_token": page_token}
        return urlencode({name: value for name, value in values.items() if value})


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPage:
    """A page of the list."""

    runs: list[Run]
    next_token: str
    scanned: int
    """Runs that were looked at."""


def filter_of(query: QueryParams) -> RunFilter:
    """The filter that a query asks for. Raises StillhouseError(INVALID_REQUEST)."""
    check_names(query, ("state", "label", "text", "page_token"))
    values = {name: query.get(name, "").strip() for name in ("state", "label", "text")}
    if values["state"] and values["state"] not in STATES:
        raise invalid("state", f"{values['state'][:40]!r} is none of {', '.join(STATES)}.")
    for name in ("label", "text"):
        if len(values[name]) > LONGEST_TEXT:
            raise invalid(
                name, f"it has {len(values[name])} characters; at most {LONGEST_TEXT} are searched."
            )
    return RunFilter(**values, page_token=query.get("page_token", ""))


async def find_runs(list_runs: List, wanted: RunFilter) -> RunPage:
    """The page of runs that `wanted` asks for. Raises what `list_runs` raises.

    A search ends at the end of the service's page in which it has found PAGE_RUNS, or after MOST_SCANNED runs.
    """
    states = [Run.State.Value(STATES[wanted.state])] if wanted.state else []
    found: list[Run] = []
    token, scanned = wanted.page_token, 0
    while True:
        request = ListRunsRequest(
            page_size=SCAN_RUNS if wanted.searches else PAGE_RUNS, page_token=token, states=states
        )
        response = await list_runs(request)
        found += [run for run in response.runs if wanted.takes(run)]
        scanned += len(response.runs)
        token = response.next_page_token
        if not token or len(found) >= PAGE_RUNS or scanned >= MOST_SCANNED or not wanted.searches:
            return RunPage(runs=found, next_token=token, scanned=scanned)
