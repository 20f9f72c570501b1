"""HTTP/2 written by hand, well enough to be wrong on purpose: frames, headers, and gRPC messages with lying lengths."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS = 1, 4


def frame(
    kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0, length: int | None = None
) -> bytes:
    """One frame; `length` may lie."""
    size = len(payload) if length is None else length
    return (
        struct.pack(">I", size & 0xFFFFFF)[1:]
        + struct.pack(">BBI", kind, flags, stream & 0xFFFFFFFF)
        + payload
    )


def headers(path: str, extra: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """A header block for a gRPC call, every field literal."""
    fields = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode()),
        (b":authority", b"a"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        *extra,
    ]
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in fields)


def message(data: bytes, *, length: int | None = None, compressed: int = 0) -> bytes:
    """A gRPC message; `length` may lie."""
    return struct.pack(">BI", compressed, len(data) if length is None else length) + data


def attack(path: str, rng: random.Random) -> bytes:
    """Bytes that one hostile connection sends."""
    return rng.choice(ATTACKS)(path, rng)


def _text(value: bytes) -> bytes:
    if len(value) < 127:
        return bytes([len(value)]) + value
    rest, out = len(value) - 127, bytearray([127])
    while rest > 127:
        out.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*out, rest]) + value


def _begun(path: str, *, stream: int = 1) -> bytes:
    """A connection with one call open."""
    opened = frame(HEADERS, headers(path), flags=END_HEADERS, stream=stream)
    return PREFACE + frame(SETTINGS) + opened


def _noise(_path: str, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((1, 24, 500, 20_000)))


def _other_protocol(_path: str, rng: random.Random) -> bytes:
    return rng.choice(
        (
            b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\nx",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(40),  # TLS
            b"SSH-2.0-x\r\n",
            PREFACE[: rng.randrange(len(PREFACE))],
            PREFACE * 3,
        )
    )


def _frames(path: str, rng: random.Random) -> bytes:
    """Frames of every kind, with any flags, on any stream."""
    out = _begun(path) if rng.random() < 0.6 else PREFACE
    for _ in range(rng.randrange(1, 30)):
        payload = rng.randbytes(rng.choice((0, 1, 4, 5, 6, 8, 9, 60, 4000)))
        length = rng.choice((None, None, None, 0, 2**24 - 1, len(payload) + 1))
        stream = rng.choice((0, 1, 1, 2, 3, 5, 2**31 - 1, 2**31))
        kind = rng.choice((*range(10), 10, 77, 255))
        out += frame(kind, payload, flags=rng.randrange(256), stream=stream, length=length)
    return out


def _lying_message(path: str, rng: random.Random) -> bytes:
    """A message that claims up to 4 GiB, or is compressed by nobody's rule."""
    length = rng.choice((0, 1, 10**9, 2**31 - 1, 2**32 - 1, 33 * 2**20))
    body = message(
        rng.randbytes(rng.choice((0, 5, 300))), length=length, compressed=rng.choice((0, 1, 2, 255))
    )
    ends = END_STREAM if rng.random() < 0.5 else 0
    return _begun(path) + frame(DATA, body, flags=ends, stream=1)


def _bad_headers(path: str, rng: random.Random) -> bytes:
    """Header blocks that cannot be, or must not be."""
    block = rng.choice(
        (
            rng.randbytes(rng.choice((1, 9, 80))),
            b"\xff\xff\xff\xff\xff\xff\x7f",  # an index without an end
            headers(path)[: rng.randrange(10, 60)],
            headers(path, [(b":path", b"/again")]),
            headers("", [(b"UPPER", b"x")]),
            headers("/" + "x" * 9000),
            headers(path, [(b"grpc-timeout", rng.choice((b"-1S", b"99999999999S", b"x", b"")))]),
            headers(path, [(b"authorization", b"Bearer " + b"a" * rng.choice((0, 5, 70_000)))]),
            headers(path, [(b"stillhouse-client", b"\xff\0\n")]),
            headers(path, [(b"grpc-encoding", rng.choice((b"gzip", b"br", b"")))]),
            headers(path, [(b"traceparent", rng.randbytes(20))]),
            headers(path, [(f"k{number}".encode(), b"v" * 100) for number in range(900)]),
        )
    )
    opened = frame(HEADERS, block[:16000], flags=END_HEADERS, stream=1)
    return PREFACE + frame(SETTINGS) + opened + frame(DATA, message(b""), flags=END_STREAM, stream=1)


def flood(path: str, rng: random.Random) -> bytes:
    """Many small frames that each ask for work."""
    kind = rng.randrange(6)
    count = rng.choice((50, 1000))
    if kind == 0:  # calls that are cancelled as soon as they are open
        return (
            PREFACE
            + frame(SETTINGS)
            + b"".join(
                frame(HEADERS, headers(path), flags=END_HEADERS, stream=2 * number + 1)
                + frame(RST_STREAM, struct.pack(">I", 8), stream=2 * number + 1)
                for number in range(count)
            )
        )
    if kind == 1:
        first = frame(HEADERS, headers(path)[:20], stream=1)
        return PREFACE + frame(SETTINGS) + first + frame(CONTINUATION, b"\0\1a\1b", stream=1) * count
    small = {
        2: frame(PING, bytes(8)),
        3: frame(SETTINGS, struct.pack(">HI", rng.randrange(1, 8), rng.randrange(2**32))),
        4: frame(WINDOW_UPDATE, struct.pack(">I", rng.choice((0, 1, 2**31 - 1))), stream=rng.choice((0, 1))),
        5: frame(DATA, b"", stream=1),
    }
    return _begun(path) + small[kind] * count


ATTACKS: Sequence[Callable[[str, random.Random], bytes]] = (
    _noise,
    _other_protocol,
    _frames,
    _frames,
    _lying_message,
    _bad_headers,
    flood,
)
