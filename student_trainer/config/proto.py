"""Copies protobuf messages to the dataclasses of schema.py and back, driven by field names alone."""

from __future__ import annotations

import collections.abc
import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message

from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.student_trainer.config.checks import check
from stillhouse.student_trainer.config.defaults import fill
from stillhouse.student_trainer.config.schema import RunConfig

T = TypeVar("T")


def read(cls: type[T], message: Message) -> T:
    """The dataclass `cls` from `message`: a field that is not set takes the dataclass's default."""
    values: dict[str, Any] = {}
    fields = message.DESCRIPTOR.fields_by_name
    for name, kind in kinds(cls).items():
        value = getattr(message, name)
        if kind.repeated:
            items = tuple(read(kind.nested, item) for item in value) if kind.nested else tuple(value)
            if items:
                values[name] = items
        elif kind.mapping:
            values[name] = dict(value)
        elif not fields[name].has_presence or message.HasField(name):
            values[name] = read(kind.nested, value) if kind.nested else value
    return cls(**values)


def write(config: Any, message: Message) -> None:
    """Set every field of `message` that `config`, a dataclass of schema.py, has a value for."""
    for name, kind in kinds(type(config)).items():
        value = getattr(config, name)
        if value is None:
            continue
        if kind.mapping:
            getattr(message, name).update(value)
        elif kind.repeated and kind.nested:
            for item in value:
                write(item, getattr(message, name).add())
        elif kind.repeated:
            getattr(message, name).extend(value)
        elif kind.nested:
            getattr(message, name).SetInParent()
            write(value, getattr(message, name))
        else:
            setattr(message, name, value)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """How one field of a dataclass lies in its message."""

    repeated: bool
    mapping: bool
    nested: type[Any] | None


_KINDS: dict[type[Any], Mapping[str, Kind]] = {}
"""By dataclass: reading type hints takes most of the time of a copy."""


def kinds(cls: type[Any]) -> Mapping[str, Kind]:
    """Every field of the dataclass `cls`, in order."""
    if cls not in _KINDS:
        hints = typing.get_type_hints(cls)
        _KINDS[cls] = {field.name: _kind(hints[field.name]) for field in dataclasses.fields(cls)}
    return _KINDS[cls]


def _kind(hint: Any) -> Kind:
    origin = typing.get_origin(hint)
    members = typing.get_args(hint) or (hint,)
    nested = next((member for member in members if dataclasses.is_dataclass(member)), None)
    return Kind(
        repeated=origin is tuple,
        mapping=origin is collections.abc.Mapping,
        nested=typing.cast("type[Any] | None", nested),
    )


def from_proto(spec: RunSpec) -> RunConfig:
    """The configuration that `spec` asks for, with every default set.

    Reading an effective spec gives the same configuration again.

    Raises:
        StillhouseError: INVALID_SPEC with every violation at once, each with the field's path.
    """
    config = fill(read(RunConfig, spec), spec)
    check(config)
    return config


def to_proto(config: RunConfig) -> RunSpec:
    """The spec with every default of `config` set: a run's effective_spec."""
    spec = RunSpec()
    write(config, spec)
    return spec
