"""docs/reference/contract.md, from descriptors and the comments of the .proto files."""

from collections.abc import Iterator

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, MethodDescriptor

from scripts.reference.contract_text import comments
from scripts.reference.markdown import NOTE, table
from stillhouse.protos.stillhouse.v1 import run_pb2, teacher_pb2, tensor_pb2

FILES = (teacher_pb2.DESCRIPTOR, run_pb2.DESCRIPTOR, tensor_pb2.DESCRIPTOR)
PACKAGE = "stillhouse.v1."


def page() -> str:
    """The page."""
    told = comments()
    parts = [
        f"{NOTE}\n# Contract\n\nPackage `stillhouse.v1`, of the files in `protos/stillhouse/v1`. Settings of a run have their "
        "ranges, choices and defaults in [run-file.md](run-file.md).\n"
    ]
    for file in FILES:
        for service in file.services_by_name.values():
            rows = [
                (f"`{rpc.name}`", _signature(rpc), told[f"{service.name}.{rpc.name}"])
                for rpc in service.methods
            ]
            parts.append(
                f"\n## {service.name}\n\n{told[service.name]}\n\n{table(('Rpc', 'Messages', 'Meaning'), rows)}"
            )
    for file in FILES:
        parts.append(f"\n## {file.name.rpartition('/')[2]}\n")
        for message in file.message_types_by_name.values():
            parts += _message(message, told)
        for enum in file.enum_types_by_name.values():
            parts.append(_enum(enum, told))
    return "".join(parts)


def type_name(field: FieldDescriptor) -> str:
    """Type of a field as the .proto file writes it."""
    nested, message = field.message_type or field.enum_type, field.message_type
    if message is not None and message.GetOptions().map_entry:
        return f"map<{', '.join(type_name(each) for each in message.fields)}>"
    name = nested.full_name.removeprefix(PACKAGE) if nested is not None else _SCALARS[field.type]
    return f"repeated {name}" if field.is_repeated else name


_SCALARS = {
    getattr(FieldDescriptor, name): name.removeprefix("TYPE_").lower()
    for name in dir(FieldDescriptor)
    if name.startswith("TYPE_")
}


def _signature(rpc: MethodDescriptor) -> str:
    request = f"{'stream ' * rpc.client_streaming}{rpc.input_type.name}"
    return f"`{request}` → `{'stream ' * rpc.server_streaming}{rpc.output_type.name}`"


def _message(message: Descriptor, told: dict[str, str]) -> Iterator[str]:
    if message.GetOptions().map_entry:
        return
    path = message.full_name.removeprefix(PACKAGE)
    yield f"\n### {path}\n\n{told[path]}\n"
    rows = [
        (f"`{field.name}` = {field.number}", f"`{type_name(field)}`", told[f"{path}.{field.name}"])
        for field in message.fields
    ]
    if rows:
        yield "\n" + table(("Field", "Type", "Meaning"), rows)
    for enum in message.enum_types:
        yield _enum(enum, told)
    for nested in message.nested_types:
        yield from _message(nested, told)


def _enum(enum: EnumDescriptor, told: dict[str, str]) -> str:
    path = enum.full_name.removeprefix(PACKAGE)
    rows = [(f"`{value.name}` = {value.number}", told[f"{path}.{value.name}"]) for value in enum.values]
    return f"\n### {path}\n\n{told[path]}\n\n{table(('Value', 'Meaning'), rows)}"
