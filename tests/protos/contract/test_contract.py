"""Lint of the contract without buf: names, zero values, and a comment on everything."""

import re
from collections import Counter
from typing import Any

import pytest
from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor, MethodDescriptor

from scripts.reference.contract_text import declarations
from stillhouse.protos.rpc.channel import SERVICE_CONFIG
from tests.protos.contract.descriptors import FILES, enums, messages

RPCS = [rpc for file in FILES for service in file.services_by_name.values() for rpc in service.methods]


def spec_messages() -> set[str]:
    return {message.name for message in messages() if message.name.endswith(("Spec", "Term", "Context"))}


def test_every_declaration_has_a_comment_that_is_a_sentence() -> None:
    bare = [each.line for each in declarations() if not re.search(r"\w.*[.:]$", each.comment)]
    assert bare == []


def test_the_text_and_the_stubs_declare_the_same_names() -> None:
    in_stubs = Counter(
        [service.name for file in FILES for service in file.services_by_name.values()]
        + [rpc.name for rpc in RPCS]
        + [name for enum in enums() for name in (enum.name, *enum.values_by_name)]
        + [message.name for message in messages()]
        + [field.name for message in messages() for field in message.fields]
        + [oneof.name for message in messages() for oneof in message.oneofs if not oneof.name.startswith("_")]
    )
    assert Counter(each.name for each in declarations()) == in_stubs


@pytest.mark.parametrize("enum", list(enums()), ids=lambda enum: enum.full_name)
def test_enums_start_unspecified_and_values_carry_their_name(enum: EnumDescriptor) -> None:
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enum.name).upper() + "_"
    assert enum.values_by_number[0].name == f"{prefix}UNSPECIFIED"
    assert all(name.startswith(prefix) for name in enum.values_by_name)


@pytest.mark.parametrize("rpc", RPCS, ids=lambda rpc: rpc.name)
def test_requests_and_responses_are_named_after_their_rpc(rpc: MethodDescriptor) -> None:
    assert rpc.input_type.name == f"{rpc.name}Request"
    returns_the_resource = rpc.containing_service.name == "RunService" and rpc.output_type.name in (
        "Run",
        rpc.name.removeprefix("Get"),
    )
    assert returns_the_resource or rpc.output_type.name == f"{rpc.name}Response"


def test_fields_are_snake_case_and_say_their_unit_last() -> None:
    names = {field.name for message in messages() for field in message.fields}
    assert [name for name in names if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name)] == []
    assert [name for name in names if re.search(r"(seconds|bytes|ms)_", name)] == []


def test_a_setting_of_a_run_is_double_or_optional_never_float() -> None:
    floats = [
        field.full_name
        for message in messages()
        for field in message.fields
        if message.name in spec_messages() and field.type == FieldDescriptor.TYPE_FLOAT
    ]
    assert floats == []


def test_a_number_or_a_switch_of_a_run_can_be_left_unset() -> None:
    numbers = [
        field.full_name
        for message in messages()
        for field in message.fields
        if message.name in spec_messages()
        and not field.is_repeated
        and field.cpp_type not in {FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_MESSAGE}
        and not field.has_presence
    ]
    assert numbers == []


def test_bulk_arrays_are_sent_as_bytes() -> None:
    repeated = [
        field.full_name
        for message in messages()
        for field in message.fields
        if field.is_repeated and field.type == FieldDescriptor.TYPE_FLOAT
    ]
    assert repeated == ["stillhouse.v1.DistributionConfig.temperatures"]


def test_both_services_have_the_names_that_clients_use() -> None:
    names = [service.full_name for file in FILES for service in file.services_by_name.values()]
    assert names == ["stillhouse.v1.TeacherService", "stillhouse.v1.RunService"]


def test_only_idempotent_rpcs_of_the_contract_are_retried() -> None:
    config: Any = SERVICE_CONFIG
    repeated = {(name["service"], name["method"]) for part in config["methodConfig"] for name in part["name"]}
    assert repeated <= {(rpc.containing_service.full_name, rpc.name) for rpc in RPCS}
    assert {method for _, method in repeated}.isdisjoint({"DeleteRun", "ResumeRun", "UnloadAdapter"})
    streams = {rpc.name for rpc in RPCS if rpc.client_streaming or rpc.server_streaming}
    assert {method for _, method in repeated}.isdisjoint(streams)
