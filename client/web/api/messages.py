"""Requests of the contract from queries, paths and bodies; hostile until they are parsed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Collection, Mapping
from typing import Any, cast

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, Request

from stillhouse.protos.errors import FieldViolation, Reason, StillhouseError

MAX_BODY_BYTES = 8 * 2**20
IDLE_S = 60.0
"""Time in which the next bytes of a body must arrive."""
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_DEPTH_ERRORS = (ValueError, RecursionError)


def invalid(field: str, sentence: str) -> StillhouseError:
    """The error of one wrong value."""
    return StillhouseError(
        Reason.INVALID_REQUEST,
        f"{field}: {sentence}" if field else sentence,
        violations=[FieldViolation(field=field, description=sentence)] if field else (),
    )


def integer(field: str, text: str, *, least: int = -(2**63)) -> int:
    """The 64-bit integer that `text` is. Raises StillhouseError(INVALID_REQUEST)."""
    digits = text.removeprefix("-")
    number = int(text) if digits.isascii() and digits.isdecimal() and len(digits) < 20 else None
    if number is None or not least <= number < 2**63:
        raise invalid(field, f"{text[:40]!r} is not an integer from {least} on.")
    return number


def boolean(field: str, text: str) -> bool:
    """The truth value that `text` is. Raises StillhouseError(INVALID_REQUEST)."""
    if text not in _BOOLEANS:
        raise invalid(field, f"{text[:40]!r} is neither true nor false.")
    return _BOOLEANS[text]


def check_names(query: QueryParams, known: Collection[str]) -> None:
    """Raises StillhouseError(INVALID_REQUEST) for a parameter that is not `known`."""
    for name in query:
        if name not in known:
            raise invalid(
                name[:80], f"there is no such parameter; valid are: {', '.join(sorted(known)) or 'none'}."
            )


async def read_body(request: Request, *, limit: int = MAX_BODY_BYTES) -> bytes:
    """The body of a request. Raises StillhouseError: MESSAGE_TOO_LARGE, and as `next_chunk` does."""
    content = bytearray()
    chunks = request.stream()
    while chunk := await next_chunk(chunks):
        content += chunk
        if len(content) > limit:
            raise StillhouseError(
                Reason.MESSAGE_TOO_LARGE, f"The body is larger than {limit} bytes; send less."
            )
    return bytes(content)


async def next_chunk(chunks: AsyncGenerator[bytes, None]) -> bytes:
    """The next bytes of a body that are any; empty at its end. Raises StillhouseError: CALL_TIMEOUT, CANCELLED."""
    try:
        async with asyncio.timeout(IDLE_S):
            async for chunk in chunks:
                if chunk:
                    return chunk
    except TimeoutError:
        raise StillhouseError(
            Reason.CALL_TIMEOUT, f"No byte of the body arrived for {IDLE_S:g} s; send it again."
        ) from None
    except ClientDisconnect:
        raise StillhouseError(Reason.CANCELLED, "The caller hung up.") from None
    return b""


def content_type(request: Request) -> str:
    """The media type of the body, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request, *, limit: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """The JSON object of a body; an empty body is an empty object.

    Raises StillhouseError(INVALID_REQUEST), also for another content type: that of a form crosses origins unasked.
    """
    content = await read_body(request, limit=limit)
    if not content:
        return {}
    kind = content_type(request)
    if kind != "application/json":
        raise invalid("", f"the content type is {kind[:80]!r}; send application/json.")
    return json_object(content)


def json_object(content: bytes) -> dict[str, Any]:
    """The JSON object that `content` is. Raises StillhouseError(INVALID_REQUEST)."""
    try:
        document = json.loads(content)
    except _DEPTH_ERRORS as error:
        raise invalid("", f"the body is not JSON ({error}).") from error
    if not isinstance(document, dict):
        raise invalid("", "the body is not a JSON object.")
    return document


def fill_from_query(message: Message, query: QueryParams, hidden: Collection[str] = ()) -> None:
    """Sets fields of `message` from a query: repeated parameters are lists, enums go by their short names.

    Fields that are `hidden` stand in the path. Raises StillhouseError(INVALID_REQUEST).
    """
    fields = {each.name: each for each in query_fields(message) if each.name not in hidden}
    check_names(query, fields)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        given = query.getlist(name)
        if not given:
            continue
        if len(given) > 1 and not field.is_repeated:
            raise invalid(name, "it is given more than once.")
        parsed = [_value(field, each) for each in given]
        values[name] = parsed if field.is_repeated else parsed[0]
    fill_from_json(message, values)


def fill_from_json(message: Message, values: Mapping[str, Any]) -> None:
    """Sets fields of `message` from JSON values, in snake_case or lowerCamelCase. Raises StillhouseError(INVALID_REQUEST)."""
    try:
        json_format.ParseDict(dict(values), message)
    except (json_format.Error, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise invalid("", f"the request cannot be read: {str(error)[:300]}") from error


def query_fields(message: Message) -> list[FieldDescriptor]:
    """Fields of a request that a query can give: all but messages."""
    fields = cast("list[FieldDescriptor]", message.DESCRIPTOR.fields)
    return [each for each in fields if each.message_type is None]


def _value(field: FieldDescriptor, text: str) -> Any:
    if field.enum_type is not None:
        names = enum_names(field.enum_type)
        if text not in names:
            raise invalid(field.name, f"{text[:40]!r} is none of {', '.join(names)}.")
        return names[text]
    if field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64):
        return integer(field.name, text)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return boolean(field.name, text)
    return text


def enum_names(enum: Any) -> dict[str, str]:
    """Short name to name of each value of an enum but the unspecified one: RUNNING to STATE_RUNNING."""
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return {each.name.removeprefix(prefix): each.name for each in enum.values if each.number}
