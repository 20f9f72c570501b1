"""Copies protobuf messages to the dataclasses of schema.py and back, driven by field names alone."""

from __future__ import annotations

from typing import Any, TypeVar

from google.protobuf.message import Message

from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.student_trainer.config.checks import check
from stillhouse.student_trainer.config.defaults import fill_defaults
from stillhouse.student_trainer.config.fields import fields_of
from stillhouse.student_trainer.config.presets import with_preset
from stillhouse.student_trainer.config.schema import RunConfig

T = TypeVar("T")


def read(cls: type[T], message: Message) -> T:
    """The dataclass `cls` from `message`: a field that is not set takes the dataclass's default."""
    values: dict[str, Any] = {}
    descriptors = message.DESCRIPTOR.fields_by_name
    for name, info in fields_of(cls).items():
        value, nested = getattr(message, name), info.nested
        if info.repeated:
            items = tuple(read(nested, item) for item in value) if nested else tuple(value)
            if items:
                values[name] = items
        elif info.mapping:
            values[name] = dict(value)
        elif not descriptors[name].has_presence or message.HasField(name):
            values[name] = read(nested, value) if nested else value
    return cls(**values)


def write(config: Any, message: Message) -> None:
    """Set every field of `message` that `config`, a dataclass of schema.py, has a value for."""
    for name, info in fields_of(type(config)).items():
        value = getattr(config, name)
        if value is None:
            continue
        if info.mapping:
            getattr(message, name).update(value)
        elif info.repeated and info.nested:
            for item in value:
                write(item, getattr(message, name).add())
        elif info.repeated:
            getattr(message, name).extend(value)
        elif info.nested:
            getattr(message, name).SetInParent()
            write(value, getattr(message, name))
        else:
            setattr(message, name, value)


def from_proto(spec: RunSpec) -> RunConfig:
    """The configuration that `spec` asks for, with every default set.

    Reading an effective spec gives the same configuration again.

    Raises:
        StillhouseError: INVALID_SPEC with every violation at once, each with the field's path.
    """
    config = with_defaults(spec)
    check(config)
    return config


def with_defaults(spec: RunSpec) -> RunConfig:
    """The configuration that `spec` asks for, with every default set; nothing is checked."""
    spec = with_preset(spec)
    return fill_defaults(read(RunConfig, spec), spec)


def to_proto(config: RunConfig) -> RunSpec:
    """The spec with every default of `config` set: a run's effective_spec."""
    spec = RunSpec()
    write(config, spec)
    return spec
