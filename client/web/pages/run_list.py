"""The filter of the list of runs, which the run service applies."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlencode

from starlette.datastructures import QueryParams

from stillhouse.client.web.api.messages import check_names, enum_names, invalid
from stillhouse.protos.stillhouse.v1.run_pb2 import ListRunsRequest, Run

PAGE_RUNS = 25
"""Of one page: a browser lays more of them out for longer than the service needs to find them."""
STATES: dict[str, str] = enum_names(Run.State.DESCRIPTOR)


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
    def chooses(self) -> bool:
        """True if it may leave runs out."""
        return bool(self.state or self.label or self.text)

    @property
    def request(self) -> ListRunsRequest:
        """Asks the run service for the page."""
        return ListRunsRequest(
            page_size=PAGE_RUNS,
            page_token=self.page_token,
            states=[Run.State.Value(STATES[self.state])] if self.state else [],
            labels=[self.label] if self.label else [],
            text=self.text,
        )

    def query(self, page_token: str = "") -> str:
        """The query of the page of this filter that begins at `page_token`."""
        values = {"state": self.state, "label": self.label, "text": self.text, "page_token": page_token}
        return urlencode({name: value for name, value in values.items() if value})


def filter_of(query: QueryParams) -> RunFilter:
    """The filter that a query asks for. Raises StillhouseError(INVALID_REQUEST)."""
    check_names(query, ("state", "label", "text", "page_token"))
    values = {name: query.get(name, "").strip() for name in ("state", "label", "text")}
    if values["state"] and values["state"] not in STATES:
        raise invalid("state", f"{values['state'][:40]!r} is none of {', '.join(STATES)}.")
    return RunFilter(**values, page_token=query.get("page_token", ""))
