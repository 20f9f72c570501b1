"""Serialised messages that are damaged as bytes: cut, flipped, spliced, with lying lengths; and what is left of their structure."""

from __future__ import annotations

import random

MAX_FIELDS = 24


def damage(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to three faults."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(out) + 1)
        draw = rng.randrange(6)
        if draw == 0:
            del out[at:]
        elif draw == 1 and out:
            for _ in range(rng.choice((1, 1, 4))):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        elif draw == 2:
            _nest(out, rng)
        else:
            out[at:at] = _foreign(rng)
    return bytes(out)


def _foreign(rng: random.Random) -> bytes:
    """Something that does not belong there."""
    number = rng.randrange(1, 16)
    return rng.choice(
        (
            rng.randbytes(rng.choice((1, 2, 9))),
            b"\xff" * rng.choice((9, 10, 11)) + b"\x01",  # a number without an end
            bytes([number << 3 | 2]) + b"\xff\xff\xff\xff\x07",  # 2 GiB to come
            bytes([number << 3 | rng.choice((3, 4, 6, 7))]),  # groups, and types that there are not
            bytes([number << 3 | 2, 3]) + b"\xff\xc0\x80",  # no UTF-8
        )
    )


def _nest(out: bytearray, rng: random.Random) -> None:
    """Puts everything into a message within a message, deeper than readers go."""
    tag = bytes([rng.randrange(1, 16) << 3 | 2])
    for _ in range(rng.choice((3, 60, 120))):
        if len(out) > 4000:
            return
        out[0:0] = tag + _varint(len(out))


def outline(data: bytes) -> int:
    """The same for bytes with the same first fields: numbers, wire types and sizes of lengths, up to where it breaks."""
    shape: list[tuple[int, ...]] = []
    at = 0
    while at < len(data) and len(shape) < MAX_FIELDS:
        tag, at = _read(data, at)
        if tag is None:
            shape.append((-1,))
            break
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _read(data, at)
            shape.append((number, 0, -1 if value is None else value.bit_length() // 4))
        elif kind == 2:
            size, at = _read(data, at)
            shape.append((number, 2, -1 if size is None else size.bit_length()))
            at += size or 0
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
            shape.append((number, kind))
        else:
            shape.append((number, kind, -1))
            break
    return hash((tuple(shape), at > len(data)))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _read(data: bytes, at: int) -> tuple[int | None, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
        shift += 7
    return None, len(data)
