"""The contract as tests see it: its files, its messages, and the declarations in the text of the .proto files."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor

from stillhouse.protos.stillhouse.v1 import run_pb2, teacher_pb2, tensor_pb2

FILES: tuple[FileDescriptor, ...] = (tensor_pb2.DESCRIPTOR, teacher_pb2.DESCRIPTOR, run_pb2.DESCRIPTOR)
DIRECTORY = Path(tensor_pb2.__file__).parent

_DECLARATIONS = (
    re.compile(r"(?P<kind>message|enum|service|rpc|oneof) (?P<name>\w+)"),
    re.compile(r"(?:optional |repeated )?(?:map<[\w, .]+>|[\w.]+) (?P<name>\w+) = \d+;"),
    re.compile(r"(?P<name>[A-Z][A-Z0-9_]*) = \d+;"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Declaration:
    """A message, enum, service, rpc, oneof, field or enum value in the text of a .proto file."""

    place: str
    name: str
    comment: str


def declarations() -> Iterator[Declaration]:
    """Every declaration in the .proto files, with the comment before it."""
    for path in sorted(DIRECTORY.glob("*.proto")):
        comment: list[str] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            text = line.strip()
            if text.startswith("//"):
                comment.append(text.lstrip("/ "))
                continue
            found = next((match for pattern in _DECLARATIONS if (match := pattern.match(text))), None)
            if found:
                yield Declaration(
                    place=f"{path.name}:{number}", name=found["name"], comment=" ".join(comment).strip()
                )
            comment = []


def messages() -> Iterator[Descriptor]:
    """Every message of the contract, the nested ones included; entries of maps are none."""

    def below(message: Descriptor) -> Iterator[Descriptor]:
        if not message.GetOptions().map_entry:
            yield message
            for nested in message.nested_types:
                yield from below(nested)

    for file in FILES:
        for message in file.message_types_by_name.values():
            yield from below(message)


def enums() -> Iterator[EnumDescriptor]:
    """Every enum of the contract, the nested ones included."""
    for file in FILES:
        yield from file.enum_types_by_name.values()
    for message in messages():
        yield from message.enum_types
