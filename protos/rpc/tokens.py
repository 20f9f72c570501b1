"""Tokens file: name, scopes, expiry and SHA-256 of each token; a token itself is shown once and never stored."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import atomic_writer
from stillhouse.protos.files.locks import directory_lock

VERSION = 1
PREFIX = "sth"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
MAX_FILE_BYTES = 4 * 2**20
_ID_BYTES, _SECRET_BYTES = 5, 32
_NO_DIGEST = hashlib.sha256(b"no token").hexdigest()


class Scope(StrEnum):
    """Scope of a token."""

    INFER = "infer"
    """Query a teacher."""
    SUBMIT = "submit"
    """Submit runs, read all, and control those that the same token submitted."""
    ADMIN = "admin"
    """Everything, adapters and other clients' runs included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """Entry of a token in the file."""

    id: str
    """8 characters of a-z and 2-7, the second part of the token."""
    name: str
    """Name of the holder, for logs, quotas and the audit log."""
    scopes: frozenset[Scope]
    sha256: str
    """Digest of the complete token. It has 256 random bits, so a slow hash would add no protection."""
    create_time_s: float
    """Seconds since the epoch."""
    expire_time_s: float | None
    """Seconds since the epoch; None: never."""

    def expired(self, now_s: float | None = None) -> bool:
        """True if the token has expired."""
        return self.expire_time_s is not None and self.expire_time_s <= (
            time.time() if now_s is None else now_s
        )

    def allows(self, scope: Scope) -> bool:
        """True if the token grants `scope`."""
        return scope in self.scopes or Scope.ADMIN in self.scopes


def create(
    path: Path, *, name: str, scopes: Collection[Scope], lifetime_s: float | None
) -> tuple[str, Token]:
    """Creates a token, shown only here, and its entry in the file at `path`, created if missing.

    Raises:
        StillhouseError: INVALID_REQUEST for a bad name or lifetime, no scope, or a name that is taken.
    """
    if not NAME.fullmatch(name):
        raise _bad(
            f"{name[:80]!r} is not a valid token name; use at most 64 letters, digits and . _ @ -, such as ci-runner."
        )
    if not scopes:
        raise _bad("A token without a scope is good for nothing; give infer, submit or admin.")
    if lifetime_s is not None and not 0 < lifetime_s <= 100 * 365 * 86400:
        raise _bad(f"A lifetime of {lifetime_s:g} s is outside of (0, 100 years]; give another, or none.")
    now_s = time.time()
    with _locked(path):
        tokens = read(path) if path.exists() else {}
        if any(each.name == name and not each.expired(now_s) for each in tokens.values()):
            raise _bad(f'A token named "{name}" exists; revoke it first, or choose another name.')
        number = base32(secrets.token_bytes(_ID_BYTES))
        secret = f"{PREFIX}_{number}_{secrets.token_urlsafe(_SECRET_BYTES)}"
        token = Token(
            id=number,
            name=name,
            scopes=frozenset(scopes),
            sha256=_digest(secret),
            create_time_s=now_s,
            expire_time_s=None if lifetime_s is None else now_s + lifetime_s,
        )
        _write(path, {**tokens, number: token})
    return secret, token


def revoke(path: Path, which: str) -> list[Token]:
    """Removes and returns the entries with the id or name `which`.

    Raises:
        StillhouseError: NOT_FOUND if there is none.
    """
    with _locked(path):
        tokens = read(path)
        gone = [each for each in tokens.values() if which in (each.id, each.name)]
        if not gone:
            raise StillhouseError(
                Reason.NOT_FOUND,
                f"{path} has no token {which[:80]!r}; `stillhouse token list` shows all.",
            )
        _write(path, {each.id: each for each in tokens.values() if each not in gone})
    return gone


def read(path: Path) -> dict[str, Token]:
    """The entries of the file at `path` by id.

    Raises:
        StillhouseError: INVALID_CONFIG if it cannot be read, is not a tokens file, or others on this host can read it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise _unusable(
                    path, f"others on this host can reach it (mode {mode:o}); run `chmod 600 {path}`"
                )
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    if len(content) > MAX_FILE_BYTES:
        raise _unusable(path, f"it has more than {MAX_FILE_BYTES} bytes")
    try:
        entries = _entries(json.loads(content))
    except (ValueError, TypeError, KeyError) as error:
        raise _unusable(path, f"it is not a tokens file: {error}") from error
    return {each.id: each for each in entries}


def lookup(tokens: Mapping[str, Token], secret: str) -> Token | None:
    """The entry of the token `secret`, expired or not; None if there is none.

    Constant time: an unknown id costs the same comparison as a known one.
    """
    parts = secret.split("_", 2)
    token = tokens.get(parts[1]) if len(parts) == 3 else None
    same = hmac.compare_digest(_digest(secret), token.sha256 if token is not None else _NO_DIGEST)
    return token if same else None


def base32(data: bytes) -> str:
    """`data` in the characters a-z and 2-7."""
    import base64

    return base64.b32encode(data).decode().lower().rstrip("=")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _entries(document: Mapping[str, Any]) -> list[Token]:
    if document["version"] != VERSION:
        raise ValueError(f"its version is {document['version']}, not {VERSION}")
    return [_entry(each) for each in document["tokens"]]


def _entry(value: Mapping[str, Any]) -> Token:
    expire = value["expire_time"]
    token = Token(
        id=str(value["id"]),
        name=str(value["name"]),
        scopes=frozenset(Scope(each) for each in value["scopes"]),
        sha256=str(value["sha256"]),
        create_time_s=datetime.fromisoformat(value["create_time"]).timestamp(),
        expire_time_s=None if expire is None else datetime.fromisoformat(expire).timestamp(),
    )
    if not NAME.fullmatch(token.name) or not re.fullmatch(r"[0-9a-f]{64}", token.sha256):
        raise ValueError(f"entry {token.id[:20]!r} is damaged")
    return token


def time_text(time_s: float) -> str:
    """RFC 3339 in UTC."""
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _write(path: Path, tokens: Mapping[str, Token]) -> None:
    entries = [
        {
            "id": each.id,
            "name": each.name,
            "scopes": sorted(each.scopes),
            "sha256": each.sha256,
            "create_time": time_text(each.create_time_s),
            "expire_time": None if each.expire_time_s is None else time_text(each.expire_time_s),
        }
        for each in tokens.values()
    ]
    text = json.dumps({"version": VERSION, "tokens": entries}, indent=2) + "\n"
    with atomic_writer(path, private=True) as file:
        if path.exists():  # an administrator who revokes tokens leaves the file to the service's user
            with contextlib.suppress(PermissionError):
                os.fchown(file.fileno(), path.stat().st_uid, path.stat().st_gid)
        file.write(text.encode())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Serializes concurrent commands on the file."""
    try:
        with directory_lock(path.parent):
            yield
    except OSError as error:
        why = error.strerror or str(error)
        if not path.parent.is_dir():
            why = f"there is no folder {path.parent}. Name a run service's data directory, which its first start makes, or make it"
        raise _unusable(path, why) from error


def _bad(message: str) -> StillhouseError:
    return StillhouseError(Reason.INVALID_REQUEST, message)


def _unusable(path: Path, why: str) -> StillhouseError:
    return StillhouseError(Reason.INVALID_CONFIG, f"The tokens file {path} cannot be used: {why}.")
