"""One signed POST, as Standard Webhooks has it: to an address that was looked at, without redirects or proxies."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from stillhouse.student_trainer.runs.webhooks.hosts import WebhookHost

TIMEOUT_S = 10.0
"""For a whole post, from the connection to the status."""
MAX_LOOK_UPS = 16
"""Look-ups of names at a time, those that hang after their post included."""
_LOOK_UPS = threading.BoundedSemaphore(MAX_LOOK_UPS)
_GONE = 410
_IPV4_INSIDE = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "::/96")))
"""NAT64 (RFC 6052) and IPv4-compatible addresses: the last 32 bits are an IPv4 address."""
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")


class DeliveryError(Exception):
    """A post that was not accepted; the message says why."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final
        """True if the receiver wants no more."""


def post(url: str, host: WebhookHost, message_id: str, body: bytes, *, now_s: int) -> None:
    """Posts `body`, and returns once the receiver has accepted it with a status of 2xx. Blocks.

    Raises:
        DeliveryError: it was not accepted, or its name stands for an address that `host` does not allow.
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    connection = http.client.HTTPConnection(str(parts.hostname), port, timeout=TIMEOUT_S)
    ends_s = time.monotonic() + TIMEOUT_S
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {
        "Host": parts.netloc,
        "Content-Type": "application/json",
        "User-Agent": "stillhouse",
        "Connection": "close",
        "webhook-id": message_id,
        "webhook-timestamp": str(now_s),
        "webhook-signature": signature(host.secret, message_id, now_s, body),
    }
    try:
        connection.sock = _connected(str(parts.hostname), port, host, ends_s)
        with _cut_off(connection.sock, ends_s):
            if parts.scheme == "https":
                context = ssl.create_default_context()
                connection.sock = context.wrap_socket(connection.sock, server_hostname=parts.hostname)
            connection.request("POST", path, body=body, headers=headers)
            status = connection.getresponse().status
    except (OSError, http.client.HTTPException, ValueError) as error:
        # ValueError: what cannot be a domain name.
        why = f"cannot be reached ({str(error)[:200] or type(error).__name__})"
        if time.monotonic() >= ends_s:
            why = f"gives no answer in {TIMEOUT_S:g} s"
        raise DeliveryError(f"{parts.netloc} {why}") from error
    finally:
        connection.close()
    if not 200 <= status < 300:
        raise DeliveryError(f"{parts.netloc} answered {status}", final=status == _GONE)


def signature(secret: bytes, message_id: str, now_s: int, body: bytes) -> str:
    """The header `webhook-signature`: base64 of the HMAC-SHA256 of id, time and body."""
    signed = f"{message_id}.{now_s}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode()


@contextmanager
def _cut_off(connection: socket.socket, ends_s: float) -> Iterator[None]:
    """Ends the connection at a time of the monotonic clock: a socket's timeout bounds each read alone."""
    handle = connection.dup()  # stays valid while TLS takes the socket over

    def cut() -> None:
        with suppress(OSError):  # it has ended
            handle.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, ends_s - time.monotonic()), cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        handle.close()


def _connected(name: str, port: int, host: WebhookHost, ends_s: float) -> socket.socket:
    """A connection to an address of `name`: the one that was checked, so that a name cannot change in between."""
    last: OSError = OSError("it has no address")
    for found in _looked_up(name, port, ends_s):
        address = ipaddress.ip_address(found.partition("%")[0])
        if not host.private and not _is_public(address):
            raise DeliveryError(
                f"{name} stands for {address}, which is no public address; its entry in the file of --webhooks may say "
                "private = true"
            )
        try:
            left_s = max(0.01, ends_s - time.monotonic())
            return socket.create_connection((str(address), port), timeout=left_s)
        except OSError as error:
            last = error
    raise last


def _looked_up(name: str, port: int, ends_s: float) -> list[str]:
    """The addresses of `name`; OSError for none, TimeoutError at a time of the monotonic clock.

    A thread asks the C library, whose look-up has no deadline and cannot be cut off; it may end after the post.
    """
    turns = _LOOK_UPS
    if not turns.acquire(timeout=max(0.0, ends_s - time.monotonic())):
        raise TimeoutError(f"{MAX_LOOK_UPS} look-ups of names hang")
    answer: Future[list[str]] = Future()

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
            answer.set_result([str(place[0]) for *_, place in entries])
        except (OSError, ValueError) as error:  # ValueError: what cannot be a domain name
            answer.set_exception(error)
        finally:
            turns.release()

    threading.Thread(target=look_up, name="webhook's name", daemon=True).start()
    return answer.result(max(0.0, ends_s - time.monotonic()))


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """True if the address is global, and so is the IPv4 address that it holds, which a gateway or the kernel may go on to."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast
    if address in _LOCAL_NAT64 or address.is_site_local:
        return False
    inner = address.ipv4_mapped or address.sixtofour
    if inner is None and any(address in network for network in _IPV4_INSIDE):
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if inner is not None:
        return _is_public(inner)
    return address.is_global and not address.is_multicast
