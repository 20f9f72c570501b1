"""Options `--set PATH=VALUE` that lead from one run to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from stillhouse.client.core.json_output import as_json, dumps, is_map
from stillhouse.client.runfile.overrides import apply_override
from stillhouse.client.runfile.yaml_reader import RunFileReader
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec


def set_options(before: RunSpec, after: RunSpec) -> list[str] | None:
    """The values of `--set` that make `after` of `before`; None if it lacks settings that `before` has."""
    options = list(_differences(before, after, ""))
    made, reader = RunSpec(), RunFileReader("")
    made.CopyFrom(before)
    for each in options:
        apply_override(each, made, reader)
    return options if made == after and not reader.problems else None


def _differences(before: Message, after: Message, above: str) -> Iterator[str]:
    for field in cast("Sequence[FieldDescriptor]", after.DESCRIPTOR.fields):
        path = f"{above}.{field.name}" if above else field.name
        old, new = getattr(before, field.name), getattr(after, field.name)
        if is_map(field):
            yield from (f"{path}.{key}={new[key]}" for key in new if key not in old or old[key] != new[key])
        elif field.is_repeated and field.message_type is not None:
            for index, item in enumerate(new):
                if index < len(old):
                    yield from _differences(old[index], item, f"{path}[{index}]")
                else:
                    yield f"{path}[{index}]={dumps(_written(item))}"
        elif field.is_repeated:
            if list(new) != list(old):
                yield f"{path}={dumps(list(new))}"
        elif field.message_type is not None:
            if after.HasField(field.name):
                if not before.HasField(field.name) and not new.ListFields():
                    yield f"{path}={{}}"
                yield from _differences(old, new, path)
        elif new != old or (
            field.has_presence and after.HasField(field.name) and not before.HasField(field.name)
        ):
            yield f"{path}={_text(new)}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else dumps(value)


def _written(message: Message) -> dict[str, Any]:
    """The fields of a message that are set."""
    names = {field.name for field, _ in message.ListFields()}
    found = {name: value for name, value in as_json(message).items() if name in names}
    for field, value in message.ListFields():
        if field.message_type is not None and not is_map(field):
            found[field.name] = [_written(each) for each in value] if field.is_repeated else _written(value)
    return found
