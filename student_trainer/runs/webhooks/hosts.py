"""Hosts that webhooks may go to, each with the secret that signs for it: a TOML file of the operator, mode 0600."""

from __future__ import annotations

import base64
import binascii
import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from stillhouse.protos.errors import Reason, StillhouseError

SECRET_PREFIX = "whsec_"  # noqa: S105 - what precedes secrets in Standard Webhooks
LEAST_SECRET_BYTES, MOST_SECRET_BYTES = 24, 64
MAX_FILE_BYTES = 1 << 20
_KEYS = frozenset({"secret", "http", "private"})
_PORTS = {"https": 443, "http": 80}


@dataclass(frozen=True, kw_only=True, slots=True)
class WebhookHost:
    """One host, or host and port, that may be posted to."""

    secret: bytes = field(repr=False)
    http: bool = False
    """Plain HTTP is allowed."""
    private: bool = False
    """Addresses of private networks and of this machine are allowed."""


class WebhookHosts:
    """The file's entries; a changed file counts from the next look-up on. Without a file no host is allowed."""

    def __init__(self, path: Path | None) -> None:
        """Raises StillhouseError(INVALID_CONFIG) if the file cannot be used."""
        self._path = path
        if path is not None:
            _read(path)

    def find(self, url: str) -> WebhookHost:
        """The entry of the host of `url`.

        Raises:
            StillhouseError: INVALID_REQUEST, with a sentence, if none may be posted to; INVALID_CONFIG for the file.
        """
        parts = _parts(url)
        hosts = {} if self._path is None else _read(self._path)
        host = hosts.get(f"{parts.hostname}:{parts.port or _PORTS[parts.scheme]}") or hosts.get(
            str(parts.hostname) if parts.port in (None, _PORTS[parts.scheme]) else ""
        )
        if host is None:
            raise _refused(
                f"this service posts nothing to {parts.netloc}; its operator allows hosts in the file of --webhooks."
            )
        if parts.scheme == "http" and not host.http:
            raise _refused(
                f"{parts.netloc} is reached by https alone; its entry in the file of --webhooks may say http = true."
            )
        return host


def _parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise _refused(
            f"{url[:200]!r} is not a URL ({error}); give one such as https://example.org/hook."
        ) from error
    plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in _PORTS or not parts.hostname or "@" in parts.netloc or parts.fragment or not plain:
        raise _refused(
            f"{url[:200]!r} is not such a URL as https://example.org/hook, without user, fragment and blanks."
        )
    return parts


def _read(path: Path) -> Mapping[str, WebhookHost]:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    if mode & 0o077:
        raise _unusable(path, f"others on this host can reach it (mode {mode:o}); run `chmod 600 {path}`")
    try:
        return _entries(tomllib.loads(content.decode()))
    except (ValueError, TypeError, AttributeError) as error:
        raise _unusable(path, str(error)) from error


def _entries(document: Mapping[str, Any]) -> Mapping[str, WebhookHost]:
    if set(document) - {"hosts"}:
        raise ValueError("it may have tables [hosts.NAME] alone")
    return {name.lower(): _entry(name, values) for name, values in document.get("hosts", {}).items()}


def _entry(name: str, values: Mapping[str, Any]) -> WebhookHost:
    unknown = set(values) - _KEYS
    if unknown:
        raise ValueError(f'[hosts."{name}"] has {sorted(unknown)[0]!r}; valid are {", ".join(sorted(_KEYS))}')
    text = str(values.get("secret", ""))
    try:
        secret = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error:
        secret = b""
    if not text.startswith(SECRET_PREFIX) or not LEAST_SECRET_BYTES <= len(secret) <= MOST_SECRET_BYTES:
        raise ValueError(
            f'the secret of [hosts."{name}"] must be {SECRET_PREFIX} and base64 of {LEAST_SECRET_BYTES} to '
            f"{MOST_SECRET_BYTES} random bytes"
        )
    flags = {key: values.get(key, False) for key in ("http", "private")}
    if not all(isinstance(each, bool) for each in flags.values()):
        raise ValueError(f'http and private of [hosts."{name}"] are true or false')
    return WebhookHost(secret=secret, **flags)


def _refused(sentence: str) -> StillhouseError:
    return StillhouseError(Reason.INVALID_REQUEST, sentence)


def _unusable(path: Path, why: str) -> StillhouseError:
    return StillhouseError(Reason.INVALID_CONFIG, f"The webhooks file {path} cannot be used: {why}.")
