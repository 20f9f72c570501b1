"""Who calls: token, else certificate, else the name that the caller gives, else where it calls from."""

from __future__ import annotations

import hashlib
from typing import Any

from protos.channel import CLIENT_NAME_KEY

MAX_NAME_CHARS = 128
_TOKEN_KEY = "authorization"  # noqa: S105 - the name of a header
_SUBJECT_KEYS = ("x509_subject", "x509_common_name")


def client_of(context: Any) -> str:
    """The client that a call counts for. Names of one kind never meet those of another; no token can be read from one."""
    metadata = dict(context.invocation_metadata() or ())
    token = metadata.get(_TOKEN_KEY)
    if token:
        return f"token:{hashlib.sha256(_bytes(token)).hexdigest()[:16]}"
    certificate = context.auth_context()
    for key in _SUBJECT_KEYS:
        for subject in certificate.get(key, ()):
            return f"certificate:{_text(subject)}"
    name = metadata.get(CLIENT_NAME_KEY)
    if name:
        return f"name:{_text(name)}"
    return f"peer:{_host(context.peer())}"


def _host(peer: str) -> str:
    """A peer without its port: more connections do not make more clients."""
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def _text(value: str | bytes) -> str:
    return _bytes(value).decode(errors="replace")[:MAX_NAME_CHARS]
