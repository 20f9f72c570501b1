"""Host and Origin of requests: a page of another site, or of a name that was rebound to this address, gets nothing."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers

from stillhouse.client.web.security.callers import SAFE_METHODS
from stillhouse.protos.errors import Reason, StillhouseError

_OWN_SITES = ("same-origin", "none")


def check_origin(method: str, headers: Headers, host_names: Collection[str]) -> None:
    """Raises StillhouseError(PERMISSION_DENIED) for a foreign Host, and for a change that another origin asks for.

    Addresses are accepted beside `host_names`: a name is needed to rebind.
    """
    hosts = headers.getlist("host")
    host = hosts[0] if len(hosts) == 1 else ""
    name = _name_of(host)
    if name not in host_names and not _is_address(name):
        raise StillhouseError(
            Reason.PERMISSION_DENIED,
            f"This server does not answer to the name {name[:80]!r}; use its address, or start it with --host {name[:80]}.",
        )
    if method in SAFE_METHODS:
        return
    origin = headers.get("origin")
    is_own = origin is None or origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")
    if not is_own or headers.get("sec-fetch-site", "none") not in _OWN_SITES:
        raise StillhouseError(
            Reason.PERMISSION_DENIED,
            f"A page of {str(origin)[:80]!r} asks for a change here; only pages of this server may.",
        )


def _name_of(host: str) -> str:
    """The name in `NAME`, `NAME:PORT` and `[ADDRESS]:PORT`."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
