"""Golden bytes: one encoding for each message of v1 that must always decode; run as a program, adds missing ones."""

import json
from pathlib import Path
from typing import Any, cast

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2

from tests.protos.contract.descriptors import messages

PATH = Path(__file__).with_name("golden_v1.json")
_NUMBERS = {
    FieldDescriptor.CPPTYPE_DOUBLE: 0.25,
    FieldDescriptor.CPPTYPE_FLOAT: 0.5,
    FieldDescriptor.CPPTYPE_BOOL: True,
    FieldDescriptor.CPPTYPE_ENUM: 1,
}


def read() -> dict[str, dict[str, Any]]:
    """Name of an entry to its bytes, in hexadecimal, and its content, in protobuf's JSON mapping."""
    return (
        cast(dict[str, dict[str, Any]], json.loads(PATH.read_text(encoding="utf-8"))) if PATH.exists() else {}
    )


def entries() -> dict[str, Message]:
    """An entry for each message, and one for each further alternative of a oneof."""
    made: dict[str, Message] = {}
    for descriptor in messages():
        made[descriptor.full_name] = full(descriptor)
        for oneof in descriptor.oneofs:
            for field in oneof.fields[1:]:
                message = full(descriptor)
                _fill(message, field, deep=True)
                made[f"{descriptor.full_name}/{field.name}"] = message
    return made


def full(descriptor: Descriptor, *, deep: bool = True) -> Message:
    """A message with every field set, two levels deep."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        first = field.containing_oneof is None or field is field.containing_oneof.fields[0]
        if first and (deep or field.message_type is None):
            _fill(message, field, deep=deep)
    return message


def _fill(message: Message, field: FieldDescriptor, *, deep: bool) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        value = field.message_type.fields_by_name["value"]
        getattr(message, field.name)["key"] = _scalar(value)
    elif field.message_type is not None:
        target = getattr(message, field.name)
        child = target.add() if field.is_repeated else target
        child.SetInParent()
        child.MergeFrom(full(field.message_type, deep=False))
        if field.message_type.full_name == "google.rpc.Status":
            child.details.add().Pack(error_details_pb2.ErrorInfo(reason="RUN_STATE", domain="stillhouse"))
    elif field.is_repeated:
        getattr(message, field.name).extend([_scalar(field), _scalar(field)])
    else:
        setattr(message, field.name, _scalar(field))


def _scalar(field: FieldDescriptor) -> Any:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return bytes([0, 255, field.number])
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return f"{field.name} é"
    return _NUMBERS.get(field.cpp_type, 100 + field.number)


def main() -> None:
    """Adds entries for messages without one. Existing entries stay: older programs sent them."""
    golden = read()
    for name, message in entries().items():
        data = message.SerializeToString(deterministic=True).hex()
        golden.setdefault(name, {"hex": data, "json": json_format.MessageToDict(message)})
    PATH.write_text(json.dumps(golden, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
