"""Identity of a client for limits and fair shares: token, else certificate, else the name it sends, else its host."""

from __future__ import annotations

from typing import Any

from stillhouse.protos.rpc.auth import current_caller
from stillhouse.protos.rpc.channel import CLIENT_NAME_KEY

MAX_NAME_CHARS = 128


def client_of(context: Any) -> str:
    """The client that a call counts for; the prefix keeps proved names apart from those that clients choose."""
    proved = current_caller().name
    if proved:
        return f"proved:{proved}"
    name = dict(context.invocation_metadata() or ()).get(CLIENT_NAME_KEY)
    if name:
        text = name.decode(errors="replace") if isinstance(name, bytes) else name
        return f"name:{text[:MAX_NAME_CHARS]}"
    return f"peer:{_host(context.peer())}"


def _host(peer: str) -> str:
    """A peer without its port, so that more connections do not make more clients."""
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer
