"""The product reads or writes all of its contract; what later work brings is named here."""

import re
from functools import cache
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor

from tests.protos.contract.descriptors import FILES, enums, messages

ROOT = Path(__file__).parents[3]
PROGRAMS = {name: ROOT / name for name in ("protos", "teacher_service", "student_trainer", "client")}
LATER: set[str] = set()
"""Full names of fields that later work brings."""
RPCS = [rpc for file in FILES for service in file.services_by_name.values() for rpc in service.methods]
FIELDS = [field for message in messages() for field in message.fields]


@cache
def code_of(*programs: str) -> str:
    """Text of the programs' own modules."""
    return "\n".join(
        path.read_text(encoding="utf-8")
        for program in programs
        for path in sorted(PROGRAMS[program].rglob("*.py"))
        if "_pb2" not in path.name
    )


ALL = code_of(*PROGRAMS)
USED = (
    set(re.findall(r"\.(\w+)\b", ALL))
    | set(re.findall(r"\b(\w+)=", ALL))
    | set(re.findall(r"[\"'](\w+)[\"']", ALL))
)


@pytest.mark.parametrize("rpc", RPCS, ids=lambda rpc: rpc.name)
def test_an_rpc_is_served_and_called(rpc: MethodDescriptor) -> None:
    assert re.search(rf"def {rpc.name}\(", code_of("teacher_service", "student_trainer"))
    assert re.search(rf"\.{rpc.name}\b", code_of("client", "student_trainer"))


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.full_name.removeprefix("stillhouse.v1."))
def test_a_field_is_read_or_written(field: FieldDescriptor) -> None:
    assert field.name in USED or field.full_name in LATER


def test_values_of_enums_are_used() -> None:
    unused = [
        value.name
        for enum in enums()
        for value in enum.values
        if value.number and not re.search(rf"\b{value.name}\b", ALL)
    ]
    assert unused == []


def test_a_message_is_part_of_an_rpc() -> None:
    roots = [each for rpc in RPCS for each in (rpc.input_type, rpc.output_type)]
    found = {each.full_name for each in roots}
    while roots:
        for field in roots.pop().fields:
            if field.message_type is not None and field.message_type.full_name not in found:
                found.add(field.message_type.full_name)
                roots.append(field.message_type)
    assert {each.full_name for each in messages()} <= found


def test_the_list_of_later_work_holds_unused_fields_alone() -> None:
    unused = {field.full_name for field in FIELDS if field.name not in USED}
    assert unused == LATER
