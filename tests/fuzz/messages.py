"""Structure-aware mutation: walks the descriptors of messages, so that a new field cannot be forgotten, and counts structures."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, cast

from google.protobuf.internal import encoder
from google.protobuf.message import Message

from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from tests.fuzz.values import class_of, hostile

MAX_DEPTH = 5
REPEATS = (0, 1, 2, 2, 3, 5, 17, 70)
FEW = (0, 1, 1, 2, 3)
"""Counts of messages within messages."""
MANY = (300, 1100)
"""Seldom, so many elements; they cost time."""


def arbitrary(kind: type[Message], rng: random.Random, words: Sequence[str], depth: int = 0) -> Any:
    """A message of this kind with about a third of its fields set to anything."""
    message = kind()
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.35:
            _set(message, field, rng, words, depth)
    return message


def mutate(message: Message, rng: random.Random, words: Sequence[str]) -> None:
    """Changes one to four places of the message, wherever they lie."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        place = rng.choice(list(_messages(message)))
        if isinstance(place, Tensor) and rng.random() < 0.8:
            lie(place, rng)
            continue
        fields = place.DESCRIPTOR.fields
        if not fields or rng.random() < 0.04:
            _add_unknown(place, rng)
            continue
        present = [field for field, _ in place.ListFields()]
        draw = rng.random()
        if present and draw < 0.2:
            place.ClearField(rng.choice(present).name)
        elif present and draw < 0.3:
            _repeat(place, rng.choice(present), rng)
        else:
            chosen = rng.choice(present) if present and draw < 0.6 else rng.choice(fields)
            _set(place, chosen, rng, words, depth=1)


def lie(tensor: Tensor, rng: random.Random) -> None:
    """Makes type, shape, width and data of a tensor disagree, or agree in an unusual way."""
    match rng.randrange(7):
        case 0:
            tensor.dtype = cast("Any", rng.choice([*Tensor.DataType.values(), 7, 99, -1]))
        case 1:
            sizes = (0, 1, -1, 2, 5, 2**31, 2**62, 10**9, -(2**63), 2**63 - 1)
            tensor.shape[:] = [rng.choice(sizes) for _ in range(rng.randrange(5))]
        case 2:
            tensor.data = rng.randbytes(rng.choice((0, 1, 3, 4, 5, 8, 64, 1000)))
        case 3:
            tensor.bits = rng.choice((0, 1, 9, 31, 32, 33, -1, 2**31 - 1))
        case 4:
            count = rng.choice((0, 1, 2, 9, 33, 64, 65, 200))
            tensor.dtype, tensor.bits = Tensor.DATA_TYPE_INT32, 0
            tensor.shape[:] = [count]
            limit = rng.choice((10, 300, 400, 2**31))
            tensor.data = b"".join(
                rng.randrange(limit).to_bytes(4, "little", signed=False) for _ in range(count)
            )
        case 5:
            tensor.data = tensor.data[: rng.randrange(len(tensor.data) + 1)]
        case _:
            del tensor.shape[rng.randrange(len(tensor.shape) + 1) :]


def structure(message: Message) -> int:
    """The same for messages with the same fields set, in values of the same classes, to the same depth."""
    return hash(_shape(message))


def kind_of(field: Any) -> type[Message]:
    """The class of a field's messages."""
    return field.message_type._concrete_class  # type: ignore[no-any-return]


def is_map(field: Any) -> bool:
    """True for a map."""
    return bool(field.message_type is not None and field.message_type.GetOptions().map_entry)


def _messages(message: Message) -> Iterator[Any]:
    """The message and all that it holds."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is None or is_map(field):
            continue
        for each in value if field.is_repeated else (value,):
            yield from _messages(each)


def _set(message: Any, field: Any, rng: random.Random, words: Sequence[str], depth: int) -> None:
    """Gives the field a value, whatever it had."""
    message.ClearField(field.name)
    if is_map(field):
        target = getattr(message, field.name)
        parts = field.message_type.fields_by_name
        for _ in range(rng.choice(REPEATS)):
            target[hostile(parts["key"], rng, words)] = hostile(parts["value"], rng, words)
    elif field.is_repeated:
        target = getattr(message, field.name)
        few = REPEATS if field.message_type is None or depth == 0 else FEW
        for _ in range(rng.choice(MANY if depth <= 1 and rng.random() < 0.01 else few)):
            if field.message_type is None:
                target.append(hostile(field, rng, words))
            elif depth < MAX_DEPTH:
                target.add().CopyFrom(arbitrary(kind_of(field), rng, words, depth + 1))
    elif field.message_type is None:
        setattr(message, field.name, hostile(field, rng, words))
    else:
        child = getattr(message, field.name)
        child.SetInParent()
        if depth < MAX_DEPTH:
            child.CopyFrom(arbitrary(kind_of(field), rng, words, depth + 1))
        if isinstance(child, Tensor):
            lie(child, rng)


def _repeat(message: Any, field: Any, rng: random.Random) -> None:
    """Has a repeated field's elements again and again, or in another order."""
    if not field.is_repeated or is_map(field):
        return
    target = getattr(message, field.name)
    copies = list(target)
    rng.shuffle(copies)
    for each in (copies * rng.choice((1, 2, 40)))[:1100]:
        if field.message_type is None:
            target.append(each)
        else:
            target.add().CopyFrom(each)


def _add_unknown(message: Message, rng: random.Random) -> None:
    """A field that no version knows."""
    number = rng.choice((15, 16, 999, 18999, 2**29 - 1))
    tag = encoder.TagBytes(number, 2)
    message.MergeFromString(tag + bytes([5]) + b"other")


def _shape(message: Message) -> Any:
    parts = []
    for field, value in message.ListFields():
        if is_map(field):
            shape: Any = frozenset((class_of(key), class_of(each)) for key, each in value.items())
        elif field.is_repeated:
            each_shape = _shape if field.message_type is not None else class_of
            shape = len(value).bit_length(), frozenset(each_shape(each) for each in value)
        elif field.message_type is not None:
            shape = _shape(value)
        elif field.enum_type is not None:
            shape = value
        else:
            shape = class_of(value)
        parts.append((field.number, shape))
    return tuple(parts)
