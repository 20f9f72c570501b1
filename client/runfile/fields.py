"""Fields of a run file, from the contract's descriptors: both spellings, and the nearest name for a wrong one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from stillhouse.client.core.json_output import is_map
from stillhouse.client.runfile.schema import is_offered
from stillhouse.client.runfile.synonyms import synonym_sentence
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec

MAX_NAME_CHARS = 100
"""Compared characters of a wrong name."""
LEAST_SIMILARITY = 0.82
"""Least similarity of a misspelt name, besides exchanged letters; another word in a name is no slip, nor is top_p for top_k."""


def find_field(message: Message, name: str) -> FieldDescriptor | None:
    """The field of `message` that is spelled `name`, in snake_case or lowerCamelCase."""
    fields = cast("Sequence[FieldDescriptor]", message.DESCRIPTOR.fields)
    return next((each for each in fields if name in (each.name, each.json_name)), None)


def spelled_like(name: str, sample: str) -> str:
    """The field name `name` in the spelling of `sample`: lowerCamelCase if that has a capital after a small letter."""
    if not re.search("[a-z][A-Z]", sample):
        return name
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


def unknown_field_sentence(message: Message, name: str, prefix: str) -> str:
    """Sentence for a `name` that is no field of `message`, which lies at `prefix`, and which field may be meant.

    A slip of the pen is a field of the same section; else the name is another section's, or another trainer's.
    """
    names = [
        field.name for field in message.DESCRIPTOR.fields if is_offered(message.DESCRIPTOR.name, field.name)
    ]
    plain = name.lower() if name.isupper() else snake(name[:MAX_NAME_CHARS])
    near = difflib.get_close_matches(plain, names, n=1, cutoff=LEAST_SIMILARITY)
    near = near or [each for each in names if sorted(each) == sorted(plain)]
    if near:
        return f'there is no such field; did you mean "{spelled_like(near[0], name)}"?'
    known = synonym_sentence(plain, snake(prefix)) or _elsewhere(plain, snake(prefix))
    if known is not None:
        return known
    where = f"of {prefix}" if prefix else "of a run"
    listed = ", ".join(spelled_like(each, name) for each in names) or "none"
    return f"there is no such field; the fields {where} are: {listed}."


def _elsewhere(name: str, prefix: str) -> str | None:
    """Sentence with the places that have a field `name`: those in the same part of the file, if there are any."""
    places = [path for path in all_paths() if path.rpartition(".")[2] == name]
    part = re.split(r"[.\[]", prefix, maxsplit=1)[0]
    near = [path for path in places if part and path.startswith((f"{part}.", f"{part}["))]
    if not places:
        return None
    listed = " or ".join(f'"{path}"' for path in (near or places)[:3])
    verb = "it belongs to" if near or not part else "the field of that name is"
    return f"there is no such field here; {verb} {listed}."


@cache
def all_paths() -> tuple[str, ...]:
    """Every field's path, with `[]` after lists, such as "loss.terms[].alpha"; nearest to the top first."""
    return tuple(sorted(_paths(RunSpec.DESCRIPTOR, ""), key=lambda path: (path.count("."), path)))


def _paths(message: Descriptor, prefix: str) -> Iterator[str]:
    for field in message.fields:
        if not is_offered(message.name, field.name):
            continue
        path = f"{prefix}{field.name}"
        yield path
        if field.message_type is not None and not is_map(field):
            yield from _paths(field.message_type, path + ("[]." if field.is_repeated else "."))


def snake(name: str) -> str:
    """`name`, a field's or a path of fields, in snake_case."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name.replace("-", "_"))
