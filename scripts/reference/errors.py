"""docs/reference/errors.md, from the catalog in protos/errors.py."""

from scripts.reference.markdown import NOTE, table
from stillhouse.client.core.errors import explain
from stillhouse.protos.errors import CATALOG, DOMAIN, Reason, StillhouseError


def page() -> str:
    """The page."""
    rows = []
    for code, reasons in CATALOG.items():
        for reason in reasons:
            meaning, remedy = explain(reason)
            retry = "yes" if StillhouseError(Reason(reason), "").retryable else ""
            rows.append((f"`{reason}`", f"`{code.name}`", meaning, remedy, retry))
    return (
        f"{NOTE}\n# Errors\n\n"
        "An error crosses the wire as `google.rpc.Status`. Its message names value, limit and remedy; its detail `ErrorInfo` "
        f"has one of these reasons, in the domain `{DOMAIN}`. `BadRequest` lists each wrong field, `RetryInfo` the time to "
        "wait. A call that may be repeated without a change is marked.\n\n"
        + table(("Reason", "gRPC code", "Meaning", "Remedy", "Repeat"), rows)
    )
