"""API key of the upstream server, from a file, the environment or a service manager's credentials; shown nowhere."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.channel import is_loopback
from stillhouse.protos.settings import bad_setting

VARIABLE = "STILLHOUSE_UPSTREAM_API_KEY"
"""Environment variable that may hold the key."""
CREDENTIAL = "upstream-api-key"
"""Name of the file in `$CREDENTIALS_DIRECTORY`, where systemd puts what LoadCredential names."""
MAX_KEY_BYTES = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Upstream:
    """Address of the upstream server, and the key for it."""

    url: str
    """Such as "http://127.0.0.1:8000": scheme, host, port and a path without /v1, never a key."""
    key: str = field(default="", repr=False)
    """Sent as a bearer token; empty sends none."""

    def redact(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self.key, "***") if self.key else text


def read_upstream(url: str, key_file: Path | None, *, insecure: bool) -> Upstream:
    """Reads address and key. The file comes first, then the variable, then the service manager's credential.

    Raises:
        StillhouseError: INVALID_CONFIG for an address that is not http or https or holds a user, a key file that cannot be
            used, and a key that would travel to another host without TLS.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise bad_setting("--upstream", url, f"It is not an address: {error}.") from error
    if parts.username is not None or parts.password is not None:
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            f"--upstream holds a user or a password, which logs would show. Put the key into a file and name it by "
            f"--upstream-key-file, or into {VARIABLE}.",
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise bad_setting("--upstream", url, "Give an address such as http://gpu-host:8000.")
    key = _key(key_file)
    reached = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    if key and parts.scheme == "http" and not insecure and not is_loopback(f"{reached}:{port or 80}"):
        raise bad_setting(
            "--upstream",
            url,
            "The API key would travel without TLS. Give an https address, or allow it with --insecure.",
        )
    path = parts.path.rstrip("/").removesuffix("/v1")
    return Upstream(url=f"{parts.scheme}://{parts.netloc}{path}", key=key)


def _key(path: Path | None) -> str:
    if path is None and (value := os.environ.get(VARIABLE)):
        return _checked(value.encode(), VARIABLE)
    if path is None:
        folder = os.environ.get("CREDENTIALS_DIRECTORY")
        path = Path(folder) / CREDENTIAL if folder else None
        if path is None or not path.is_file():
            return ""
        return _checked(_content(path), str(path))
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise bad_setting("--upstream-key-file", path, f"It cannot be read ({error.strerror}).") from error
    if mode & 0o077:
        raise bad_setting(
            "--upstream-key-file",
            path,
            f"Others on this host can reach it (mode {mode:o}): run `chmod 600 {path}`.",
        )
    return _checked(_content(path), str(path))


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise bad_setting("--upstream-key-file", path, f"It cannot be read ({error.strerror}).") from error


def _checked(value: bytes, where: str) -> str:
    text = value.strip()
    if not text or len(value) > MAX_KEY_BYTES or not all(33 <= byte < 127 for byte in text):
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            f"{where} must hold one line of at most {MAX_KEY_BYTES} bytes of ASCII, the API key, and nothing else.",
        )
    return text.decode("ascii")
