"""Sessions of browsers: kept in memory alone, so that a restart signs everybody out."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass, field

LIFETIME_S = 12 * 3600.0
MAX_SESSIONS = 10_000
COOKIE = "stillhouse_session"


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """A browser that has signed in."""

    token: str | None = field(repr=False)
    """The token that it signed in with; None for the server's own credentials."""
    csrf_token: str = field(repr=False)
    """Repeated in a header of every request that changes something."""
    expire_s: float
    """On the monotonic clock."""
    ended: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    """Set when it is signed out: its streams close."""

    @property
    def over(self) -> bool:
        """True once it is signed out or too old."""
        return self.ended.is_set() or time.monotonic() > self.expire_s

    def has_csrf_token(self, given: str) -> bool:
        """Compares in constant time."""
        return hmac.compare_digest(self.csrf_token.encode(), given.encode("utf-8", "replace"))


class Sessions:
    """All sessions, by the digest of the cookie's value."""

    def __init__(self) -> None:
        self._by_digest: dict[str, Session] = {}

    def start(self, token: str | None) -> tuple[str, Session]:
        """A session, and the value of its cookie; the oldest ends if there are too many."""
        value = secrets.token_urlsafe(32)
        session = Session(
            token=token, csrf_token=secrets.token_urlsafe(32), expire_s=time.monotonic() + LIFETIME_S
        )
        for digest in [key for key, each in self._by_digest.items() if each.over]:
            self._end(digest)
        while len(self._by_digest) >= MAX_SESSIONS:
            self._end(next(iter(self._by_digest)))
        self._by_digest[_digest(value)] = session
        return value, session

    def find(self, value: str) -> Session | None:
        """The session of a cookie; None if it is unknown or over."""
        session = self._by_digest.get(_digest(value))
        if session is None or session.over:
            self._end(_digest(value))
            return None
        return session

    def end(self, value: str) -> None:
        """Signs out."""
        self._end(_digest(value))

    def _end(self, digest: str) -> None:
        session = self._by_digest.pop(digest, None)
        if session is not None:
            session.ended.set()


def _digest(value: str) -> str:
    return hashlib.sha256(value.encode("utf-8", "replace")).hexdigest()
