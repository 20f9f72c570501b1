"""Descriptors of the contract: files, messages and enums."""

from collections.abc import Iterator

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor

from stillhouse.protos.stillhouse.v1 import run_pb2, teacher_pb2, tensor_pb2

FILES: tuple[FileDescriptor, ...] = (tensor_pb2.DESCRIPTOR, teacher_pb2.DESCRIPTOR, run_pb2.DESCRIPTOR)


def messages() -> Iterator[Descriptor]:
    """Every message of the contract, nested ones included, without map entries."""

    def below(message: Descriptor) -> Iterator[Descriptor]:
        if not message.GetOptions().map_entry:
            yield message
            for nested in message.nested_types:
                yield from below(nested)

    for file in FILES:
        for message in file.message_types_by_name.values():
            yield from below(message)


def enums() -> Iterator[EnumDescriptor]:
    """Every enum of the contract, nested ones included."""
    for file in FILES:
        yield from file.enum_types_by_name.values()
    for message in messages():
        yield from message.enum_types
